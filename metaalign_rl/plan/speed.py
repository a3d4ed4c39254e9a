"""Seconds of one PPO step by part."""

from dataclasses import dataclass
from math import ceil
from typing import TypeAlias

from metaalign_rl.plan.memory import kv_tokens, micro_batch
from metaalign_rl.plan.shape import BYTES, Shape
from metaalign_rl.plan.work import Case

Seconds: TypeAlias = dict[str, float]  # by part, as metrics.jsonl calls them

LOGIT_PASSES = 12  # bytes moved by a response token's logits, a word of the vocabulary
UPDATE_PASSES = 2.0  # an optimizer step reads and writes all of a model's states


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model reads: tokens, how many of them need the output layer, texts' length, and passes."""

    tokens: float
    answers: float
    context: float
    passes: float


def step_seconds(case: Case) -> Seconds:
    """By part: rollout (decoding and prefill), reward, reference, learn, transfer; and their sum, step.

    Learners wait while engines draw, and the reverse. Reward workers score while answers are drawn: on devices of
    their own only what they take longer counts, on CPUs all of it.
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
    """Of one engine's share: `prefill`, bound by arithmetic, and `decode`, mostly bound by reading weights and keys.

    Prompts are counted once for each answer: what the engine's prefix cache saves is not. A step of decoding costs
    the longer of its reading (all weights, and each sequence's keys and values, half of the answer's in the mean) and
    its 2 operations a weight and sequence.
    """
    config, work, device, shape = case.config.rollout, case.work, case.device, case.policy
    engines = 1 if device.is_cpu else config.engines  # CPUs' engines share the cores
    parallel, samples = config.tensor_parallel, work.samples / engines
    prompt = Reading(samples * work.prompt_tokens, samples, work.prompt_tokens, passes=0)
    room = min(config.max_sequences, max(1.0, kv_tokens(case) / work.length))
    together = min(samples, room * config.engines / engines)
    steps = max(work.answer_tokens * samples / together, work.longest_answer * (work.answer_tokens > 1))
    decoded = samples * work.answer_tokens / steps  # sequences of a step, in the mean
    context = work.prompt_tokens + work.answer_tokens / 2
    size = BYTES[case.dtype]
    read = shape.parameters * size + decoded * context * shape.kv_bytes(case.dtype)
    operations = decoded * (
        2 * (shape.body + shape.vocabulary * shape.hidden) + shape.attention_flops(2 * int(context))
    )
    wait = max(read / device.bandwidth, operations / device.decode[case.dtype]) / parallel
    fixed = device.seconds["engine_step"] + shape.layers * device.seconds["engine_layer"]
    sampled = samples * work.answer_tokens * device.seconds["answer_token"]
    prefill = forward_seconds(case, shape, prompt, devices=parallel)
    return {"prefill": prefill, "decode": steps * (wait + fixed) + sampled}


def reward_seconds(case: Case) -> float:
    """The reward model's forward passes over prompts and answers, on one device for all workers, and its rows."""
    rows = case.work.samples * case.device.seconds["row"]
    if case.reward is None:
        return rows
    tokens = case.work.read(share_prompts=True)  # the scorer reads a prompt once for its answers
    return rows + forward_seconds(case, case.reward, Reading(tokens, 0, case.work.length, passes=tokens / 4096), 1)


def reference_seconds(case: Case) -> float:
    """Forward passes of policy, reference and critic over the step's answers."""
    reading = _reading(case, epochs=1)
    ranks = _ranks(case)
    models = 2 if case.config.learner.old_logprobs == "learner" else 1
    output = models * forward_seconds(case, case.policy, reading, ranks)
    critic = forward_seconds(case, case.policy, _without_output(reading), ranks) if case.has_critic else 0.0
    gather = _comm_seconds(case, case.policy.parameters, passes=1.0) * (models + case.has_critic) * micro_batches(case)
    return output + critic + (gather if case.config.learner.zero_stage == 3 else 0.0) + case.device.seconds["call"]


