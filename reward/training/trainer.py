"""transformers' Trainer for the reward model."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError
from reward import model as checkpoints
from reward.examples import Example, collate, collate_shared
from reward.training.config import RewardTraining
from reward.training.losses import Batch, count, preference_loss, token_loss

logger = logging.getLogger(__name__)


class RewardTrainer(Trainer):
    """transformers' Trainer with the preference loss, batches of like lengths and flips kept together.

    An update's losses are means over all its labels, however they are spread over passes and devices.
    """

    def __init__(
        self,
        config: RewardTraining,
        arguments: TrainingArguments,
        model: PreTrainedModel,
        trained: nn.Module,
        examples: list[Example],
        order: Sampler[int],
        eval_examples: list[Example] | None,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        """Prepare a training of `examples` in `order`, whose index -1 takes an example without labels.

        Args:
            model: the plain model.
            trained: what is trained of it: itself, or what wraps it with adapters.
        """
        pad_token = model.config.get_text_config().pad_token_id
        super().__init__(
            model=trained,
            args=arguments,
            data_collator=partial(
                collate_shared if config.token_weight > 0 else collate,
                pad_token=pad_token,
                trained=config.trained_labels,
            ),
            train_dataset=[*examples, _unlabelled(examples)],
            eval_dataset=eval_examples,
            callbacks=list(callbacks),
        )
        self.model_accepts_loss_kwargs = False  # the Trainer averages the loss over an update's passes
        self.remove_callback(PrinterCallback)  # prints to standard output, which is the command line's
        self.add_callback(_LogLines)
        self._config = config
        self._plain = model
        self._order = order
        self._figures: list[Batch] = []

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], Tensor]:
        """An update's passes on this device, and what each divides its sums by; see `preference_loss`."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.stack([count(batch) for batch in batches]).mean(0).to(device)
        return batches, self.accelerator.reduce(counts, "mean")

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        counts = num_items_in_batch
        if self._config.token_weight > 0:
            with _outputs_of(checkpoints.head(self._plain)) as seen:
                model(**tokens)
            scores = seen[0].float()
            logits = scores.flatten(0, 1)[inputs["last"]]
            loss, figures = preference_loss(logits, inputs, self._config, counts)
            per_token = token_loss(scores[inputs["judged"] >= 0], inputs, self._config, counts)
            loss = loss + self._config.token_weight * per_token
        else:
            logits = model(**tokens).logits.float()
            loss, figures = preference_loss(logits, inputs, self._config, counts)
        if model.training:
            self._figures.append(figures)
        return (loss, {"logits": logits}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._figures:
            names = list(self._figures[0])
            means = torch.stack([torch.stack([f[name] for name in names]) for f in self._figures]).mean(0)
            logs |= dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            self._figures.clear()
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._order

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state comes next, and says that the checkpoint is whole


def training_arguments(
    config: RewardTraining, folder: Path, *, evaluates: bool, deepspeed: dict[str, Any] | None
) -> TrainingArguments:
    """The Trainer's settings, which know this process's rank among those that train together.

    Raises:
        UserError: an update's rows do not divide among their passes.
    """
    devices = int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1  # as the Trainer reads it
    parts = config.gradient_accumulation * devices
    if config.batch_size % parts:
        raise UserError(
            f"batch_size: {config.batch_size} rows do not divide into {config.gradient_accumulation} passes "
            f"on {devices} devices; choose a multiple of {parts}"
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_ratio,  # a number below 1 is a share
        weight_decay=config.weight_decay,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // parts,
        per_device_eval_batch_size=config.batch_size // parts,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # the other kind wants inputs that train
        bf16=config.bf16 and deepspeed is None,  # DeepSpeed's settings say it themselves
        deepspeed=deepspeed,
        label_names=["labels"],
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
    if arguments.n_gpu > 1:  # the Trainer would split each batch over them, and take more rows than were asked for
        raise UserError(
            f"{arguments.n_gpu} GPUs are visible to one process: name one, CUDA_VISIBLE_DEVICES=0, or start a process "
            "for each with torchrun"
        )
    return arguments


@contextmanager
def _outputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What a layer computes meanwhile: a decoder's head sees every token, of which its model shows the last alone."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


def _unlabelled(examples: Sequence[Example]) -> Example:
    """The shortest text without labels: it fills batches and trains nothing."""
    shortest = min((text for example in examples for text in example.texts), key=len)
    return Example((shortest,), ((nan,) * len(LABELS),), False, (0,) * len(LABELS))


class _LogLines(TrainerCallback):
    """The log's figures through Python's logging."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in kwargs["logs"].items())
            logger.info("step %d/%d  %s", state.global_step, state.max_steps, figures)
