"""Estimates memory of each stage: of one device of each of its roles, and main memory of all nodes."""

from math import ceil

from metaalign_rl.config.schema import Config
from metaalign_rl.core.units import GIB
from metaalign_rl.plan import memory
from metaalign_rl.plan.memory import Memory
from metaalign_rl.plan.shape import BYTES
from metaalign_rl.plan.work import Case

STAGES = ("sft", "reward", "ppo")  # those that are estimated; the others need less than these


def estimated_stages(config: Config) -> list[str]:
    """The stages of a run that are estimated."""
    trains_reward = not (config.reward.path or config.reward.url)
    return [stage for stage in STAGES if stage in config.run.stages and (stage != "reward" or trains_reward)]


def device_memory(case: Case) -> dict[str, Memory]:
    """Memory of one device of each role of the run's stages, in bytes by part."""
    found: dict[str, Memory] = {}
    stages = estimated_stages(case.config)
    if "sft" in stages:
        found["SFT"] = sft_memory(case)
    if "reward" in stages:
        found["reward training"] = reward_training_memory(case)
    if "ppo" in stages:
        found["learner"] = memory.learner_memory(case)
    if "ppo" in stages or "reward" in stages:
        found["engine"] = memory.engine_memory(case)
    if "ppo" in stages:
        found["reward worker"] = memory.reward_memory(case)
    return found


def sft_memory(case: Case) -> Memory:
    """Memory of one rank of SFT. On GPUs DeepSpeed keeps bfloat16 weights, on CPUs float32 ones.

    transformers computes the logits of all tokens of a pass at the same time. Memory that a pass has freed is used
    again, so on a CPU there is no slack.
    """
    sft, ranks, shape = case.config.sft, case.config.learner.world_size, case.policy
    dtype = "float32" if case.device.is_cpu else "bfloat16"
    tokens = ceil(sft.batch_size / (ranks * sft.gradient_accumulation)) * case.work.length
    kept = memory.activations(shape, tokens, dtype, sft.gradient_checkpointing)
    return {
        **memory.model_states(shape.parameters, ranks, sft.zero_stage, dtype),
        "activations": kept,
        "logits": tokens * shape.vocabulary * memory.logit_bytes(dtype),
        "buffers": _bucket(case, shape.parameters, sft.zero_stage, dtype),
        "process": case.device.process_gib["training"] * GIB,
    }


def reward_training_memory(case: Case) -> Memory:
    """Memory of one rank of the reward model's training, or of a control's.

    The weights are in float32. With `model.dtype=bfloat16` the passes are computed in bfloat16, from copies of the
    weights that last as long as the pass.
    """
    reward, shape, dtype = case.config.reward, case.policy, case.dtype
    ranks, stage = reward.devices, reward.zero_stage if reward.devices > 1 else 0
    tokens = ceil(reward.batch_size / (ranks * reward.gradient_accumulation)) * _pair_tokens(case)
    kept = memory.activations(shape, tokens, dtype, reward.gradient_checkpointing)
    trained = shape.adapter(reward.lora_rank) if reward.lora_rank else shape.backbone
    states = memory.model_states(trained, ranks, stage, "float32")
    return {
        **states,
        "weights": float(BYTES["float32"] * shape.backbone),
        "copies": float(BYTES[dtype] * shape.backbone) if dtype == "bfloat16" else 0.0,
        "activations": kept,
        "buffers": _bucket(case, trained, stage, "float32"),
        "process": case.device.process_gib["training"] * GIB,
    }


def _bucket(case: Case, parameters: float, stage: int, dtype: str) -> float:
    """DeepSpeed's bucket of gradients. Without ZeRO it reduces after the backward pass, in what the pass has freed."""
    return memory.bucket(case, parameters, stage, dtype) if stage else 0.0


def training_memory(case: Case, stage: str) -> float:
    """Bytes of a device in the stage "sft" or "reward", with what a sleeping engine keeps on the same device."""
    if stage == "sft":
        return sum(sft_memory(case).values())
    has_engine = case.config.shares_devices and case.config.reward.on_policy_prompts > 0
    sleeping = memory.engine_memory(case)["process"] if has_engine else 0.0
    return sum(reward_training_memory(case).values()) + sleeping


def _pair_tokens(case: Case) -> float:
    """Tokens that are read of a pair: its prompt once and both answers, if they share one pass, else two texts."""
    shares = case.config.reward.token_weight > 0
    return case.work.length + (case.work.response_tokens if shares else case.work.length)


def trainings(config: Config) -> int:
    """Reward models that are trained at the same time: on one device each, the controls too."""
    return 1 + len(config.reward.controls) if config.reward.devices == 1 else 1


def host_memory(case: Case) -> dict[str, Memory]:
    """Main memory of all nodes together, by stage and role. On CPUs it includes the models."""
    config, found = case.config, {}
    stages = estimated_stages(config)
    if "sft" in stages:
        found["sft"] = {
            "driver and Ray": memory.DRIVER,
            "SFT": config.learner.world_size * _host_part(case, sum(sft_memory(case).values()), case.dtype),
        }
    if "reward" in stages:
        ranks = trainings(config) * config.reward.devices
        found["reward"] = {
            "driver and Ray": memory.DRIVER,
            "engines": memory.host_memory(case)["engines"] if config.reward.on_policy_prompts else 0.0,
            "reward training": ranks * _host_part(case, sum(reward_training_memory(case).values()), "float32"),
        }
    if "ppo" in stages:
        found["ppo"] = memory.host_memory(case)
    return found


def _host_part(case: Case, device: float, dtype: str) -> float:
    """Main memory of a training's rank: all of it on CPUs; with a GPU, the process and the weights on their way."""
    return device if case.device.is_cpu else memory.PROCESS + BYTES[dtype] * case.policy.parameters
