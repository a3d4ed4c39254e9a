"""Estimates memory and disk in bytes, by part, for one device of each role."""

from typing import TypeAlias

from metaalign_rl.config.learner import HEAD_LOGITS
from metaalign_rl.core.units import GIB, MIB
from metaalign_rl.plan.shape import BYTES, Shape
from metaalign_rl.plan.work import Case

Memory: TypeAlias = dict[str, float]  # bytes by part, such as {"weights": 1.5e10, "gradients": 2.6e8}

BUCKET = 5e8  # numbers that DeepSpeed reduces together (`reduce_bucket_size`)
LIVE = 1e9  # maximum of gathered weights under ZeRO-3 (`stage3_max_live_parameters`)
SCORED_TOKENS = 16_384  # tokens of one forward pass of the scorer
EXTRA_CHECKPOINTS = 2  # in addition to the newest ones: the best one, and the one that is being written
DRIVER = 1.0 * GIB  # the driver and Ray's own processes
PROCESS = 3.0 * GIB  # main memory of a process that uses a GPU
TEXT_BYTES = 2.0  # per token of a kept rollout, compressed
SAMPLER_COPIES = 3  # float32 copies of an engine's logits while it samples with log-probabilities


def model_states(parameters: float, ranks: int, stage: int, dtype: str, offload: bool = False) -> Memory:
    """Memory of a trained model on one of `ranks` devices, by ZeRO stage.

    From arXiv:1910.02054, section 5: stage 1 shards the optimizer states, stage 2 also the gradients, stage 3 also the
    weights. Adam keeps two float32 numbers per weight. DeepSpeed keeps one more, a float32 copy of the weight, with
    bfloat16 weights or with ZeRO. In bfloat16 these are the paper's 2 + 2 + 12 bytes per weight.

    Args:
        parameters: number of weights.
        stage: ZeRO stage, 0 to 3.
        offload: the optimizer states are in main memory.
    """
    size, states = BYTES[dtype], 8 + 4 * (dtype == "bfloat16" or stage > 0)
    return {
        "weights": size * parameters / (ranks if stage == 3 else 1),
        "gradients": size * parameters / (ranks if stage >= 2 else 1),
        "optimizer states": 0.0 if offload else states * parameters / (ranks if stage >= 1 else 1),
    }


def gathered(parameters: float, ranks: int, dtype: str) -> float:
    """Bytes of weights that a rank gathers from the others under ZeRO-3."""
    return min(parameters, LIVE) * BYTES[dtype] * (1 - 1 / ranks)


def activations(shape: Shape, tokens: float, dtype: str, checkpointing: bool) -> float:
    """Bytes saved for the backward pass of `tokens` tokens; see `Shape.layer_activations`.

    With gradient checkpointing: the input of each layer, and the activations of the one layer that is recomputed.
    """
    layer = shape.layer_activations(dtype)
    kept = shape.layers * shape.hidden * BYTES[dtype] + layer if checkpointing else shape.layers * layer
    return tokens * kept


def logit_bytes(dtype: str) -> int:
    """Bytes per logit: in float32, its softmax, its gradient, copies in dtype."""
    return 12 if dtype == "float32" else 12 + 2 * BYTES[dtype]


def logits(shape: Shape, tokens: float, dtype: str) -> float:
    """Bytes for the logits of `tokens` response tokens. A learner computes at most `HEAD_LOGITS` of them at a time."""
    return min(tokens * shape.vocabulary, HEAD_LOGITS) * logit_bytes(dtype)


def micro_batch(case: Case) -> float:
    """Tokens of one micro-batch on one rank."""
    learner, length = case.config.learner, case.work.length
    share = learner.minibatch_size / case.config.learner.world_size * length
    return max(length, min(learner.micro_batch_tokens, share))


def learner_memory(case: Case) -> Memory:
    """Memory of one learner: policy, critic, reference and its largest micro-batch."""
    config, learner, shape, dtype = case.config, case.config.learner, case.policy, case.dtype
    ranks, stage = config.learner.world_size, learner.zero_stage
    tokens = micro_batch(case)
    sharded = ranks if stage == 3 else 1
    found = model_states(_trained(case), ranks, stage, dtype, learner.offload_optimizer)
    if learner.lora_rank:
        found["weights"] += BYTES[dtype] * shape.parameters / sharded
    if case.has_critic:
        found["critic"] = sum(model_states(shape.backbone, ranks, stage, dtype, learner.offload_optimizer).values())
    if not learner.lora_rank:  # else the policy without its adapters is the reference
        found["reference"] = BYTES[dtype] * shape.parameters / sharded
    kept = activations(shape, tokens, dtype, learner.gradient_checkpointing)
    found["activations"] = kept * case.device.slack
    found["logits"] = logits(shape, tokens * case.work.response_tokens / case.work.length, dtype)
    found["buffers"] = _buffers(case)
    found["process"] = case.device.process_gib["learner"] * GIB
    return found


def _trained(case: Case) -> int:
    """Number of the policy's trained weights."""
    rank = case.config.learner.lora_rank
    return case.policy.adapter(rank) if rank else case.policy.parameters


def _buffers(case: Case) -> float:
    """DeepSpeed's buffers: a bucket of gradients, allocated in full on a GPU, and the weights gathered by ZeRO-3."""
    config, shape = case.config, case.policy
    stage = config.learner.zero_stage
    more = gathered(shape.parameters, config.learner.world_size, case.dtype) if stage == 3 else 0.0
    return bucket(case, shape.parameters, stage, case.dtype) + more


