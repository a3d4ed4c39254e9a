"""Training the reward model: rows in, a calibrated checkpoint out."""

import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from hashlib import sha256
from json import dumps
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import replace_folder, write_json
from reward import model as checkpoints
from reward.evaluation.calibration import fit_temperature
from reward.examples import labelled_answers, make_examples
from reward.scorer import Scorer
from reward.training.adapters import add_lora, merge_lora
from reward.training.config import RewardTraining
from reward.training.order import make_order
from reward.training.resume import claim
from reward.training.trainer import RewardTrainer, training_arguments


def train(
    config: RewardTraining,
    rows: Sequence[Row],
    eval_rows: Sequence[Row] | None,
    base: str | Path,
    output: str | Path,
    callbacks: Sequence[TrainerCallback] = (),
    deepspeed: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a reward model on pairs and labelled answers, calibrate it and write it to `output`.

    A killed training goes on from its last checkpoint, in `OUTPUT.checkpoints`, which is removed at the end.

    Several processes that have joined one process group of torch's train together, each on a device of its own: all of
    them call this with the same arguments, and the first one writes.

    Args:
        rows: pairs (`chosen` and `rejected`), labelled answers (`response` and `labels`) or both; a share of
            the labelled ones is kept from training and sets the temperatures.
        eval_rows: rows whose loss is logged after each epoch.
        base: the checkpoint to start from, such as the SFT model's.
        output: the folder to write, which must not hold anything yet.
        callbacks: transformers' callbacks, for instance to report progress.
        deepspeed: DeepSpeed's settings, ZeRO up to stage 2; the type it computes in is among them, `config.bf16`
            is not looked at. Without them processes train as torch's distributed data parallel.

    Returns:
        What `OUTPUT/training.json` holds: `steps`, `seconds` (with tokenising, without loading), the mean
        `loss`, `temperature` by label, and `log`, a list of figures by step.

    Raises:
        UserError: a bad row, base or output, or checkpoints of a training with other settings or rows.
    """
    output = Path(output)
    checkpoints.check_fresh(output)
    folder = output.with_name(f"{output.name}.checkpoints")
    arguments = training_arguments(config, folder, evaluates=bool(eval_rows), deepspeed=deepspeed)
    devices = {"number": arguments.world_size, "deepspeed": deepspeed}
    identity = {"base": str(base), "config": asdict(config), "rows": _digest(rows), "devices": devices}
    with arguments.main_process_first(local=False):
        resume = claim(folder, identity)
    set_seed(config.seed)  # a new head is drawn at random
    model, tokenizer = checkpoints.build(base)
    if config.token_weight > 0 and not checkpoints.scores_every_token(model):
        raise UserError(f"token_weight: {base} is no decoder, it has one score a text; set it to 0")
    scorer = Scorer(model, tokenizer, config.max_tokens)

    began = time.monotonic()
    kept, held_out = _hold_out(rows, config)
    examples = make_examples(kept, tokenizer, config.max_tokens)
    eval_examples = make_examples(eval_rows, tokenizer, config.max_tokens) if eval_rows else None
    order = make_order(kept, examples, config, arguments.world_size)
    trained = add_lora(model, config.lora_rank, config.lora_alpha) if config.lora_rank else model
    trainer = RewardTrainer(config, arguments, model, trained, examples, order, eval_examples, callbacks)
    outcome = trainer.train(resume_from_checkpoint=resume)
    if config.lora_rank:
        merge_lora(trained)
    temperature = calibrate(scorer, held_out, config.trained_labels)
    result = {
        "steps": outcome.global_step,
        "seconds": time.monotonic() - began,
        "loss": outcome.training_loss,
        "temperature": temperature,
        "log": trainer.state.log_history,
    }

    def fill(target: Path) -> None:
        checkpoints.save(model, tokenizer, target)
        write_json(target / "training.json", {"base": str(base), "config": asdict(config), **result})

    if trainer.is_world_process_zero():
        replace_folder(output, fill)
        rmtree(folder)
    trainer.accelerator.wait_for_everyone()
    return result


def calibrate(scorer: Scorer, rows: Sequence[Row], trained: Collection[str] = LABELS) -> dict[str, float]:
    """Fit a temperature for each trained label on the rows' labelled answers and fold them into the scorer's model.

    Another label, and one without answers of both kinds, keeps the temperature 1.
    """
    answers = [pair for row in rows for pair in labelled_answers(row)]
    scorer.model.eval()
    logits = scorer.logits([scorer.encode(row, f"row {row.id!r}") for row, _ in answers])
    temperatures = dict.fromkeys(LABELS, 1.0)
    for label in trained:
        index = LABELS.index(label)
        truths = torch.tensor([float(labels[label]) if label in labels else torch.nan for _, labels in answers])
        temperatures[label] = fit_temperature(logits[:, index], truths)
    checkpoints.fold_temperatures(scorer.model, temperatures)
    return temperatures


def _hold_out(rows: Sequence[Row], config: RewardTraining) -> tuple[list[Row], list[Row]]:
    """Rows to train on and labelled rows to calibrate on; the rows of a flip stay together."""

    def is_held_out(row: Row) -> bool:
        key = row.tags.get("flip", row.id)
        return bool(row.labels) and Random(f"{config.seed} {key}").random() < config.calibration_share

    kept = [row for row in rows if not is_held_out(row)]
    if not kept:
        raise UserError("no rows to train on; give more, or a smaller calibration_share")
    return kept, [row for row in rows if is_held_out(row)]


def _digest(rows: Sequence[Row]) -> str:
    return sha256(dumps([row.to_json() for row in rows], sort_keys=True).encode()).hexdigest()
