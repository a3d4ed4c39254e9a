"""The evaluation stage: judge responses to held-out rows by gold checks, before and after PPO."""

from collections.abc import Callable, Sequence
from dataclasses import replace
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
from metaalign_rl.runtime.actor_options import actor_options
from metaalign_rl.scoring.terms import RewardSpec
from metaalign_rl.scoring.worker import RewardWorker
from reward.score import GOOD

Metrics = dict[str, Any]

ROBUSTNESS_ROWS = 600


def run(context: RunContext) -> None:
    """Write `evaluation/`: every response with its verdict, and the metrics in `figures.json`.

    Raises:
        UserError: there is no policy to evaluate, or there are no held-out prompts.
    """
    settings, folder = context.config.evaluate, context.folder
    if not folder.policy.is_dir():
        raise UserError(f"{folder.policy}: there is no policy to evaluate; run the stage ppo first")
    rows = context.rows("held_out_prompts")
    stop = tuple(context.config.rollout.stop)
    sampled = Sampling(settings.temperature, settings.max_new_tokens, stop=stop)
    greedy = replace(sampled, temperature=0.0)
    shown = showcase_rows(rows, context.config.data.source)
    showcase = [_texts(row) for row in shown]
    metrics: Metrics = {"source": context.config.data.source, "showcase": showcase}
    for name, checkpoint in (("sft", context.start_policy()), ("ppo", folder.policy)):
        judged = judge_all(rows, context.answer(checkpoint, rows, sampled))
        metrics[f"{name}_sampled"] = _write(judged, folder.evaluation / f"{name}_sampled.jsonl")
        if name == "ppo" and context.scorer() is not None:
            metrics["reward"] = _compare_with_proxy(context, judged)
        judged_greedy = judge_all(rows, context.answer(checkpoint, rows, greedy))
        metrics[f"{name}_greedy"] = _write(judged_greedy, folder.evaluation / f"{name}_greedy.jsonl")
        if folder.rows("paraphrases").is_file():
            metrics[f"{name}_greedy"]["consistency"] = _consistency(context, checkpoint, greedy)
        for texts, response in zip(showcase, context.answer(checkpoint, shown, greedy), strict=True):
            texts[name] = response
    metrics["empty"] = summary(judge_all(rows, [""] * len(rows)))
    metrics["robustness"] = _robustness(context, judged_greedy, greedy)
    write_json(folder.evaluation / "figures.json", metrics)


def _texts(row: Row) -> dict[str, str]:
    return {"system_info": row.system_info, "user_info": row.user_info, "question": row.messages[-1]["content"]}


def _write(judged: Sequence[JudgedResponse], path: Path) -> Metrics:
    """Write the responses with their verdicts, and return their metrics."""
    write_jsonl(path, (found.record() for found in judged))
    return summary(judged)


def _consistency(context: RunContext, checkpoint: Path, sampling: Sampling) -> float | None:
    rows = context.rows("paraphrases")
    return consistency(judge_all(rows, context.answer(checkpoint, rows, sampling)))


def _robustness(context: RunContext, judged: Sequence[JudgedResponse], sampling: Sampling) -> dict[str, Metrics]:
    """The PPO policy's headline metrics under each change of the rows, on up to `ROBUSTNESS_ROWS` of them.

    Args:
        judged: the policy's responses to the unchanged rows.
    """
    known = {found.row.id: found.answer for found in judged}
    rows = changeable([found.row for found in judged], ROBUSTNESS_ROWS)
    responses: dict[Callable[[Row], Row], list[str]] = {unchanged: [known[row.id] for row in rows]}
    metrics: dict[str, Metrics] = {}
    for name, change in changes(context.config.data.source).items() if rows else ():
        if change.shown not in responses:
            changed = [change.shown(row) for row in rows]
            responses[change.shown] = context.answer(context.folder.policy, changed, sampling)
        found = judge_all([change.judged(row) for row in rows], responses[change.shown])
        metrics[name] = {"meaning": change.meaning, "rows": len(rows), **headline(found)}
    return metrics


def _compare_with_proxy(context: RunContext, judged: Sequence[JudgedResponse]) -> dict[str, float]:
    """How often the reward model's verdict, p ≥ 0.5, agrees with gold on the policy's own responses.

    Gold is what the mode's score was trained to predict: `following` for `tier`, `strict` for the other modes.
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
    verdict = "following" if config.reward.mode == "tier" else "strict"
    gold = [getattr(found.verdict, verdict) is True for found in judged]
    return {
        "on_policy": fmean(a == b for a, b in zip(good, gold, strict=True)),
        "gold_minus_proxy": fmean(gold) - fmean(good),
    }
