"""Training the reward model with transformers' Trainer."""

import logging
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from hashlib import sha256
from itertools import islice
from json import dumps
from pathlib import Path
from random import Random
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from torch.utils.data import Sampler
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from metaalign_rl.errors import UserError
from metaalign_rl.files import read_json, replace_folder, write_json
from metaalign_rl.schema import LABELS, Row
from reward import model as checkpoints
from reward.calibration import fit_temperature
from reward.config import RewardTraining
from reward.data import Example, collate, collate_shared, labelled_answers, make_examples
from reward.scorer import Scorer

logger = logging.getLogger(__name__)

SORTED_BATCHES = 12  # how many batches are sorted by length together


def train(
    config: RewardTraining,
    rows: Sequence[Row],
    eval_rows: Sequence[Row] | None,
    base: str | Path,
    output: str | Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a reward model on pairs and labelled answers, calibrate it and write it to `output`.

    A killed training goes on from its last checkpoint, in `OUTPUT.checkpoints`, which is removed at the end.

    Args:
        rows: pairs (`chosen` and `rejected`), labelled answers (`response` and `labels`) or both; a share of
            the labelled ones is kept from training and sets the temperatures.
        eval_rows: rows whose loss is logged after each epoch.
        base: the checkpoint to start from, such as the SFT model's.
        output: the folder to write, which must not hold anything yet.
        callbacks: transformers' callbacks, for instance to report progress.

    Returns:
        What `OUTPUT/training.json` holds: `steps`, `seconds` (with tokenising, without loading), the mean
        `loss`, `temperature` by label, and `log`, a list of figures by step.

    Raises:
        UserError: a bad row, base or output, or checkpoints of a training with other settings or rows.
    """
    output = Path(output)
    checkpoints.check_fresh(output)
    folder = output.with_name(f"{output.name}.checkpoints")
    resume = _claim(folder, {"base": str(base), "config": asdict(config), "rows": _digest(rows)})
    set_seed(config.seed)  # a new head is drawn at random
    model, tokenizer = checkpoints.build(base)
    scorer = Scorer(model, tokenizer, config.max_tokens)

    began = time.monotonic()
    kept, held_out = _hold_out(rows, config)
    examples = make_examples(kept, tokenizer, config.max_tokens)
    eval_examples = make_examples(eval_rows, tokenizer, config.max_tokens) if eval_rows else None
    groups = [row.tags.get("flip", row.id) for row in kept]
    first = _right_or_wrong(examples, int(config.right_first * len(kept)))
    order = FlipsTogether([e.length for e in examples], groups, config.batch_size, config.seed, first)
    trainer = RewardTrainer(config, model, examples, order, eval_examples, folder, callbacks)
    outcome = trainer.train(resume_from_checkpoint=resume)
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

    replace_folder(output, fill)
    rmtree(folder)
    return result


def preference_loss(
    logits: Tensor, batch: dict[str, Tensor], config: RewardTraining
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bradley-Terry, -log sigmoid(better - worse), plus binary cross-entropy: means over the known labels.

    Args:
        logits: [texts, 4].
        batch: what `reward.data.collate` makes.

    Returns:
        The weighted sum, and detached figures: `bt`, `bce` and `accuracy`, the share of pairs that `overall`
        ranks as the data do. A part without any label is 0.
    """
    margin = logits[batch["chosen"]] - logits[batch["rejected"]]
    ranked, known = batch["ranked"], ~batch["labels"].isnan()
    bt = _mean(-logsigmoid(ranked * margin), ranked != 0)
    bce = _mean(binary_cross_entropy_with_logits(logits, batch["labels"].nan_to_num(), reduction="none"), known)
    accuracy = (margin[:, LABELS.index("overall")] > 0).float().sum() / max(len(margin), 1)
    figures = {"bt": bt.detach(), "bce": bce.detach(), "accuracy": accuracy}
    return config.bt_weight * bt + config.bce_weight * bce, figures


def token_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Binary cross-entropy of an answer's labels at each of its judged tokens, a mean over labels and tokens.

    What an answer is worth shows at the token that decides it, long before the last one; a verifier learns faster when
    it is asked there too (Cobbe et al. 2021, arXiv:2110.14168, section 4.2).

    Args:
        logits: [judged tokens, 4].
    """
    labels = batch["labels"][batch["judged"][batch["judged"] >= 0]]
    losses = binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
    return _mean(losses, ~labels.isnan())


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


class RewardTrainer(Trainer):
    """transformers' Trainer with the preference loss, batches of like lengths and flips kept together."""

    def __init__(
        self,
        config: RewardTraining,
        model: PreTrainedModel,
        examples: list[Example],
        order: Sampler[int],
        eval_examples: list[Example] | None,
        folder: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        pad_token = model.config.get_text_config().pad_token_id
        super().__init__(
            model=model,
            args=_arguments(config, folder, evaluates=eval_examples is not None),
            data_collator=partial(
                collate_shared if config.token_weight > 0 else collate,
                pad_token=pad_token,
                trained=config.trained_labels,
            ),
            train_dataset=examples,
            eval_dataset=eval_examples,
            callbacks=list(callbacks),
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean: the Trainer averages it over an update's passes
        self.remove_callback(PrinterCallback)  # prints to standard output, which is the command line's
        self.add_callback(_LogLines)
        self._config = config
        self._order = order
        self._figures: list[dict[str, Tensor]] = []

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        if self._config.token_weight > 0:
            hidden, head = model.base_model(**tokens).last_hidden_state, checkpoints.head(model)
            logits = head(hidden.flatten(0, 1)[inputs["last"]]).float()
            loss, figures = preference_loss(logits, inputs, self._config)
            per_token = head(hidden[inputs["judged"] >= 0]).float()
            loss = loss + self._config.token_weight * token_loss(per_token, inputs)
        else:
            logits = model(**tokens).logits.float()
            loss, figures = preference_loss(logits, inputs, self._config)
        if model.training:
            self._figures.append(figures)
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._figures:
            logs |= {name: torch.stack([f[name] for f in self._figures]).mean().item() for name in self._figures[0]}
            self._figures.clear()
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order


class FlipsTogether(Sampler[int]):
    """All indices in random order, near those of like length, and the rows of a flip side by side.

    A flip's two rows hold the same answers with opposite labels. In one batch, what a model could learn from the
    answers alone cancels out, and what is left is the preference. A batch's end may still part some flips.
    An epoch's order depends on seed and epoch alone: a resumed training goes on with the rows that are left.

    Args:
        groups: of each row, the name of its flip, or one of its own.
        first: rows that come before all others, to within a window of batches.
    """

    def __init__(
        self, lengths: Sequence[int], groups: Sequence[str], batch_size: int, seed: int, first: Sequence[int] = ()
    ) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0
        self._first = frozenset(first)
        by_group: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            by_group.setdefault(group, []).append(index)
        self._groups = list(by_group.values())

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        rng = Random(f"{self._seed} {self._epoch}")
        groups = rng.sample(self._groups, len(self._groups))
        groups.sort(key=lambda group: group[0] not in self._first)
        window = SORTED_BATCHES * self._batch_size
        for start in range(0, len(groups), window):
            near = sorted(groups[start : start + window], key=lambda group: -self._lengths[group[0]])
            rows = [index for group in near for index in group]
            batches = [rows[at : at + self._batch_size] for at in range(0, len(rows), self._batch_size)]
            yield from (index for batch in rng.sample(batches, len(batches)) for index in batch)


class _LogLines(TrainerCallback):
    """The log's figures through Python's logging."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in kwargs["logs"].items())
        logger.info("step %d/%d  %s", state.global_step, state.max_steps, figures)


def _arguments(config: RewardTraining, folder: Path, *, evaluates: bool) -> TrainingArguments:
    passes = config.batch_size // config.gradient_accumulation
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_ratio,  # a number below 1 is a share
        weight_decay=config.weight_decay,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=passes,
        per_device_eval_batch_size=passes,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.bf16,
        logging_steps=config.log_steps,
        save_steps=config.checkpoint_steps,
        save_total_limit=2,
        eval_strategy="epoch" if evaluates else "no",
        prediction_loss_only=True,
        seed=config.seed,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
        report_to="none",
    )


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of the values that the mask keeps; 0 where it keeps none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def _hold_out(rows: Sequence[Row], config: RewardTraining) -> tuple[list[Row], list[Row]]:
    """Rows to train on and labelled rows to calibrate on; the rows of a flip stay together."""

    def is_held_out(row: Row) -> bool:
        key = row.tags.get("flip", row.id)
        return bool(row.labels) and Random(f"{config.seed} {key}").random() < config.calibration_share

    kept = [row for row in rows if not is_held_out(row)]
    if not kept:
        raise UserError("no rows to train on; give more, or a smaller calibration_share")
    return kept, [row for row in rows if is_held_out(row)]


def _right_or_wrong(examples: Sequence[Example], count: int) -> list[int]:
    """The first `count` pairs of a right and a wrong answer: `dialog` tells them apart."""
    ranks = (example.ranked[LABELS.index("dialog")] for example in examples)
    return list(islice((index for index, rank in enumerate(ranks) if rank == 1), count))


def _digest(rows: Sequence[Row]) -> str:
    return sha256(dumps([row.to_json() for row in rows], sort_keys=True).encode()).hexdigest()


def _claim(folder: Path, identity: dict[str, Any]) -> str | None:
    """Make the folder of checkpoints this training's own; the checkpoint to go on from, if there is one."""
    path = folder / "identity.json"
    # The Trainer writes its state last: a checkpoint without it was cut short.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    if whole:
        other = [name for name, value in read_json(path).items() if identity[name] != value]
        if other:
            raise UserError(
                f"{folder}: checkpoints of a training with another {' and '.join(other)}; "
                "remove the folder to start anew, or give what it began with"
            )
    else:
        write_json(path, identity)
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None
