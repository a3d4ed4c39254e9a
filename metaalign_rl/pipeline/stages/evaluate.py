"""The evaluation stage: gold-checked figures on held-out rows before and after PPO."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import ray

from metaalign_rl.core.dataflow import Row, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import write_json, write_jsonl
from metaalign_rl.evaluation.gold_metrics import JudgedResponse, consistency, headline, judge_all, summary
from metaalign_rl.evaluation.robustness import changeable, changes, unchanged
from metaalign_rl.evaluation.showcase import showcase_rows
from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.runtime.ray_session import actor_options
from metaalign_rl.scoring.terms import RewardSpec
from metaalign_rl.scoring.worker import RewardWorker

ROBUSTNESS_ROWS = 600
GOOD = 0.5  # the probability from which on the reward model calls an answer good


def run(context: RunContext) -> None:
    """Write `evaluation/`: every answer with its verdict, and `figures.json`.

    Raises:
        UserError: no policy to evaluate, or no held-out prompts.
    """
    settings, folder = context.config.evaluate, context.folder
    if not folder.policy.is_dir():
        raise UserError(f"{folder.policy}: no policy there to evaluate; run the stage ppo before it")
    rows = context.rows("held_out_prompts")
    sampled, greedy = (Sampling(heat, settings.max_new_tokens) for heat in (settings.temperature, 0.0))
    shown = showcase_rows(rows, context.config.data.source)
    showcase = [_describe(row) for row in shown]
    figures: dict[str, Any] = {"source": context.config.data.source, "showcase": showcase}
    for name, checkpoint in (("sft", context.start_policy()), ("ppo", folder.policy)):
        judged = judge_all(rows, context.answer(checkpoint, rows, sampled))
        figures[f"{name}_sampled"] = _keep(judged, folder.evaluation / f"{name}_sampled.jsonl")
        if name == "ppo" and context.scorer() is not None:
            figures["reward"] = _compare_with_proxy(context, judged)
        greedily = judge_all(rows, context.answer(checkpoint, rows, greedy))
        figures[f"{name}_greedy"] = _keep(greedily, folder.evaluation / f"{name}_greedy.jsonl")
        if folder.rows("paraphrases").is_file():
            said = context.rows("paraphrases")
            figures[f"{name}_greedy"]["consistency"] = consistency(
                judge_all(said, context.answer(checkpoint, said, greedy))
            )
        for record, text in zip(showcase, context.answer(checkpoint, shown, greedy), strict=True):
            record[name] = text
    figures["empty"] = summary(judge_all(rows, [""] * len(rows)))
    figures["robustness"] = _robustness(context, greedily, greedy)
    write_json(folder.evaluation / "figures.json", figures)


def _keep(judged: Sequence[JudgedResponse], path: Path) -> dict[str, Any]:
    """Write the answers with their verdicts; their figures."""
    write_jsonl(path, (found.record() for found in judged))
    return summary(judged)


def _robustness(
    context: RunContext, greedily: Sequence[JudgedResponse], sampling: Sampling
) -> dict[str, dict[str, Any]]:
    """The headline figures of the PPO policy on some of the rows under each change."""
    known = {found.row.id: found.answer for found in greedily}
    rows = changeable([found.row for found in greedily], ROBUSTNESS_ROWS)
    answers: dict[Callable[[Row], Row], list[str]] = {unchanged: [known[row.id] for row in rows]}
    found: dict[str, dict[str, Any]] = {}
    for name, change in changes(context.config.data.source).items() if rows else ():
        if change.shown not in answers:
            answers[change.shown] = context.answer(context.folder.policy, [change.shown(row) for row in rows], sampling)
        judged = judge_all([change.judged(row) for row in rows], answers[change.shown])
        found[name] = {"meaning": change.meaning, "rows": len(rows), **headline(judged)}
    return found


def _describe(row: Row) -> dict[str, str]:
    return {"system_info": row.system_info, "user_info": row.user_info, "question": row.messages[-1]["content"]}


def _compare_with_proxy(context: RunContext, judged: Sequence[JudgedResponse]) -> dict[str, float]:
    """How the reward model's verdict, p ≥ 0.5, agrees with gold on the policy's own answers.

    Gold is what the mode's score was trained to say: `following` for the governing tier's, `strict` for the others.
    """
    config = context.config
    worker = ray.remote(RewardWorker).options(**actor_options(config, "reward"))
    reward = config.reward
    spec = RewardSpec(
        model=context.scorer(), mode=reward.mode, view=reward.view, dtype=config.model.dtype, model_weight=1.0
    )
    scorer = worker.remote(spec)
    rewards = ray.get(scorer.score.remote([found.row for found in judged], [found.answer for found in judged]))
    ray.kill(scorer)
    good = [reward.proxy >= GOOD for reward in rewards]
    wanted = "following" if config.reward.mode == "tier" else "strict"
    gold = [getattr(found.verdict, wanted) is True for found in judged]
    return {
        "on_policy": fmean(a == b for a, b in zip(good, gold, strict=True)),
        "gold_minus_proxy": fmean(gold) - fmean(good),
    }
