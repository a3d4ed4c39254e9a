"""docs/settings.md: every setting of a run and of the reward model's training, and the environment's, as tables."""

import re
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from metaalign_rl.config.loader import Key, flow, keys_of
from metaalign_rl.config.schema import Config
from metaalign_rl.config.yaml_values import type_name
from reward.training.config import RewardTraining

HEAD = """# Settings

<!-- docs/hooks.py writes this page from the types; change metaalign_rl/config.py and run `make docs`. -->

Each key can stand in the YAML file, nested by its dots, or as a word behind it, which wins:

```bash
metaalign-rl run configs/quickstart.yaml run.name=mine ppo.steps=100
metaalign-rl config configs/quickstart.yaml ppo.steps=100   # every setting as it is resolved
metaalign-rl config --describe                              # this page's tables, in the terminal
```

A value is read as its type says: `1e-3` is a number, `null` is none, a list is `[data, ppo]` and a table
`{system: 1, user/conflict: 2}`. An unknown key and a value of the wrong type are errors that name the file and line. A
unit of `–` is a plain number.
"""

# By the last part of a key. A number whose unit stands nowhere fails the test of this page.
UNITS = {
    "–": "seed learning_rate critic_learning_rate weight_decay betas max_grad_norm clip_low clip_high dual_clip "
    "correction_bounds entropy_coef lam gamma kl_coef temperature lora_alpha lora_rank",
    "weight": "model_weight checks_weight function_weight token_weight bt_weight bce_weight sampler",
    "share": "follow_rate warmup_ratio label_smoothing easy_first_fraction gpu_memory_utilization calibration_share",
    "GiB": "memory_gib disk_gib kv_cache_gib",
    "MiB": "bucket_mib",
    "seconds": "placement_timeout silence_s start_s",
    "steps": "keep_rollouts save_steps steps",
    "optimizer steps": "warmup_steps total_steps checkpoint_steps log_steps",
    "tokens": "max_tokens max_new_tokens micro_batch_tokens",
    "rows": "demonstrations pairs prompts held_out_prompts held_out_pairs paraphrased_wishes on_policy_prompts "
    "prompts_per_step batch_size",
    "answers": "on_policy_samples samples_per_prompt minibatch_size kl_horizon",
    "passes": "epochs gradient_accumulation",
    "logits": "margin",
    "reward": "value_clip",
    "times": "spike_limit",
    "nats": "kl_target",
    "nats a token": "max_mismatch",
    "sequences": "max_sequences",
    "numbers": "hidden_size",
    "count": "cpus gpus layers heads devices engines tensor_parallel world_size reward_workers stream_chunks "
    "keep_checkpoints limit",
}
UNIT = {name: unit for unit, names in UNITS.items() for name in names.split()}

ENVIRONMENT = {
    "RAY_ADDRESS": "`host:port` of a Ray cluster's head, or `auto`: the run goes there. Unset, it starts Ray on this "
    "machine, on the loopback. `ray job submit` sets it for the job",
    "METAALIGN_REWARD_TOKEN": "the scorer's secret: `metaalign-reward serve` and Ray Serve ask for it, `reward.url` "
    "and `RemoteScorer` send it",
    "METAALIGN_REWARD_URL": "the scorer's server, for the plugins of OpenRLHF and verl",
    "METAALIGN_REWARD_MODEL": "the reward model's folder, for the same, which then load it themselves",
    "METAALIGN_REWARD_DTYPE": "the type that they compute in: `float32`, `bfloat16` or `float16`",
    "METAALIGN_REWARD_MODE": "the number that they give: `overall` (default), `tier` or `composed`",
    "METAALIGN_PIN": "set by a run for its own actors under `cluster.pin`; not for you to set",
    "VLLM_API_KEY": "the secret of `metaalign-rl serve`; needed with another `--host` than the loopback",
    "OPENAI_API_KEY": "the key of the endpoint that `metaalign-rl evaluate URL` asks",
    "RAY_JOB_STOP_WAIT_TIME_S": "Ray's, on the cluster's head: seconds from `ray job stop` to the kill; 3 where it is "
    "unset",
    "HF_HOME, HF_TOKEN": "Hugging Face's: the folder of what the hub gave, and the key to gated models",
    "RAY_USAGE_STATS_ENABLED": "a run sets it to 0 where it is unset: Ray then reports nothing to its makers",
}


def render() -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    for section, meaning in _sections(Config):
        within = [(name, key) for name, key in keys_of(Config).items() if name.startswith(f"{section}.")]
        parts += [f"## `{section}`", meaning, _table(within)]
    parts += [
        "## `metaalign-reward train`",
        "The same training by itself, with options of these names (`--learning-rate`), and `reward.RewardTraining` in "
        "Python. [reward-training.md](reward-training.md) says when to use which.",
        _table(
            [(field.name, Key(field.type, field.default, field.metadata["help"])) for field in fields(RewardTraining)]
        ),
        "## Environment variables",
        "\n".join(
            ["| variable | meaning |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in ENVIRONMENT.items())]
        ),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _sections(cls: type) -> Iterable[tuple[str, str]]:
    for name, kind in get_type_hints(cls).items():
        if keys_of(cls)[name].is_section:
            yield name, (kind.__doc__ or "").partition("\n")[0]


def _table(rows: Iterable[tuple[str, Key]]) -> str:
    lines = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for name, key in rows:
        kind = " or ".join(f"`{part}`" for part in type_name(key.annotation).split(" | "))
        cells = (f"`{name}`", kind, _default(key.default), _unit(name, key.annotation), key.meaning.rstrip("."))
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _default(value: Any) -> str:
    assert value is not MISSING, "every setting of a run has a default"
    return "" if value == "" else f"`{flow(value)}`"


def _unit(name: str, annotation: Any) -> str:
    return UNIT[name.rpartition(".")[2]] if _is_number(annotation) else ""


def _is_number(annotation: Any) -> bool:
    return not {"int", "float"}.isdisjoint(re.findall(r"\w+", type_name(annotation)))
