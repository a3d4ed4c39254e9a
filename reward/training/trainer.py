"""transformers' Trainer for the reward model, and its arguments."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError
from reward.inference.exactness import longrope_threshold
from reward.model import head
from reward.training.config import RewardTraining
from reward.training.examples import Example, RewardBatch, collate, collate_separate, collate_shared
from reward.training.losses import preference_loss, target_counts, token_loss
from reward.training.shared_lines import supports_shared_lines

logger = logging.getLogger(__name__)


class RewardTrainer(Trainer):
    """transformers' Trainer with the reward model's losses and its order of rows.

    The losses of an update are means over all of its labels, no matter how they are spread over passes and devices.
    """

    def __init__(
        self,
        config: RewardTraining,
        arguments: TrainingArguments,
        model: PreTrainedModel,
        trained: nn.Module,
        examples: list[Example],
        sampler: Sampler[int],
        eval_examples: list[Example] | None,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        """Prepare the training of `examples` in the order of `sampler`. Its index -1 is an example without labels.

        Args:
            model: the plain model.
            trained: the module to train: `model`, or `model` wrapped with adapters.
        """
        pad_token = model.config.get_text_config().pad_token_id
        layout = partial(_layout(config, model), pad_token=pad_token, trained_labels=config.trained_labels)
        super().__init__(
            model=trained,
            args=arguments,
            data_collator=layout,
            train_dataset=[*examples, _unlabelled(examples)],
            eval_dataset=eval_examples,
            callbacks=list(callbacks),
        )
        self.model_accepts_loss_kwargs = False  # makes the Trainer average the loss over an update's passes
        self.remove_callback(PrinterCallback)  # it prints to standard output, which belongs to the command line
        self.add_callback(_LogLines)
        self.examples = examples
        self._config = config
        self._plain = model
        self._sampler = sampler
        self._metrics: list[dict[str, Tensor]] = []

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[RewardBatch], Tensor]:
        """One update's batches on this device, and the `counts` of `preference_loss` for each of them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = torch.stack([target_counts(batch) for batch in batches]).mean(0).to(device)
        return batches, self.accelerator.reduce(counts, "mean")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: RewardBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of one batch; see `Trainer`. `num_items_in_batch`: the counts from `get_batch_samples`."""
        names = ("input_ids", "attention_mask", "position_ids")
        tokens: dict[str, Tensor] = {name: inputs[name] for name in names if name in inputs}
        counts = num_items_in_batch
        if self._config.token_weight > 0:
            scores = self._in_groups(tokens, lambda part: self._token_scores(model, part))
            logits = scores.flatten(0, 1)[inputs["last_token"]]
            loss, metrics = preference_loss(logits, inputs, self._config, counts)
            per_token = token_loss(scores[inputs["text_of_token"] >= 0], inputs, self._config, counts)
            loss = loss + self._config.token_weight * per_token
        else:
            logits = self._in_groups(tokens, lambda part: model(**part).logits.float())
            loss, metrics = preference_loss(logits, inputs, self._config, counts)
        if model.training:
            self._metrics.append(metrics)
        return (loss, {"logits": logits}) if return_outputs else loss

    def _token_scores(self, model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
        """The scores at all tokens, [lines, tokens, 4]."""
        with _outputs_of(head(self._plain)) as outputs:
            model(**tokens)
        return outputs[0].float()

    def _in_groups(self, tokens: dict[str, Tensor], run: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Run a batch; with longrope, its short and its long texts apart. See `longrope_threshold`."""
        threshold = longrope_threshold(self._plain.config.get_text_config())
        width = tokens["input_ids"].shape[1]
        if threshold is None or width <= threshold:
            return run(tokens)
        is_long = tokens["attention_mask"].sum(1) > threshold
        found, order = [], []
        for rows, end in ((is_long.nonzero()[:, 0], width), ((~is_long).nonzero()[:, 0], threshold)):
            if len(rows):
                scores = run({name: tensor[rows, :end] for name, tensor in tokens.items()})
                tokens_missing = width - end if scores.dim() == 3 else 0
                found.append(pad(scores, (0, 0, 0, tokens_missing)) if tokens_missing else scores)
                order.append(rows)
        return torch.cat(found)[torch.cat(order).argsort()]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean metrics since the last log; see `Trainer`."""
        if "loss" in logs and self._metrics:
            names = list(self._metrics[0])
            means = torch.stack([torch.stack([m[name] for name in names]) for m in self._metrics]).mean(0)
            logs |= dict(zip(names, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            self._metrics.clear()
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return self._sampler

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The Trainer's state is written next and marks the checkpoint as complete, so all ranks must be done.
        self.accelerator.wait_for_everyone()


def training_arguments(
    config: RewardTraining, folder: Path, *, evaluates: bool, deepspeed: dict[str, Any] | None
) -> TrainingArguments:
    """The Trainer's arguments. They include this process's rank and the world size.

    Args:
        folder: for the checkpoints.
        evaluates: whether there are rows to evaluate after each epoch.
        deepspeed: DeepSpeed's settings.

    Raises:
        UserError: `config.batch_size` does not divide by passes times devices, or this process sees several GPUs.
    """
    devices = int(os.environ["WORLD_SIZE"]) if "LOCAL_RANK" in os.environ else 1  # the Trainer reads the same variables
    divisor = config.gradient_accumulation * devices
    if config.batch_size % divisor:
        raise UserError(
            f"batch_size: expected a multiple of {divisor}, for {config.gradient_accumulation} passes on {devices} "
            f"devices, found {config.batch_size}"
        )
    arguments = TrainingArguments(
        output_dir=str(folder),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_ratio,  # the Trainer reads a number below 1 as a share
        weight_decay=config.weight_decay,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // divisor,
        per_device_eval_batch_size=config.batch_size // divisor,
        gradient_accumulation_steps=config.gradient_accumulation,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # the reentrant kind needs inputs with gradients
        bf16=config.bf16 and deepspeed is None,  # DeepSpeed's settings have their own
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
    if arguments.n_gpu > 1:  # the Trainer would take `n_gpu` times as many rows per batch and split them over the GPUs
        raise UserError(
            f"expected one GPU per process, found {arguments.n_gpu}; choose one with CUDA_VISIBLE_DEVICES=0, or start "
            "one process per GPU with torchrun"
        )
    return arguments


def _layout(config: RewardTraining, model: PreTrainedModel) -> Callable[..., RewardBatch]:
    """How examples become a batch: with token losses, the answers of a pair share a line if that changes nothing."""
    if config.token_weight == 0:
        return collate
    return collate_shared if supports_shared_lines(model) else collate_separate


@contextmanager
def _outputs_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collect a layer's outputs. A decoder's head scores every token, but its model returns only the last token's."""
    outputs: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        hook.remove()


def _unlabelled(examples: Sequence[Example]) -> Example:
    """The shortest text without labels: it fills batches and trains nothing."""
    shortest = min((text for example in examples for text in example.texts), key=len)
    return Example((shortest,), ((nan,) * len(LABELS),), False, (0,) * len(LABELS))


class _LogLines(TrainerCallback):
    """Writes the Trainer's logs through Python's logging."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            metrics = "  ".join(f"{name} {value:.4g}" for name, value in kwargs["logs"].items())
            logger.info("step %d/%d  %s", state.global_step, state.max_steps, metrics)
