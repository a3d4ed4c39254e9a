"""docs/settings.md: the settings of a run and of the reward model's training, and the environment variables."""

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from metaalign_rl.config.keys import Key
from metaalign_rl.config.loader import flow
from metaalign_rl.config.schema import Config
from metaalign_rl.config.settings_table import groups
from metaalign_rl.config.yaml_values import type_name
from metaalign_rl.core.settings import documentation
from reward.training.config import RewardTraining

HEAD = """# Settings

<!-- docs/hooks.py writes this page from the classes in metaalign_rl/config/. Change those and run `make docs`. -->

This page lists every setting of a run. Set a key in the YAML file, or give it as a `key=value` word after the file.
Words override the file:

```bash
metaalign-rl run configs/quickstart.yaml run.name=mine ppo.steps=100
metaalign-rl config configs/quickstart.yaml ppo.steps=100   # print every setting and its resolved value
metaalign-rl config --describe                              # print this page's tables
```

In the YAML file each part of a key is a level of nesting: `ppo.steps` is `steps` under `ppo:`.

- The type decides how a value is read: `1e-3` is a number, `null` is none, a list is `[data, ppo]`, and a table is
  `{system: 1, user/conflict: 2}`.
- An unknown key or a value of the wrong type is an error. It names the file and the line.
- The unit `–` means a plain number.

The first table has the core settings, which most runs set. The tables after it have the others, by section.
"""

TRAINING = """The options of `metaalign-reward train`, which trains a reward model without a run. Write an option as
`--learning-rate`. In Python they are the fields of `reward.RewardTraining`. [reward-training.md](reward-training.md)
says when to change them."""

ENVIRONMENT = {
    "RAY_ADDRESS": "Ray cluster to run on: `host:port` of its head, or `auto`. If unset, a run starts Ray on this "
    "machine, on the loopback interface. `ray job submit` sets it for the job.",
    "METAALIGN_REWARD_TOKEN": "Secret of the scorer. `metaalign-reward serve` and Ray Serve require it from clients; "
    "`reward.url` and `RemoteScorer` send it.",
    "METAALIGN_REWARD_URL": "URL of the scorer, for the plugins of OpenRLHF and verl.",
    "METAALIGN_REWARD_MODEL": "Folder of the reward model, for the same plugins. They then load it themselves.",
    "METAALIGN_REWARD_DTYPE": "Type that the plugins compute in: `float32`, `bfloat16` or `float16`.",
    "METAALIGN_REWARD_MODE": "Score that the plugins return: `overall` (default), `tier` or `composed`.",
    "METAALIGN_PIN": "Set by a run with `cluster.pin` for its own actors. Do not set it yourself.",
    "METAALIGN_POLICY_GUARD": "Set by `metaalign-rl serve` for the guard in its server. Do not set it yourself.",
    "VLLM_API_KEY": "Secret of `metaalign-rl serve`. Required when `--host` is not the loopback interface. Clients "
    "send it for every path but `/health`.",
    "OPENAI_API_KEY": "Key of the endpoint that `metaalign-rl evaluate URL` evaluates.",
    "RAY_JOB_STOP_WAIT_TIME_S": "Read by Ray on the cluster's head: seconds between `ray job stop` and the kill. If "
    "unset, 3.",
    "HF_HOME, HF_TOKEN": "Read by Hugging Face libraries: the download folder, and the token for gated models.",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "Whether Ray starts the workers of a run under `uv run` by `uv run` too, in an "
    "uploaded copy of the working folder. If unset, a run sets it to 0.",
    "RAY_USAGE_STATS_ENABLED": "Whether Ray reports usage statistics to its developers. If unset, a run sets it to 0.",
}


def render() -> str:
    """The page, in Markdown."""
    parts = [HEAD]
    for group in groups(Config):
        title = f"## `{group.section}`\n\n{group.meaning}" if group.section else "## Core settings"
        parts += [title, _table(group.keys.items())]
    training = [(field.name, Key(field.type, field.default, documentation(field))) for field in fields(RewardTraining)]
    parts += ["## `metaalign-reward train`", TRAINING, _table(training)]
    variables = [f"| `{name}` | {text} |" for name, text in ENVIRONMENT.items()]
    parts += ["## Environment variables", "\n".join(["| variable | meaning |", "|---|---|", *variables])]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _table(rows: Iterable[tuple[str, Key]]) -> str:
    lines = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for name, key in rows:
        kind = " or ".join(f"`{part}`" for part in type_name(key.annotation).split(" | "))
        cells = (f"`{name}`", kind, _default(key.default), key.documentation.unit, key.documentation.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def _default(value: Any) -> str:
    assert value is not MISSING, "every setting of a run has a default"
    return "" if value == "" else f"`{flow(value)}`"
