"""Training of the reward model: rows in, a calibrated checkpoint out."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from json import dumps
from pathlib import Path
from shutil import rmtree
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainingArguments, set_seed

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import replace_folder, write_json
from reward.checkpoint_record import CheckpointRecord
from reward.model import build, require_empty, save, scores_every_token
from reward.scorer import Scorer
from reward.training.checkpoint_folder import claim_checkpoint_folder
from reward.training.config import RewardTraining
from reward.training.examples import labels_with_data, make_examples
from reward.training.flip_sampler import make_sampler
from reward.training.lora import add_lora, merge_lora
from reward.training.temperatures import calibrate, hold_out
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

    A killed training resumes from its newest checkpoint in `OUTPUT.checkpoints`, which is removed at the end. To train
    on several devices, every process of a torch process group calls this with the same arguments. The first writes.

    Args:
        rows: pairs (`chosen` and `rejected`), labelled answers (`response` and `labels`) or both.
            `config.calibration_share` of the labelled rows set the temperatures. Their prompts are not trained on.
        eval_rows: rows whose loss is logged after each epoch.
        base: the checkpoint to start from, such as the SFT model's.
        output: the folder to write; it must be new or empty.
        callbacks: callbacks of transformers' Trainer, for example to report progress.
        deepspeed: DeepSpeed's settings, up to ZeRO stage 2, with the type to compute in; `config.bf16` is then ignored.
            Default: several processes train with torch's distributed data parallel.

    Returns:
        `steps`, `seconds` (with tokenising, without loading), the mean `loss`, `temperature` by label,
        `trained_labels` (those that had training data), `calibrated_labels` (those whose temperature was fitted), and
        `log`, the metrics by step. `OUTPUT/training.json` holds these and `base` and `config`.

    Raises:
        UserError: a row, the base or the output is wrong, or another training owns `OUTPUT.checkpoints`.
    """
    output = Path(output)
    require_empty(output)
    folder = output.with_name(f"{output.name}.checkpoints")
    arguments = training_arguments(config, folder, evaluates=bool(eval_rows), deepspeed=deepspeed)
    with arguments.main_process_first(local=False):
        checkpoint = claim_checkpoint_folder(folder, _identity(config, rows, base, arguments.world_size, deepspeed))
    scorer = _build_scorer(config, base)
    began = time.monotonic()
    kept, held_out = hold_out(rows, config)
    trained = add_lora(scorer.model, config.lora_rank, config.lora_alpha) if config.lora_rank else scorer.model
    trainer = _make_trainer(config, arguments, scorer, trained, kept, eval_rows, callbacks)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    if config.lora_rank:
        merge_lora(trained)
    labels = _calibrate(config, scorer, held_out, labels_with_data(trainer.examples, config))
    result = {
        "steps": outcome.global_step,
        "seconds": time.monotonic() - began,
        "loss": outcome.training_loss,
        **labels,
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        _write(output, scorer, {"base": str(base), "config": asdict(config), **result})
        rmtree(folder)
    trainer.accelerator.wait_for_everyone()
    return result


def _identity(
    config: RewardTraining, rows: Sequence[Row], base: str | Path, world_size: int, deepspeed: dict[str, Any] | None
) -> dict[str, Any]:
    """The settings and data that must be the same when a killed training resumes."""
    digest = sha256(dumps([row.to_json() for row in rows], sort_keys=True).encode()).hexdigest()
    devices = {"number": world_size, "deepspeed": deepspeed}
    return {"base": str(base), "config": asdict(config), "rows": digest, "devices": devices}


def _build_scorer(config: RewardTraining, base: str | Path) -> Scorer:
    """The model to train, with a new random head."""
    set_seed(config.seed)
    model, tokenizer = build(base)
    if config.token_weight > 0 and not scores_every_token(model):
        raise UserError(
            f"token_weight: expected 0, found {config.token_weight}: {base} is not a decoder and has one score per text"
        )
    return Scorer(model, tokenizer, config.max_tokens)


def _make_trainer(
    config: RewardTraining,
    arguments: TrainingArguments,
    scorer: Scorer,
    trained: nn.Module,
    rows: Sequence[Row],
    eval_rows: Sequence[Row] | None,
    callbacks: Sequence[TrainerCallback],
) -> RewardTrainer:
    """Tokenise the rows and prepare the Trainer."""
    examples = make_examples(rows, scorer.tokenizer, config.max_tokens)
    eval_examples = make_examples(eval_rows, scorer.tokenizer, config.max_tokens) if eval_rows else None
    sampler = make_sampler(rows, examples, config, arguments.world_size)
    return RewardTrainer(config, arguments, scorer.model, trained, examples, sampler, eval_examples, callbacks)


def _calibrate(
    config: RewardTraining, scorer: Scorer, held_out: Sequence[Row], trained_labels: tuple[str, ...]
) -> dict[str, Any]:
    """Fit the temperatures. Record in the model's config and return what is known of each label."""
    calibration = calibrate(scorer, held_out, trained_labels)
    CheckpointRecord(config.max_tokens, trained_labels, calibration.calibrated).write(scorer.model.config)
    return {
        "temperature": calibration.temperature,
        "trained_labels": list(trained_labels),
        "calibrated_labels": list(calibration.calibrated),
    }


def _write(output: Path, scorer: Scorer, record: dict[str, Any]) -> None:
    def fill(folder: Path) -> None:
        save(scorer.model, scorer.tokenizer, folder)
        write_json(folder / "training.json", record)

    replace_folder(output, fill)