def bucket(case: Case, parameters: float, stage: int, dtype: str) -> float:
    """Bytes of the bucket in which DeepSpeed reduces gradients."""
    return BYTES[dtype] * (min(BUCKET, parameters) if case.device.is_cpu or stage == 0 else BUCKET)


def engine_memory(case: Case) -> Memory:
    """Memory of one device of an engine. On a GPU the KV cache gets the rest of the engine's share."""
    rollout, shape, size = case.config.rollout, case.policy, BYTES[case.dtype]
    weights = size * shape.parameters / rollout.tensor_parallel
    found = {"weights": weights, "process": case.device.process_gib["engine"] * GIB}
    found["sampler"] = _concurrency(case) * shape.vocabulary * 4.0 * SAMPLER_COPIES
    if case.device.memory_gib is None:
        return found | {"KV cache": rollout.kv_cache_gib * GIB}
    room = rollout.gpu_memory_utilization * case.device.memory_gib * GIB - sum(found.values())
    return found | {"KV cache": max(0.0, room)}


def _concurrency(case: Case) -> float:
    return min(case.config.rollout.max_sequences, case.work.samples / case.config.rollout.engines)


def kv_tokens(case: Case) -> float:
    """Number of tokens that fit one engine's KV cache."""
    rollout = case.config.rollout
    split = min(rollout.tensor_parallel, case.policy.kv_heads)  # a head is not split
    return engine_memory(case)["KV cache"] / (case.policy.kv_bytes(case.dtype) / split)


def reward_memory(case: Case) -> Memory:
    """Memory of one reward worker: weights and one forward pass."""
    if case.reward is None:
        return {"process": case.device.process_gib["reward"] * GIB}
    layer = case.reward.layer_activations(case.dtype)
    return {
        "weights": float(BYTES[case.dtype] * case.reward.backbone),
        "activations": float(layer * SCORED_TOKENS),
        "process": case.device.process_gib["reward"] * GIB,
    }


def resting_memory(case: Case) -> float:
    """Bytes that a learner keeps on its device while engines generate.

    It releases activations, logits and buffers, and with `learner.offload_states` the optimizer states too.
    """
    parts = learner_memory(case)
    kept = sum(size for part, size in parts.items() if part not in ("activations", "logits", "buffers"))
    return kept - moved_states(case)


def moved_states(case: Case) -> float:
    """Bytes of optimizer states that a learner moves to main memory and back in every step."""
    learner = case.config.learner
    if not learner.offload_states:
        return 0.0
    trained = _trained(case) + case.has_critic * case.policy.backbone
    return model_states(trained, learner.world_size, learner.zero_stage, case.dtype)["optimizer states"]


def colocated_memory(case: Case) -> float:
    """Bytes of a device that a learner and an engine share. The engine sleeps while the learner works."""
    learner, engine = learner_memory(case), engine_memory(case)
    return max(resting_memory(case) + sum(engine.values()), sum(learner.values()) + engine["process"])


def object_store_memory(case: Case) -> float:
    """Bytes in Ray's object store during a weight sync: two buckets on CPUs, none on GPUs."""
    buckets = 2 * case.config.rollout.bucket_mib * MIB
    return min(buckets, BYTES[case.dtype] * case.policy.parameters) if case.device.is_cpu else 0.0


def host_memory(case: Case) -> Memory:
    """Main memory of all nodes together, by role. On CPUs it includes the models."""
    config, weights = case.config, BYTES[case.dtype] * case.policy.parameters
    found = {
        "driver and Ray": DRIVER,
        "object store": min(object_store_memory(case), config.cluster.object_store_bytes),
    }
    if case.device.is_cpu:
        return found | {
            "learners": config.learner.world_size * sum(learner_memory(case).values()),
            "engines": config.rollout.engines * sum(engine_memory(case).values()),
            "reward workers": config.ppo.reward_workers * sum(reward_memory(case).values()),
        }
    # A rank loads the checkpoint into main memory before it goes to the device; at stage 3, only its share.
    sharded = config.learner.world_size if config.learner.zero_stage == 3 else 1
    rank = PROCESS + weights / sharded + moved_states(case)
    found["learners"] = config.learner.world_size * rank + _offloaded(case)
    found["engines"] = config.rollout.engines * config.rollout.tensor_parallel * PROCESS
    found["reward workers"] = config.ppo.reward_workers * PROCESS
    return found


def _offloaded(case: Case) -> float:
    states = BYTES["float32"] * 3 * (_trained(case) + case.has_critic * case.policy.backbone)
    return states if case.config.learner.offload_optimizer else 0.0


def disk_bytes(case: Case) -> Memory:
    """Bytes in the run's folder at its end: PPO checkpoints, models and kept rollouts."""
    config, size = case.config, BYTES[case.dtype]
    trained = _trained(case) + case.has_critic * case.policy.backbone
    states = size + 8 + 4 * (case.dtype == "bfloat16" or config.learner.zero_stage > 0)
    models = size * case.policy.parameters * 3  # base, sft, policy
    if not config.reward.path and case.reward:
        models += size * case.reward.backbone * (1 + len(config.reward.controls))
    steps = config.ppo.steps // config.run.keep_rollouts if config.run.keep_rollouts else 0
    rollouts = steps * case.work.samples * case.work.length * TEXT_BYTES
    checkpoint = states * trained + size * case.policy.parameters
    return {
        "checkpoints": (config.ppo.keep_checkpoints + EXTRA_CHECKPOINTS) * checkpoint,
        "models": models,
        "rollouts": rollouts,
    }
