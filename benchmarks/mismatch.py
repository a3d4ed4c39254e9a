"""Test the mismatch guard on a real model in bfloat16: an honest engine and a stale one.

    make smollm2
    metaalign-rl prepare build/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output base
    python -m benchmarks.mismatch base --json OUT
    python -m benchmarks.mismatch base --steps 100 --json OUT   # a PPO run that the guard must not stop

One engine samples as if it were two. The learner then trains, and the engine samples again: once with the old weights,
and once with the new ones. The guard must accept the second and refuse the first. OUT has the mismatch in each case.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.about import command, machine
from metaalign_rl.core.arguments import path
from metaalign_rl.core.dataflow import Batch, Request, Reward, Rollout, Row, Sample, Sampling
from metaalign_rl.core.files import read_json, read_jsonl, write_json
from metaalign_rl.ppo.mismatch import ROUNDING

QUESTIONS = ("What is the capital of France?", "Tell me about the sea.", "How do I cook rice?", "Write a short poem.")
COPIES, TOKENS, TRAINING_STEPS, LEARNING_RATE = 4, 64, 20, 1e-5
SETTINGS = (
    "run.stages=[data, ppo]", "data.demonstrations=64", "data.pairs=64", "data.prompts=400", "data.held_out_prompts=16",
    "data.held_out_pairs=16", "data.paraphrased_wishes=4", "model.max_tokens=128", "rollout.max_new_tokens=16",
    "rollout.kv_cache_gib=0.5", "learner.zero_stage=1", "learner.epochs=1", "learner.minibatch_size=4",
    "learner.learning_rate=1e-5", "learner.share_prompts=true", "ppo.prompts_per_step=1", "ppo.samples_per_prompt=4",
    "ppo.algorithm=rloo", "ppo.model_weight=0", "ppo.function_weight=1", "ppo.save_steps=50", "cluster.memory_gib=4",
)  # fmt: skip
ROW = Row(id="r", family="test", relation="system_only", tier="system", system_info="", user_info="", messages=[])


def main() -> None:
    """Run the case and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=path, help="folder of a prepared language model")
    parser.add_argument("--steps", type=int, help="run PPO for this many steps instead, and add the result to OUT")
    parser.add_argument("--dtype", default="bfloat16", choices=ROUNDING, help="of the PPO run; default: bfloat16")
    parser.add_argument("--json", type=path, required=True, help="the JSON file to write")
    args = parser.parse_args()
    about = {"machine": machine(), "command": command(), "model": args.model.name}
    found: dict[str, Any] = read_json(args.json) if args.json.is_file() else {}
    runs = found.get("runs", [])
    if args.steps:
        runs = [*runs, about | honest_run(args.model, args.steps, args.dtype)]
    else:
        found = about | run(args.model)
    write_json(args.json, found | {"runs": runs})


def run(folder: Path) -> dict[str, Any]:
    """The mismatch of the first step and of an honest second step, and the guard's verdict on a stale engine."""
    from transformers import AutoModelForCausalLM

    from metaalign_rl.config.schema import Config, ModelConfig
    from metaalign_rl.learner.attention import attention_for
    from metaalign_rl.ppo.mismatch import MismatchGuard
    from metaalign_rl.rollout.engine import RolloutEngine
    from metaalign_rl.weights import StaleEngine

    environment = dict(os.environ)
    engine = RolloutEngine(str(folder), max_tokens=256, dtype="bfloat16", kv_cache_gib=0.5)
    os.environ.clear()
    os.environ.update(environment)
    options = {"dtype": torch.bfloat16, "attn_implementation": attention_for(torch.bfloat16)}
    learner = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    guard = MismatchGuard(Config(model=ModelConfig(dtype="bfloat16")))

    first = sample(engine, folder, 0, 0) + sample(engine, folder, 0, 1)
    report = {"first": guard.check(*evaluate(learner, first), 0)}
    print(report, flush=True)
    train(learner, first)
    stale = sample(engine, folder, 1, 1)  # it claims version 1 and still has version 0
    send(engine, learner, 1)
    fresh = sample(engine, folder, 1, 0) + sample(engine, folder, 1, 1)
    report["honest"] = guard.check(*evaluate(learner, fresh), 1)
    print(report, flush=True)
    try:
        report["stale, accepted"] = guard.check(*evaluate(learner, fresh[: len(stale)] + stale), 1)
    except StaleEngine as error:
        report["stale, refused"] = str(error)
    print(report, flush=True)
    return report


