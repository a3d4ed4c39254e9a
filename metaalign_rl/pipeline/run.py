"""The pipeline: the stages in order, each skipped when it is finished.

Light: the stages' libraries load while Ray starts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from metaalign_rl.config import loader
from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError, nearest
from metaalign_rl.core.files import read_json, write_json, write_text
from metaalign_rl.preflight.run import preflight, require
from metaalign_rl.runtime import ray_session, signals
from metaalign_rl.runtime.run_lock import run_lock

if TYPE_CHECKING:
    from metaalign_rl.pipeline.context import RunContext

# `stages.json`: by stage its "seconds", null while it has only begun, and the "settings" that it was begun with.
StageRecords: TypeAlias = dict[str, dict[str, Any]]


def run(config: Config) -> None:
    """Run `config.run.stages` in the run's folder; what is finished is skipped, what was interrupted resumes.

    Raises:
        UserError: an unknown stage, something missing that the run needs, or a config that does not fit what the
            run's folder holds already.
    """
    for stage in config.run.stages:
        if stage not in STAGES:
            raise UserError(f"run.stages: unknown stage {stage!r}; {nearest(stage, STAGES)}")
    folder = RunFolder.of(config)
    with ExitStack() as held:
        exists = folder.stages.is_file()  # such a run can be refused, or found finished, before Ray starts
        claim = held.enter_context(_claimed(folder, config)) if exists else None
        if claim is None or claim.left:
            with ray_session.connect(config), signals.raise_on_signals():
                require(preflight(config))  # checks the cluster: its nodes are known only when Ray is connected
                claim = claim or held.enter_context(_claimed(folder, config))
                _run_stages(config, claim)
    if "report" in config.run.stages:
        from metaalign_rl import report

        report.show(folder.root)


class ClaimedRun(NamedTuple):
    """A run that this process alone works on."""

    records: StageRecords
    left: list[str]  # the stages to do


@contextmanager
def _claimed(folder: RunFolder, config: Config) -> Iterator[ClaimedRun]:
    with run_lock(folder.root):
        records = claim_folder(folder, config)
        finished = [s for s in config.run.stages if s in records and records[s]["seconds"] is not None]
        for stage in finished:
            print(f"{stage}: finished before, skipped")
        yield ClaimedRun(records, [stage for stage in config.run.stages if stage not in finished])


def _run_stages(config: Config, claim: ClaimedRun) -> None:
    from metaalign_rl.pipeline.context import RunContext

    with RunContext(config) as context:
        for stage in claim.left:
            _run_stage(stage, context, claim.records)


def _run_stage(stage: str, context: RunContext, records: StageRecords) -> None:
    """Run a stage, with its settings on record before it leaves anything half-done and its seconds behind it."""
    from metaalign_rl.pipeline.stages.table import RUN

    settings_used = used_settings(context.config, stage)
    if stage in RESUMING:
        records[stage] = {"seconds": None, "settings": settings_used}
        write_json(context.folder.stages, records)
    began = time.monotonic()
    RUN[stage](context)
    seconds = round(time.monotonic() - began, 1)
    records[stage] = {"seconds": seconds, "settings": settings_used}
    write_json(context.folder.stages, records)
    print(f"{stage}: {seconds:.0f} s", flush=True)


RESUMING = ("sft", "reward", "ppo")  # these go on from what they left when they were cut off; the others begin anew
# The sections of the config that a stage's result depends on, through the stages before it too.
USED: dict[str, tuple[str, ...]] = {"data": ("data",)}
USED["sft"] = (*USED["data"], "model", "sft", "learners")
USED["reward"] = (*USED["sft"], "reward", "rollout")
USED["ppo"] = (*USED["reward"], "ppo", "learner")
USED["evaluate"] = (*USED["ppo"], "evaluate")
USED["report"] = USED["evaluate"]
STAGES = tuple(USED)


# How the work is done, not what comes of it: these may change whenever a run is resumed.
OPERATIONAL = {
    *("reward.devices", "rollout.engines", "rollout.tensor_parallel", "rollout.max_sequences", "rollout.kv_cache_gib"),
    *("rollout.gpu_memory_utilization", "rollout.bucket_mib", "ppo.reward_workers", "ppo.parts", "ppo.max_mismatch"),
    *("ppo.save_steps", "ppo.keep_checkpoints"),
    *("learner.micro_batch_tokens", "learner.share_prompts", "learner.gradient_checkpointing"),
}
OPEN = {"ppo": ("ppo.steps",)}  # these may change until the stage is finished


def claim_folder(folder: RunFolder, config: Config) -> StageRecords:
    """What the run's folder says of its stages. The resolved config is saved with the run.

    A change that a resumed run can take is shown.

    Raises:
        UserError: a setting differs from what a stage was begun with, and its result would be neither one's.
    """
    records: StageRecords = read_json(folder.stages) if folder.stages.is_file() else {}
    accepted: dict[str, str] = {}
    for stage, record in records.items():
        before, now = record["settings"], used_settings(config, stage)
        changes = {
            key: f"{key} from {before.get(key)!r} to {now.get(key)!r}"
            for key in sorted(before | now)
            if before.get(key) != now.get(key)
        }
        allowed = OPERATIONAL | set(OPEN.get(stage, ()) if record["seconds"] is None else ())
        if refused := [change for key, change in changes.items() if key not in allowed]:
            raise UserError(
                f"{folder.root}: its stage {stage} was run with other settings: {', '.join(refused)}; "
                "give another run.name, or the old settings"
            )
        accepted |= changes
    if accepted:
        print(f"resumed with other settings: {', '.join(accepted.values())}")
    write_text(folder.config, loader.dump(config))
    return records


def used_settings(config: Config, stage: str) -> dict[str, Any]:
    """The settings, by dotted key, that a stage's result depends on, as JSON gives them back."""
    used: dict[str, Any] = {"run.seed": config.run.seed}
    for section in USED[stage]:
        value = getattr(config, section)
        if is_dataclass(value):
            used |= {f"{section}.{key}": item for key, item in asdict(value).items()}  # type: ignore[arg-type]
        else:
            used[section] = value
    return cast(dict[str, Any], json.loads(json.dumps(used)))
