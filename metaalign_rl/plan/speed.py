"""Estimates the seconds of one PPO step, by part."""

from dataclasses import dataclass, replace
from math import ceil
from typing import TypeAlias

from metaalign_rl.plan.memory import kv_tokens, micro_batch, moved_states
from metaalign_rl.plan.shape import BYTES, Shape
from metaalign_rl.plan.work import Case

Seconds: TypeAlias = dict[str, float]  # by part; parts have their names in metrics.jsonl

LOGIT_PASSES = 12  # bytes moved per response token and token of the vocabulary, for the logits
UPDATE_PASSES = 2.0  # an optimizer step reads and writes all states of a model


@dataclass(frozen=True, slots=True)
class Load:
    """The load of one model.

    Attributes:
        tokens: tokens to process.
        output_tokens: those that need logits, of the output layer.
        context: mean tokens of a sequence.
        passes: number of forward passes.
    """

    tokens: float
    output_tokens: float
    context: float
    passes: float


def step_seconds(case: Case) -> Seconds:
    """Seconds of the parts "rollout", "reward", "reference", "learn" and "transfer", and their sum "step".

    Learners wait while engines generate, and the reverse. Reward workers score during the rollout. On separate devices
    only their time beyond the rollout counts, on CPUs all of it.
    """
    rollout, reward = rollout_seconds(case), reward_seconds(case)
    found = {
        "rollout": sum(rollout.values()),
        "reward": reward if case.device.is_cpu else max(0.0, reward - sum(rollout.values())),
        "reference": reference_seconds(case),
        "learn": learn_seconds(case),
        "transfer": transfer_seconds(case),
    }
    return found | {"step": sum(found.values())}


def rollout_seconds(case: Case) -> Seconds:
    """Seconds of the parts "prefill" and "decode" for one engine's share of the responses.

    Prefill is bound by arithmetic. Each response pays for its prompt, because the engine's prefix cache is ignored. A
    decoding step takes the longer of two times: reading all weights and each sequence's keys and values (half of the
    response's on average), or 2 operations per weight and sequence.
    """
    config, work, device, shape = case.config.rollout, case.work, case.device, case.policy
    engines = 1 if device.is_cpu else config.engines  # CPUs' engines share the cores
    parallel, samples = config.tensor_parallel, work.samples / engines
    prompt = Load(samples * work.prompt_tokens, samples, work.prompt_tokens, passes=0)
    room = min(config.max_sequences, max(1.0, kv_tokens(case) / work.length))
    concurrent = min(samples, room * config.engines / engines)
    steps = max(work.response_tokens * samples / concurrent, work.longest_response * (work.response_tokens > 1))
    decoded = samples * work.response_tokens / steps  # mean number of sequences per step
    context = work.prompt_tokens + work.response_tokens / 2
    size = BYTES[case.dtype]
    read = shape.parameters * size + decoded * context * shape.kv_bytes(case.dtype)
    operations = decoded * (
        2 * (shape.body + shape.vocabulary * shape.hidden) + shape.attention_flops(2 * int(context))
    )
    wait = max(read / device.bandwidth, operations / device.decode[case.dtype]) / parallel
    fixed = device.seconds["engine_step"] + shape.layers * device.seconds["engine_layer"]
    sampled = samples * work.response_tokens * device.seconds["answer_token"]
    prefill = forward_seconds(case, shape, prompt, devices=parallel)
    return {"prefill": prefill, "decode": steps * (wait + fixed) + sampled}


def reward_seconds(case: Case) -> float:
    """Forward passes of the reward model over prompts and responses, on one device for all workers."""
    rows = case.work.samples * case.device.seconds["row"]
    if case.reward is None:
        return rows
    tokens = case.work.tokens_read(share_prompts=True)  # the scorer reads a prompt once for all its responses
    return rows + forward_seconds(case, case.reward, Load(tokens, 0, case.work.length, passes=tokens / 4096), 1)


def reference_seconds(case: Case) -> float:
    """Forward passes of policy, reference and critic over the responses of the step."""
    load = _load(case, epochs=1)
    ranks = _ranks(case)
    models = 2 if case.config.learner.old_logprobs == "learner" else 1
    output = models * forward_seconds(case, case.policy, load, ranks)
    critic = forward_seconds(case, case.policy, _without_output(load), ranks) if case.has_critic else 0.0
    gather = _comm_seconds(case, case.policy.parameters, passes=1.0) * (models + case.has_critic) * micro_batches(case)
    return output + critic + (gather if case.config.learner.zero_stage == 3 else 0.0) + case.device.seconds["call"]