def sample(engine: Any, folder: Path, version: int, number: int) -> list[Sample]:
    """Responses to every question, as if the engine were the engine `number` and had the weights `version`."""
    from metaalign_rl.core.meta_prompt import MetaPrompt, encode
    from metaalign_rl.core.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder)
    prompts = [
        encode(tokenizer, MetaPrompt(), [{"role": "user", "content": text}], max_tokens=128) for text in QUESTIONS
    ]
    requests = [Request(index, prompts[index // COPIES]) for index in range(COPIES * len(prompts))]
    found = [sample for part in engine.generate(requests, Sampling(1.0, TOKENS)) for sample in part]
    return [replace(sample, engine=number, weight_version=version, first_version=version) for sample in found]


@torch.no_grad()
def evaluate(learner: Any, samples: Sequence[Sample]) -> tuple[Batch, list[Rollout]]:
    """The samples as a batch with the learner's log-probabilities, and as rollouts."""
    from metaalign_rl.learner.batch import batch_of

    batch = batch_of(samples, pad_id=0)
    batch.logprobs = torch.zeros(batch.action_mask.shape)
    for place, one in enumerate(samples):
        logits = learner(torch.tensor([one.prompt_ids + one.response_ids])).logits[0, len(one.prompt_ids) - 1 : -1]
        chosen = logits.float().log_softmax(-1).gather(-1, torch.tensor(one.response_ids)[:, None])[:, 0]
        batch.logprobs[place, batch.action_mask[place]] = chosen
    return batch, [Rollout(ROW, one, Reward(0.0, None, None)) for one in samples]


def train(learner: Any, samples: Sequence[Sample]) -> None:
    """Steps of AdamW with float32 master weights, towards the samples."""
    masters = [weight.detach().float().clone().requires_grad_() for weight in learner.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=0.0)
    for step in range(TRAINING_STEPS):
        one = samples[step % len(samples)]
        ids = torch.tensor([one.prompt_ids + one.response_ids])
        learner(ids, labels=ids).loss.backward()
        for master, weight in zip(masters, learner.parameters(), strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        for master, weight in zip(masters, learner.parameters(), strict=True):
            weight.data.copy_(master.data)


def send(engine: Any, learner: Any, version: int) -> None:
    """Give the engine the learner's weights, as Ray's object store would."""
    from metaalign_rl.weights.buckets import fill
    from metaalign_rl.weights.checksum import Digest

    digest = Digest()
    engine.start_weight_update()
    for bucket in fill(digest.watch(learner.named_parameters()), 2**26):
        engine.update_weights({"entries": bucket.entries, "data": bucket.data})
    assert engine.finish_weight_update(version) == (version, digest.hexdigest())


def honest_run(folder: Path, steps: int, dtype: str) -> dict[str, Any]:
    """The mismatch of each step of a small PPO run with Ray, one engine and one learner. A stopped run raises."""
    with tempfile.TemporaryDirectory() as root:
        config = Path(root) / "empty.yaml"
        config.write_text("# all settings are words\n")
        words = [f"model.path={folder.absolute()}", f"model.dtype={dtype}", f"run.root={root}", "run.name=honest"]
        words += [f"ppo.steps={steps}", f"reward.function={Path(__file__).absolute()}:different_words"]
        subprocess.run([sys.executable, "-m", "metaalign_rl", "run", str(config), *SETTINGS, *words], check=True)
        metrics = [line for _, line in read_jsonl(Path(root) / "honest" / "metrics.jsonl")]
    values = [float(line["mismatch"]) for line in metrics]
    shown = {"first": values[0], "mean": fmean(values), "max": max(values), "kl at the end": metrics[-1]["kl"]}
    rounded = {name: float(f"{value:.3g}") for name, value in shown.items()}
    return {"settings": [f"model.dtype={dtype}", *SETTINGS], "steps": len(values), **rounded}


def different_words(rows: Sequence[Row], responses: Sequence[str]) -> list[float]:
    """A reward for the honest run: the share of a response's words that are different."""
    return [len(set(text.split())) / max(1, len(text.split())) for text in responses]


if __name__ == "__main__":
    main()
