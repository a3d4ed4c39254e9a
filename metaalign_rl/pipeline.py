"""The pipeline: the stages in order, each skipped when it is finished."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from metaalign_rl import report, runtime, settings
from metaalign_rl.config import Config
from metaalign_rl.context import RunContext
from metaalign_rl.errors import UserError, nearest
from metaalign_rl.files import read_json, write_json, write_text
from metaalign_rl.stages import data, evaluate, ppo, reward, sft


def run(config: Config) -> None:
    """Run `config.run.stages` in the run's folder; what is finished is skipped, what was interrupted resumes.

    Raises:
        UserError: an unknown stage, something missing that the run needs, or a config that does not fit the
            finished part of the run.
    """
    for stage in config.run.stages:
        if stage not in STAGES:
            raise UserError(f"run.stages: unknown stage {stage!r}; {nearest(stage, STAGES)}")
    with runtime.connect(config), RunContext(config) as context:
        runtime.require(runtime.preflight(config))
        finished = _claim_folder(context)
        for stage in config.run.stages:
            if stage in finished:
                print(f"{stage}: finished before, skipped")
                continue
            began = time.monotonic()
            STAGES[stage](context)
            finished[stage] = round(time.monotonic() - began, 1)
            write_json(context.folder.progress, finished)
            print(f"{stage}: {finished[stage]:.0f} s", flush=True)
    if "report" in config.run.stages:
        report.show(context.folder.root)


def _build_data(context: RunContext) -> None:
    data.build(context.config, context.folder.data)


def _build_report(context: RunContext) -> None:
    report.build(context.folder, context.config.reward.mode)


STAGES: dict[str, Callable[[RunContext], None]] = {
    "data": _build_data,
    "sft": sft.run,
    "reward": reward.run,
    "ppo": ppo.run,
    "evaluate": evaluate.run,
    "report": _build_report,
}
# The sections of the config that a finished stage has used: another value needs another run.
USED: dict[str, tuple[str, ...]] = {
    "data": ("data",),
    "sft": ("model", "sft"),
    "reward": ("reward",),
    "ppo": ("ppo", "learner"),
    "evaluate": ("evaluate",),
    "report": (),
}


def _claim_folder(context: RunContext) -> dict[str, float]:
    """The seconds of each finished stage. The resolved config is saved with the run.

    Raises:
        UserError: a setting differs from what a finished stage was run with.
    """
    folder, config = context.folder, context.config
    finished: dict[str, float] = read_json(folder.progress) if folder.progress.is_file() else {}
    if finished:
        before = _flat(asdict(settings.load(Config, folder.config, [])))
        now = _flat(asdict(config))
        sections = {section for stage in finished for section in USED[stage]} | {"run.seed"}
        changed = [key for key in now if now[key] != before[key] and {key, key.split(".")[0]} & sections]
        if changed:
            changes = ", ".join(f"{key} from {before[key]!r} to {now[key]!r}" for key in changed)
            raise UserError(
                f"{folder.root}: its finished stages ({', '.join(finished)}) were run with other settings: {changes}; "
                "give another run.name, or the old settings"
            )
    write_text(folder.config, settings.dump(config))
    return finished


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
