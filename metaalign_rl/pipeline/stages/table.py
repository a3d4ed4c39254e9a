"""The function that runs each stage."""

from collections.abc import Callable

from metaalign_rl import report
from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.pipeline.stages import data, evaluate, ppo, reward, sft


def _data(context: RunContext) -> None:
    data.run(context.config, context.folder.data)


def _report(context: RunContext) -> None:
    report.build(context.folder, context.config.reward.mode)


RUN: dict[str, Callable[[RunContext], None]] = {
    "data": _data,
    "sft": sft.run,
    "reward": reward.run,
    "ppo": ppo.run,
    "evaluate": evaluate.run,
    "report": _report,
}
