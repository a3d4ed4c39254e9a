"""Measure the real learner and the real engine for `benchmarks.plan`.

Run each function in a new process, so that the peak memory is that of the function. Times are those of the fastest
round, because other work on the machine only slows a round down.
"""

import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.learner.batch import make_batch

ROUNDS = 3
KV_CACHE_GIB = 0.5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WORDS = 800  # the size of the built-in world's vocabulary


def make_model(folder: Path, hidden: int, layers: int, intermediate: int) -> None:
    """Write a random model and a tokenizer with `WORDS` words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from metaalign_rl.core import meta_prompt
    from metaalign_rl.data.world.tokenizer import build_tokenizer

    tokenizer = build_tokenizer([" ".join(f"w{number}" for number in range(WORDS))])
    meta_prompt.install(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, max_position_embeddings=2048,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fastest(action: Callable[[], Any], clock: str, rounds: int = ROUNDS) -> float:
    """Return the seconds of the fastest of `rounds` calls, after one call to warm up."""
    action()
    found = []
    for _ in range(rounds):
        began = CLOCKS[clock]()
        action()
        found.append(CLOCKS[clock]() - began)
    return min(found)


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def primitives(threads: int, clock: str) -> dict[str, float]:
    """Measure the rates of one core: FLOP/s of matrix products by data type, and bytes per second read and written."""
    import torch

    torch.set_num_threads(threads)
    found = {}
    for dtype in ("float32", "bfloat16"):
        a, b = (torch.randn(1024, 1024).to(getattr(torch, dtype)) for _ in range(2))
        found[dtype] = 2 * 1024**3 / fastest(lambda a=a, b=b: a @ b, clock, 20) / threads
    source = torch.randn(32 * 2**20)
    target = torch.empty_like(source)
    found["bandwidth"] = 2 * source.nbytes / fastest(lambda: target.copy_(source), clock, 10) / threads
    return found


def learner(
    folder: Path, threads: int, settings: LearnerConfig, work: dict[str, int], dtype: str, clock: str
) -> dict[str, float]:
    """Measure one `evaluate` and one `train` over the samples in seconds, and the process's peak memory in bytes."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    from metaalign_rl.learner.worker import Learner

    with tempfile.TemporaryDirectory() as rendezvous:
        rank = Learner(settings, 0, 1, f"file://{rendezvous}/ranks", dtype=dtype, seed=0)
        rank.setup(folder, folder, folder)
        draw = random.Random(0)
        samples = [
            ([draw.randrange(3, WORDS) for _ in range(work["prompt"])], [draw.randrange(3, WORDS)] * work["answer"])
            for _ in range(work["samples"])
        ]
        batch = rank.evaluate(make_batch(samples, 0))
        assert batch is not None
        batch.advantages = torch.randn(batch.action_mask.shape)
        batch.returns = torch.randn(batch.action_mask.shape)
        return {
            "reference": fastest(lambda: rank.evaluate(batch), clock),
            "learn": fastest(lambda: rank.train(batch), clock),
            "peak_bytes": peak_bytes(),
        }


def engine(folder: Path, threads: int, work: dict[str, int], dtype: str, clock: str) -> dict[str, float]:
    """Measure the rollout of the samples in seconds. `prefill` is the time to the first token of each."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    from metaalign_rl.core.dataflow import Request, Sampling
    from metaalign_rl.rollout.engine import RolloutEngine

    length = work["prompt"] + work["answer"]
    found = RolloutEngine(str(folder), max_tokens=length, dtype=dtype, kv_cache_gib=KV_CACHE_GIB)
    draw = random.Random(1)
    drawn = 0

    def roll_out(tokens: int) -> None:
        nonlocal drawn
        prompts = [tuple(draw.randrange(3, WORDS) for _ in range(work["prompt"])) for _ in range(work["samples"])]
        requests = [Request(index, list(ids)) for index, ids in enumerate(prompts)]
        drawn = sum(
            len(s.response_ids) for part in found.generate(requests, Sampling(max_new_tokens=tokens)) for s in part
        )

    prefill = fastest(lambda: roll_out(1), clock)
    rollout = fastest(lambda: roll_out(work["answer"]), clock)
    return {
        "prefill": prefill,
        "rollout": rollout,
        "answer_tokens": drawn / work["samples"],
        "peak_bytes": peak_bytes(),
    }
