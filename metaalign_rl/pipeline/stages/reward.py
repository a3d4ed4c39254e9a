"""The reward stage: label responses of the SFT policy, then train and evaluate the reward model and its controls."""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from itertools import chain, cycle, groupby
from pathlib import Path
from typing import Any

import ray

from metaalign_rl.config.schema import Config
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import write_json, write_jsonl
from metaalign_rl.data.gold import labels
from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.runtime.actor_calls import merge_streams
from metaalign_rl.runtime.actor_options import actor_options
from metaalign_rl.runtime.progress import ProgressBar
from metaalign_rl.runtime.rendezvous import rendezvous
from metaalign_rl.trainers.callbacks import save_on_interrupt, trainer_actor
from metaalign_rl.trainers.reward import RewardTrainerActor
from reward.training.config import CommonTraining, RewardTraining
from reward.training.controls import modes_of

MODEL = "whole"  # the name of the reward model among its controls: it sees the complete row
Trainers = dict[str, list[ray.actor.ActorHandle]]  # by model, the actors of its ranks


def run(context: RunContext) -> None:
    """Train `reward/` and the controls, and write `reward_evaluation.json`. With `reward.path`, only evaluate it."""
    folder, given = context.folder, context.config.reward.path
    outputs = {MODEL: Path(given).absolute() if given else folder.reward}
    if not given:
        outputs |= {name: folder.controls / name for name in context.config.reward.controls}
        if context.config.reward.on_policy_prompts and not folder.rows("on_policy_pairs").is_file():
            _write_on_policy_rows(context)
    is_evaluated = folder.rows("held_out_pairs").is_file()
    reports: dict[str, Any] = {}
    for models in _in_turns(context, outputs):
        untrained = {} if given else {name: path for name, path in models.items() if not path.is_dir()}
        trainers = _start_trainers(context, models, context.config.reward.devices if untrained else 1)
        if untrained:
            _train(context, trainers, untrained)
        if is_evaluated:
            reports |= _evaluate(context, trainers, models)
        for rank in chain(*trainers.values()):
            ray.kill(rank)
    if is_evaluated:
        require_mode(context.config.reward.mode, reports[MODEL])
        write_json(folder.reward_evaluation, reports)
    else:
        print("reward: the data has no held-out pairs, so the reward model is not evaluated")


def require_mode(mode: str, reports: Collection[str]) -> None:
    """Check that the reward model can be read in `reward.mode`, which PPO would find out much later.

    Args:
        reports: the modes in which the reward model was evaluated.

    Raises:
        UserError: it had no training data for a label that the mode reads.
    """
    if mode not in reports:
        raise UserError(
            f"reward.mode: expected one of {', '.join(reports)}, whose labels the reward model was trained on, "
            f"found {mode!r}"
        )


def _in_turns(context: RunContext, outputs: dict[str, Path]) -> list[dict[str, Path]]:
    """The models that train at the same time: all of them on one device each, or one model on several devices."""
    return [outputs] if context.config.reward.devices == 1 else [{name: path} for name, path in outputs.items()]


# Rows from the SFT policy's responses.


def _write_on_policy_rows(context: RunContext) -> None:
    rows = on_policy_rows(context)
    if rows:
        write_jsonl(context.folder.rows("on_policy_pairs"), (row.to_json() for row in rows))
        print(f"reward: {sum(row.chosen is not None for row in rows):,} pairs from the SFT policy's responses")
    else:
        print("reward: no prompt has a check of its governing tier, so the SFT policy's responses are not used")


def on_policy_rows(context: RunContext) -> list[Row]:
    """Responses of the SFT policy to training prompts, labelled by the rows' checks.

    A prompt with good and bad responses becomes pairs. A prompt with only good or only bad ones becomes labelled
    responses. A prompt without a check of its governing tier is left out.
    """
    settings, config = context.config.reward, context.config
    rng = random.Random(f"on policy {config.run.seed}")
    source = context.rows("prompts") if context.folder.rows("prompts").is_file() else []
    prompts = [row for row in source if row.tier in row.checks]
    if not prompts:
        return []
    prompts = rng.sample(prompts, min(settings.on_policy_prompts, len(prompts)))
    repeated = [row for row in prompts for _ in range(settings.on_policy_samples)]
    answers = context.answer(context.start_policy(), repeated, config.rollout.sampling)
    by_row = groupby(zip(repeated, answers, strict=True), key=lambda item: item[0].id)
    grouped = ([text for _, text in group] for _, group in by_row)
    return [labelled for row, texts in zip(prompts, grouped, strict=True) for labelled in label_answers(row, texts)]


