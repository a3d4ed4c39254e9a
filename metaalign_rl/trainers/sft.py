"""The SFT worker: one rank of transformers' Trainer on DeepSpeed."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaalign_rl.config.schema import ModelConfig, SFTConfig
from metaalign_rl.core.checkpoints import newest_trainer_checkpoint
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.files import replace_folder
from metaalign_rl.core.meta_prompt import encode_answer
from metaalign_rl.core.parallel import map_rows
from metaalign_rl.core.rows import read_rows
from metaalign_rl.runtime import deepspeed_config, deepspeed_setup
from metaalign_rl.runtime.progress import ProgressUpdate, in_thread, stream
from metaalign_rl.trainers import base_model
from metaalign_rl.trainers.callbacks import StopRequest, report_callback

IGNORED = -100  # label that torch's cross-entropy ignores


class SFTWorker:
    """One rank of SFT, in a separate process. Call `train` on all ranks with the same arguments."""

    def __init__(self, rank: int, world_size: int, rendezvous: str) -> None:
        """Join the other ranks; see `deepspeed_setup.prepare`."""
        self.rank, self.world_size = rank, world_size
        self.device = deepspeed_setup.prepare(rank, world_size, rendezvous)
        self._stop = StopRequest()

    def prepare_base(self, config: ModelConfig, rows: Path, seed: int, output: Path) -> None:
        """Write the checkpoint that training starts from. Call it on one rank only. See `base_model.prepare_base`."""
        in_thread(lambda: base_model.prepare_base(config, list(read_rows(rows)), seed, output))

    def stop(self) -> None:
        """Make `train` save after its current step and raise `TrainingStopped`."""
        self._stop.set()

    def train(
        self, config: SFTConfig, base: Path, rows: Path, output: Path, checkpoints: Path, *, max_tokens: int, seed: int
    ) -> Iterator[ProgressUpdate]:
        """Train the checkpoint `base` on the demonstrations in `rows` and write the model to `output`.

        Args:
            checkpoints: folder of checkpoints; training resumes from the newest one.
            max_tokens: limit for a row's prompt and response together.

        Raises:
            TrainingStopped: `stop` was called.
        """
        yield from stream(lambda report: self._train(config, base, rows, output, checkpoints, max_tokens, seed, report))

    def _train(
        self,
        config: SFTConfig,
        base: Path,
        rows: Path,
        output: Path,
        checkpoints: Path,
        max_tokens: int,
        seed: int,
        report: Callable[[ProgressUpdate], None],
    ) -> None:
        from transformers import Trainer

        from metaalign_rl.core.tokenizers import load_tokenizer

        tokenizer = load_tokenizer(base)
        samples = map_rows(partial(tokenize, tokenizer=tokenizer, max_tokens=max_tokens), read_rows(rows))
        model = load_model(base)
        trainer = Trainer(
            model=model,
            args=self._arguments(config, checkpoints, seed),
            train_dataset=samples,
            data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
            callbacks=[report_callback(report), self._stop.callback()],
        )
        last = newest_trainer_checkpoint(checkpoints)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if self.rank == 0:
            replace_folder(output, lambda folder: _save(trainer, tokenizer, folder))

    def _arguments(self, config: SFTConfig, checkpoints: Path, seed: int) -> Any:
        from transformers import TrainingArguments

        cuda = self.device.type == "cuda"
        return TrainingArguments(
            output_dir=str(checkpoints),
            per_device_train_batch_size=config.batch_size // (self.world_size * config.gradient_accumulation),
            gradient_accumulation_steps=config.gradient_accumulation,
            gradient_checkpointing=config.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},  # the reentrant kind needs inputs with gradients
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            num_train_epochs=config.epochs,
            warmup_steps=config.warmup_ratio,  # a value below 1 is a share of all steps
            lr_scheduler_type="cosine",
            logging_steps=20,
            save_steps=config.save_steps,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            use_cpu=not cuda,
            bf16=cuda,
            dataloader_pin_memory=cuda,
            deepspeed=deepspeed_config.for_sft(config.zero_stage),
        )


def load_model(base: Path) -> Any:
    """The model that SFT trains, in float32: in bfloat16 most updates would be too small to change a weight.

    On a GPU, DeepSpeed computes with bfloat16 copies.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, use_safetensors=True, attn_implementation="sdpa"
    )


def tokenize(row: Row, tokenizer: Any, max_tokens: int) -> dict[str, list[int]]:
    """`input_ids` of prompt and response, and `labels`: the response with its end of turn, `IGNORED` elsewhere."""
    assert row.response is not None
    found = encode_answer(tokenizer, row, row.response, max_tokens=max_tokens)
    labels = [IGNORED] * len(found.ids)
    labels[found.start : found.end] = found.ids[found.start : found.end]
    return {"input_ids": found.ids, "labels": labels}


def collate(samples: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """The batch as right-padded [B, T] tensors `input_ids`, `attention_mask` and `labels`."""
    longest = max(len(sample["input_ids"]) for sample in samples)

    def padded(name: str, fill: int) -> Tensor:
        return torch.tensor([sample[name] + [fill] * (longest - len(sample[name])) for sample in samples])

    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return {"input_ids": padded("input_ids", pad_id), "attention_mask": mask, "labels": padded("labels", IGNORED)}


def _save(trainer: Any, tokenizer: Any, folder: Path) -> None:
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that no user of the model needs