def learn_seconds(case: Case) -> float:
    """The epochs' forward and backward passes of policy and critic, reductions of gradients and optimizer steps.

    A backward pass is twice a forward pass: 6 operations a weight and token in all (arXiv:2001.08361, section 2.1),
    8 with gradient checkpointing, which does the forward pass twice (arXiv:2205.05198).
    """
    config, learner = case.config, case.config.learner
    reading, ranks = _reading(case, learner.epochs), _ranks(case)
    forwards = 4 if learner.gradient_checkpointing else 3
    models = [(case.policy.parameters, reading)]
    if case.has_critic:
        models.append((case.policy.backbone, _without_output(reading)))
    minibatches = learner.epochs * ceil(case.work.samples / learner.minibatch_size)
    seconds = case.device.seconds["call"]
    for parameters, part in models:
        compute = forwards * forward_seconds(case, case.policy, part, ranks, training=True)
        sharded = config.learner.world_size if learner.zero_stage > 0 else 1
        moved = UPDATE_PASSES * parameters * (3 * BYTES[case.dtype] + 12) / sharded
        speed = case.device.offload if learner.offload_optimizer else case.device.bandwidth
        update = minibatches * (moved / speed + case.device.seconds["update"])
        seconds += compute + update + _reduce_seconds(case, parameters, minibatches, compute)
    return seconds


def _reduce_seconds(case: Case, parameters: float, minibatches: int, compute: float) -> float:
    """What reducing gradients and gathering weights adds to `compute`, by stage (arXiv:1910.02054, section 7).

    Stages 0 and 1 reduce once a minibatch, 2 once a micro-batch, each moving 2 numbers a weight; stage 3 moves 3 a
    micro-batch, while it computes.
    """
    learner = case.config.learner
    if learner.zero_stage == 3:
        rounds = micro_batches(case) * learner.epochs
        return max(0.0, rounds * _comm_seconds(case, parameters, passes=3.0) - compute)
    rounds = micro_batches(case) * learner.epochs if learner.zero_stage == 2 else minibatches
    return rounds * _comm_seconds(case, parameters, passes=2.0)


def _comm_seconds(case: Case, parameters: float, passes: float) -> float:
    """Of a collective operation that moves each weight `passes` times over the slowest link; none on one rank."""
    ranks = case.config.learner.world_size
    if ranks == 1:
        return 0.0
    speed = case.device.network if case.nodes > 1 else case.device.link
    return passes * parameters * BYTES[case.dtype] * (1 - 1 / ranks) / speed


def micro_batches(case: Case) -> int:
    """Forward passes of one rank over a step's answers."""
    return ceil(case.work.samples * case.work.length / case.config.learner.world_size / micro_batch(case))


def transfer_seconds(case: Case) -> float:
    """The policy's weights on their way to the engines."""
    size = BYTES[case.dtype] * case.policy.parameters
    gather = _comm_seconds(case, case.policy.parameters, passes=1.0) if case.config.learner.zero_stage == 3 else 0.0
    return gather + size / case.device.transfer + case.device.seconds["call"]


def forward_seconds(case: Case, shape: Shape, reading: Reading, devices: int, training: bool = False) -> float:
    """A forward pass over `reading` on each of `devices` that share it.

    2 operations a weight and token, and attention's; where the device's rates are of products alone, also what moves
    through memory: what the layers keep of a token, and the logits.
    """
    device, dtype = case.device, case.dtype
    rate = (device.train if training else device.forward)[dtype]
    operations = reading.tokens * (2 * shape.body + shape.attention_flops(int(reading.context)))
    operations += reading.answers * 2 * shape.vocabulary * shape.hidden
    moved = reading.tokens * shape.layers * shape.layer_activations(dtype)
    moved += reading.answers * shape.vocabulary * LOGIT_PASSES
    seconds = operations / rate + device.passes * moved / device.bandwidth
    return seconds / devices + reading.passes * shape.layers * device.seconds["layer"]


def _reading(case: Case, epochs: int) -> Reading:
    tokens = epochs * case.work.read(case.config.learner.share_prompts)
    return Reading(tokens, epochs * case.work.answers, case.work.length, epochs * micro_batches(case))


def _without_output(reading: Reading) -> Reading:
    return Reading(reading.tokens, 0.0, reading.context, reading.passes)


def _ranks(case: Case) -> int:
    """Devices that learners compute on side by side: on CPUs they share the cores."""
    return 1 if case.device.is_cpu else case.config.learner.world_size