def learn_seconds(case: Case) -> float:
    """Forward and backward passes of policy and critic, gradient reductions and optimizer steps, of all epochs.

    A backward pass costs two forward passes: together 6 operations per weight and token (arXiv:2001.08361, section
    2.1), or 8 with gradient checkpointing, which repeats the forward pass (arXiv:2205.05198).
    """
    config, learner = case.config, case.config.learner
    load, ranks = _load(case, learner.epochs), _ranks(case)
    forwards = 4 if learner.gradient_checkpointing else 3
    models = [(case.policy.parameters, load)]
    if case.has_critic:
        models.append((case.policy.backbone, _without_output(load)))
    minibatches = learner.epochs * ceil(case.work.samples / learner.minibatch_size)
    seconds = case.device.seconds["call"]
    for parameters, part in models:
        compute = forwards * forward_seconds(case, case.policy, part, ranks, training=True)
        sharded = config.learner.world_size if learner.zero_stage > 0 else 1
        moved = UPDATE_PASSES * parameters * (3 * BYTES[case.dtype] + 12) / sharded
        speed = case.device.offload if learner.offload_optimizer else case.device.bandwidth
        update = minibatches * (moved / speed + case.device.seconds["update"])
        seconds += compute + update + _reduce_seconds(case, parameters, minibatches, compute)
    return seconds + 2 * moved_states(case) / case.device.offload


def _reduce_seconds(case: Case, parameters: float, minibatches: int, compute: float) -> float:
    """Seconds that gradient reductions and weight gathering add to `compute`, by stage.

    From arXiv:1910.02054, section 7: stages 0 and 1 reduce once per minibatch, stage 2 once per micro-batch, and each
    reduction moves 2 numbers per weight. Stage 3 moves 3 per micro-batch, while it computes.
    """
    learner = case.config.learner
    if learner.zero_stage == 3:
        rounds = micro_batches(case) * learner.epochs
        return max(0.0, rounds * _comm_seconds(case, parameters, passes=3.0) - compute)
    rounds = micro_batches(case) * learner.epochs if learner.zero_stage == 2 else minibatches
    return rounds * _comm_seconds(case, parameters, passes=2.0)


def _comm_seconds(case: Case, parameters: float, passes: float) -> float:
    """Seconds of a collective that moves each weight `passes` times over the slowest link; 0 on one rank."""
    ranks = case.config.learner.world_size
    if ranks == 1:
        return 0.0
    speed = case.device.network if case.nodes > 1 else case.device.link
    return passes * parameters * BYTES[case.dtype] * (1 - 1 / ranks) / speed


def micro_batches(case: Case) -> int:
    """Micro-batches of one rank per step and epoch."""
    return ceil(case.work.samples * case.work.length / case.config.learner.world_size / micro_batch(case))


def transfer_seconds(case: Case) -> float:
    """Weight sync: the policy's weights go to the engines."""
    size = BYTES[case.dtype] * case.policy.parameters
    gather = _comm_seconds(case, case.policy.parameters, passes=1.0) if case.config.learner.zero_stage == 3 else 0.0
    return gather + size / case.device.transfer + case.device.seconds["call"]


def forward_seconds(case: Case, shape: Shape, load: Load, devices: int, training: bool = False) -> float:
    """Forward passes over `load`, shared by `devices`.

    It counts 2 operations per weight and token, and attention's operations. If the device's rates are of matrix
    products only (`Device.passes` above 0), it adds the time to move saved activations and logits through memory.
    """
    device, dtype = case.device, case.dtype
    rate = (device.train if training else device.forward)[dtype]
    operations = load.tokens * (2 * shape.body + shape.attention_flops(int(load.context)))
    operations += load.output_tokens * 2 * shape.vocabulary * shape.hidden
    moved = load.tokens * shape.layers * shape.layer_activations(dtype)
    moved += load.output_tokens * shape.vocabulary * LOGIT_PASSES
    seconds = operations / rate + device.passes * moved / device.bandwidth
    return seconds / devices + load.passes * shape.layers * device.seconds["layer"]


def _load(case: Case, epochs: int) -> Load:
    tokens = epochs * case.work.tokens_read(case.config.learner.share_prompts)
    output_tokens = epochs * case.work.total_response_tokens
    return Load(tokens, output_tokens, case.work.length, epochs * micro_batches(case))


def _without_output(load: Load) -> Load:
    return replace(load, output_tokens=0.0)


def _ranks(case: Case) -> int:
    """Devices that learners use in parallel; on CPUs they share the cores, which count as one device."""
    return 1 if case.device.is_cpu else case.config.learner.world_size
