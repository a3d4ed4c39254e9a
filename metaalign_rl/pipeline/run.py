"""The pipeline: run the stages in order, skip the finished ones, resume the interrupted one.

Imports no heavy packages: the stages' libraries load while Ray starts.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError, nearest
from metaalign_rl.pipeline.resume import USED, ClaimedRun, StageRecords, claimed, has_begun, used_settings
from metaalign_rl.preflight.run import cluster_preflight, require
from metaalign_rl.runtime import ray_session, signals

if TYPE_CHECKING:
    from metaalign_rl.pipeline.context import RunContext

STAGES = tuple(USED)
RESUMING = ("sft", "reward", "ppo")  # these resume from what they saved before an interruption; the others start again


def run(config: Config) -> None:
    """Run `config.run.stages` in the run's folder. Finished stages are skipped, an interrupted one resumes.

    Raises:
        UserError: an unknown stage, something that the run needs is missing, or the config does not fit the results
            that the run's folder already has.
    """
    _check_stages(config)
    folder = RunFolder.of(config)
    with ExitStack() as held:
        # An existing run can be refused, or found finished, before Ray starts.
        existing = held.enter_context(claimed(folder, config)) if has_begun(folder) else None
        if existing is None or existing.stages_left:
            with ray_session.connect(config), signals.raise_on_signals():
                require(cluster_preflight(config))  # the nodes are known only when Ray is connected
                _run_stages(config, existing or held.enter_context(claimed(folder, config)))
    if "report" in config.run.stages:
        from metaalign_rl import report

        report.show(folder.root)


def _check_stages(config: Config) -> None:
    for stage in config.run.stages:
        if stage not in STAGES:
            raise UserError(f"run.stages: unknown stage {stage!r}; {nearest(stage, STAGES)}")


def _run_stages(config: Config, run: ClaimedRun) -> None:
    from metaalign_rl.pipeline.context import RunContext

    with RunContext(config) as context:
        for stage in run.stages_left:
            _run_stage(stage, context, run.records)


def _run_stage(stage: str, context: RunContext, records: StageRecords) -> None:
    from metaalign_rl.pipeline.stages.table import RUN

    settings = used_settings(context.config, stage)
    if stage in RESUMING:  # record the settings before the stage saves anything unfinished
        records.write(stage, None, settings)
    began = time.monotonic()
    RUN[stage](context)
    seconds = round(time.monotonic() - began, 1)
    records.write(stage, seconds, settings)
    print(f"{stage}: {seconds:.0f} s", flush=True)
