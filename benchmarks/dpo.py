"""Run DPO with TRL's trainer on the reward model's training pairs, with the chat template of the meta-prompt."""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaalign_rl.core.arguments import path
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.rows import read_rows


def example(row: Row) -> dict[str, Any]:
    """Convert a pair to TRL's conversational format. User Info is an argument of the chat template."""
    return {
        "prompt": [{"role": "system", "content": row.system_info}, *row.messages],
        "chosen": [{"role": "assistant", "content": row.chosen}],
        "rejected": [{"role": "assistant", "content": row.rejected}],
        "chat_template_kwargs": {"user_info": row.user_info},
    }


def train(
    policy: Path, pairs: Sequence[Path], output: Path, *, seed: int, learning_rate: float, nll_weight: float
) -> None:
    """Train a copy of `policy` on the pairs for one epoch and write it to `output`.

    With a smaller beta or a larger learning rate the chosen answers lose probability too, and answers sampled at
    temperature 1 become bad.

    Args:
        nll_weight: weight of the negative log-likelihood of the chosen answers, which is added to DPO's loss (Pang et
            al. 2024, "Iterative Reasoning Preference Optimization"). It is SFT on these answers.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [row for path in pairs for row in read_rows(path) if row.chosen is not None]
    config = DPOConfig(
        output_dir=str(output / "checkpoints"),
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        per_device_train_batch_size=16,
        num_train_epochs=1,
        beta=0.5,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, nll_weight],
        max_length=None,
        seed=seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(policy, use_safetensors=True),
        ref_model=AutoModelForCausalLM.from_pretrained(policy, use_safetensors=True),
        args=config,
        train_dataset=Dataset.from_list([example(row) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(policy),
    )
    trainer.train()
    shutil.copytree(policy, output, dirs_exist_ok=True)  # for the tokenizer and the template
    trainer.model.save_pretrained(output)


def main() -> None:
    """Train one policy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("policy", type=path, help="the checkpoint to start from, also DPO's reference")
    parser.add_argument("output", type=path, help="the folder to write the trained checkpoint to")
    parser.add_argument("pairs", type=path, nargs="+", help="JSONL files of rows with chosen and rejected")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=3e-5)
    parser.add_argument("--nll-weight", type=float, default=0.0, help="weight of the chosen answers' likelihood")
    args = parser.parse_args()
    how = {"seed": args.seed, "learning_rate": args.learning_rate, "nll_weight": args.nll_weight}
    train(args.policy, args.pairs, args.output, **how)


if __name__ == "__main__":
    main()
