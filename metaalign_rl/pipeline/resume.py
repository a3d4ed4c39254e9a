"""Resume a run: its folder records which stages have begun, and with which settings."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypedDict

from metaalign_rl.config import loader
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core import renamed_settings
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, write_json, write_text
from metaalign_rl.runtime.run_lock import run_lock

Settings = dict[str, Any]  # values by dotted key, as JSON has them

# The settings that a stage's result depends on: sections, or single keys. A stage depends on the stages before it too.
USED: dict[str, tuple[str, ...]] = {"data": ("data",)}
USED["sft"] = (*USED["data"], "model", "sft", "learner.world_size")
USED["reward"] = (*USED["sft"], "reward", "rollout")
USED["ppo"] = (*USED["reward"], "ppo", "learner")
USED["evaluate"] = (*USED["ppo"], "evaluate")
USED["report"] = USED["evaluate"]

# These change how the work is done and not its result, so they may change whenever a run is resumed.
OPERATIONAL = {
    "reward.devices",
    "rollout.engines",
    "rollout.tensor_parallel",
    "rollout.max_sequences",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "rollout.batch_tokens",
    "rollout.bucket_mib",
    "ppo.reward_workers",
    "ppo.stream_chunks",
    "ppo.max_mismatch",
    "ppo.max_mismatch_growth",
    "ppo.save_steps",
    "ppo.keep_checkpoints",
    "ppo.evaluate_steps",
    "learner.micro_batch_tokens",
    "learner.share_prompts",
    "learner.gradient_checkpointing",
    "learner.offload_states",
    "sft.gradient_checkpointing",
}
OPEN = {"ppo": {"ppo.steps"}}  # by stage, the settings that may change until the stage is finished


class StageRecord(TypedDict):
    """The record of a stage: its wall time, `None` until it is finished, and the settings it began with."""

    seconds: float | None
    settings: Settings


class StageRecords:
    """The records of a run's stages, in `stages.json`."""

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one. Keys of an earlier release get their new names."""
        self._path = path
        self._records: dict[str, StageRecord] = read_json(path) if path.is_file() else {}
        for record in self._records.values():
            record["settings"] = renamed_settings.current(record["settings"])

    def __iter__(self) -> Iterator[str]:
        """The stages that have begun."""
        return iter(self._records)

    def __getitem__(self, stage: str) -> StageRecord:
        return self._records[stage]

    def is_finished(self, stage: str) -> bool:
        return stage in self._records and self._records[stage]["seconds"] is not None

    def write(self, stage: str, seconds: float | None, settings: Settings) -> None:
        """Record a stage that begins (`seconds` is `None`) or has finished."""
        self._records[stage] = {"seconds": seconds, "settings": settings}
        write_json(self._path, self._records)


@dataclass(frozen=True, slots=True)
class ClaimedRun:
    """A run whose folder no other process works on.

    Attributes:
        records: the records of the stages that have begun.
        stages_left: the stages still to run, in order.
    """

    records: StageRecords
    stages_left: Sequence[str]


def has_begun(folder: RunFolder) -> bool:
    """Whether a stage of this run was recorded before."""
    return folder.stages.is_file()


@contextmanager
def claimed(folder: RunFolder, config: Config) -> Iterator[ClaimedRun]:
    """Lock the run's folder, check the settings against its records, and save the config in it.

    Raises:
        UserError: another process works on the run, or a setting has changed that must not.
    """
    with run_lock(folder.root):
        records = StageRecords(folder.stages)
        check_settings(folder, records, config)
        write_text(folder.config, loader.dump(config))
        for stage in config.run.stages:
            if records.is_finished(stage):
                print(f"{stage}: finished before, skipped")
        yield ClaimedRun(records, [stage for stage in config.run.stages if not records.is_finished(stage)])


def check_settings(folder: RunFolder, records: StageRecords, config: Config) -> None:
    """Compare the config with the settings that each recorded stage began with. Print the changes that are allowed.

    Raises:
        UserError: a change that is not allowed, because the result would match neither the old nor the new settings.
    """
    accepted: dict[str, str] = {}
    for stage in records:
        changes = _changes(records[stage]["settings"], used_settings(config, stage))
        still_open = set() if records.is_finished(stage) else OPEN.get(stage, set())
        refused = [change for key, change in changes.items() if key not in OPERATIONAL | still_open]
        if refused:
            raise UserError(
                f"{folder.root}: stage `{stage}` already ran with different settings ({', '.join(refused)}); "
                "give another run.name, or the old settings"
            )
        accepted |= changes
    if accepted:
        print(f"resumed with different settings: {', '.join(accepted.values())}")


def _changes(before: Settings, now: Settings) -> dict[str, str]:
    """The settings that differ, by key, as text for reading."""
    keys = sorted(before | now)
    return {key: f"{key} {before.get(key)!r} → {now.get(key)!r}" for key in keys if before.get(key) != now.get(key)}


def used_settings(config: Config, stage: str) -> Settings:
    """The settings that a stage's result depends on."""
    used: Settings = {"run.seed": config.run.seed}
    for name in USED[stage]:
        section = attrgetter(name)(config)
        if isinstance(section, str | int):
            used[name] = section
        else:
            used |= {f"{name}.{key}": value for key, value in asdict(section).items()}
    found: Settings = json.loads(json.dumps(used))
    return found