def label_answers(row: Row, answers: Sequence[str]) -> Iterator[Row]:
    """Pairs of a good and a bad response, one per different bad one; or else single labelled responses."""
    found = {text: labels(row, text) for text in dict.fromkeys(map(str.strip, answers))}  # the template strips them
    good = [text for text in found if found[text]["overall"]]
    bad = [text for text in found if not found[text]["overall"]]
    if not (good and bad):
        for index, text in enumerate(found):
            yield replace(row, id=f"{row.id}-{index}", response=text, labels={"response": found[text]})
        return
    for index, (chosen, rejected) in enumerate(zip(cycle(good), bad)):
        pair = {"chosen": found[chosen], "rejected": found[rejected]}
        yield replace(row, id=f"{row.id}-{index}", chosen=chosen, rejected=rejected, labels=pair)


# Training.


def _start_trainers(context: RunContext, names: Collection[str], ranks: int) -> Trainers:
    """Start an actor per model and rank, each with its share of the CPUs."""
    actor, count = trainer_actor(RewardTrainerActor), len(names) * ranks
    options = [actor_options(context.config, "training", count, index) for index in range(count)]
    meeting = rendezvous(context.config) if ranks > 1 else ""
    return {
        name: [actor.options(**options.pop(0)).remote(name, rank, ranks, meeting) for rank in range(ranks)]
        for name in names
    }


def _train(context: RunContext, trainers: Trainers, outputs: dict[str, Path]) -> None:
    """Train the models at the same time and write them to `outputs`."""
    config, folder = context.config, context.folder
    files = [path for path in (folder.rows("pairs"), folder.rows("on_policy_pairs")) if path.is_file()]
    if outputs and not files:
        raise UserError(f"{folder.data}: no pairs to train a reward model on; give reward.path, or data with pairs")
    ranks = [(rank, output) for name, output in outputs.items() for rank in trainers[name]]
    streams = [
        rank.train.options(num_returns="streaming").remote(
            training_settings(config), files, context.start_policy(), output, config.reward.zero_stage
        )
        for rank, output in ranks
    ]
    with ProgressBar("reward") as bar, save_on_interrupt([rank for rank, _ in ranks], streams):
        for place, update in merge_streams(streams):
            if place == 0:
                bar(update)


def training_settings(config: Config) -> RewardTraining:
    """The training settings: those of the `reward` section, and three that other sections determine."""
    common = {field.name: getattr(config.reward, field.name) for field in fields(CommonTraining)}
    bf16 = config.model.dtype == "bfloat16"
    return RewardTraining(**common, max_tokens=config.model.max_tokens, bf16=bf16, seed=config.run.seed)


# Evaluation.


def _evaluate(context: RunContext, trainers: Trainers, outputs: dict[str, Path]) -> dict[str, Any]:
    """Reports by mode. The reward model is evaluated on all held-out pairs, a blind control on those pairs that show
    what it cannot know."""
    pairs, dtype = context.rows("held_out_pairs"), context.config.model.dtype
    of_control = {
        "preference_blind": one_way(pairs, context.config.run.seed),
        "tier_blind": [row for row in pairs if row.tags.get("flip_kind") == "tier"],
    }
    rows = {name: of_control.get(name, pairs) for name in outputs}
    for name in rows:
        if not rows[name]:
            print(f"reward: no held-out pair shows what the {name.replace('_', '-')} control cannot know")
    reports = {
        name: trainers[name][0].evaluate.remote(path, rows[name], modes_of(name), dtype)
        for name, path in outputs.items()
        if rows[name]
    }
    return dict(zip(reports, ray.get(list(reports.values())), strict=True))


def one_way(pairs: Sequence[Row], seed: int) -> list[Row]:
    """One row of each flip, chosen at random: of both rows, a model that reads no preference gets exactly one right."""
    rng = random.Random(f"one way {seed}")
    flips: dict[str, list[Row]] = {}
    for row in pairs:
        flips.setdefault(row.tags.get("flip", row.id), []).append(row)
    return [rng.choice(rows) for rows in flips.values()]
