"""W2: measure the share of the machine's peak that rollout and learning reach, with 23M parameters.

First a real run of two steps, with 256 prompts and 128 new tokens, in bfloat16. Then, in a process with the environment
of a learner: the peak rates of matrix products and copies, and a profile of one update of policy and critic.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.about import command
from benchmarks.workloads import toy
from benchmarks.workloads.common import CPUS, machine, seconds, train, write_config
from metaalign_rl.core.files import write_json
from metaalign_rl.runtime.actor_options import actor_environment

CONTEXT, STEPS = 192, 2
DTYPE, BYTES = "bfloat16", 2
KINDS = {  # kind of operation: parts of the operations' names
    "matrix products": ("mm", "linear", "matmul"),
    "attention": ("scaled_dot", "flash"),
    "softmax and log-probabilities": ("softmax", "logsumexp", "gather", "log"),
    "optimizer and gradients' norm": ("adam", "norm", "foreach"),
    "copies and casts": ("copy", "cat", "index", "clone", "fill", "zero"),
    "element by element": ("mul", "add", "div", "sub", "pow", "mean", "sum", "silu", "sqrt", "neg", "exp"),
}


@dataclass(frozen=True, slots=True)
class Size:
    """The size of the model, of a step, of the profiled update (in samples), and of the matrices of the peak."""

    shape: toy.Shape
    prompts: int
    new_tokens: int
    profiled: int
    matrix: int = 2048


FULL = Size(toy.Shape(hidden=384, layers=10, wide=1024, words=3600), prompts=256, new_tokens=128, profiled=64)
TINY = Size(toy.Shape(hidden=64, layers=1, wide=64), prompts=8, new_tokens=8, profiled=4, matrix=256)


def run(args: argparse.Namespace) -> None:
    """Measure and write the results."""
    size = TINY if args.tiny else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = toy.make(folder, size.shape, size.prompts, CONTEXT) | {
            "run.name": "run",
            "model.dtype": DTYPE,
            "rollout.max_new_tokens": size.new_tokens,
            "learner.minibatch_size": size.prompts,
            "ppo.steps": STEPS,
            "ppo.prompts_per_step": size.prompts,
            "ppo.samples_per_prompt": 1,
            "ppo.save_steps": STEPS,
        }
        write_config(folder / "config.yaml", settings)
        timing, lines = train(folder / "config.yaml", folder / "run")
        peak, profile = in_new_process(measure_peak, size.matrix), in_new_process(profile_update, folder, size)
    last = lines[-1]
    figures = {
        "command": command(),
        **machine(),
        "parameters": profile.pop("parameters"),
        "peak": peak,
        "startup_s": timing.startup_s,
        "step_s": seconds(last),
        "parts": shares(last, size.shape, profile.pop("vocabulary"), peak),
        "update": profile,
    }
    write_json(args.json, figures)
    show(figures)


def in_new_process(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Call `work` in a new process with the environment of a learner."""
    os.environ |= actor_environment(CPUS)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def measure_peak(size: int) -> dict[str, float]:
    """Return the best of six: GFLOP/s of a square matrix product by data type, and GB/s of a copy (read plus write)."""
    import torch

    found = {}
    for dtype in ("float32", "bfloat16"):
        a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
        found[f"gflops_{dtype}"] = 2 * size**3 / _best(lambda a=a, b=b: a @ b) / 1e9
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    found["gb_per_s_copy"] = 2 * source.nbytes / _best(lambda: target.copy_(source)) / 1e9
    return found


def _best(work: Callable[[], object], times: int = 6) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def shares(
    metrics: dict[str, Any], shape: toy.Shape, vocabulary: int, peak: dict[str, float]
) -> dict[str, dict[str, float]]:
    """Return the GFLOP/s of each part of the last step and its share of the peak.

    Rollout also has its share of the bandwidth. For each token by which all answers advance, it reads all weights and
    the keys and values so far.
    """
    answers, length = metrics["samples"], toy.PROMPT_WORDS + 2 + metrics["response_tokens"]
    predicted, tokens = answers * metrics["response_tokens"], answers * length
    policy = shape.flops(tokens, predicted, length, vocabulary)
    critic = shape.flops(tokens, 0, length, vocabulary)
    work = {"rollout": policy, "reference": 2 * policy + critic, "learn": 3 * (policy + critic)}
    found = {}
    for part, flops in work.items():
        took = metrics[f"seconds_{part}"]
        gflops = flops / took / 1e9
        found[part] = {"seconds": took, "gflops": gflops, "share_of_peak": gflops / peak[f"gflops_{DTYPE}"]}
    weights = shape.flops(1, 1, 0, vocabulary) / 2 * BYTES
    cache = 2 * shape.layers * shape.hidden * BYTES * answers * (length - metrics["response_tokens"] / 2)
    moved = metrics["response_tokens"] * (weights + cache) / found["rollout"]["seconds"] / 1e9
    found["rollout"] |= {"gb_per_s": moved, "share_of_bandwidth": moved / peak["gb_per_s_copy"]}
    return found


def profile_update(folder: Path, size: Size) -> dict[str, Any]:
    """Profile an update of policy and critic: time by kind of operation, and the longest operations."""
    from dataclasses import replace

    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    from metaalign_rl.config.learner import LearnerConfig
    from metaalign_rl.learner.batch import make_batch
    from metaalign_rl.learner.worker import Learner

    learner = Learner(
        LearnerConfig(minibatch_size=size.profiled), 0, 1, f"file://{folder}/rendezvous", dtype=DTYPE, seed=0
    )
    learner.setup(folder / "policy", folder / "policy", folder / "policy")
    model, generator = learner.policy.module.model, torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    ids = torch.randint(
        6, vocabulary, (size.profiled, toy.PROMPT_WORDS + 2 + size.new_tokens), generator=generator
    ).tolist()
    samples = [(line[: -size.new_tokens], line[-size.new_tokens :]) for line in ids]
    batch = learner.evaluate(make_batch(samples, pad_id=0))
    assert batch is not None and batch.values is not None
    batch = replace(batch, advantages=torch.ones_like(batch.values), returns=batch.values + 1)
    learner.train(batch)  # warm up
    began = time.perf_counter()
    learner.train(batch)
    took = time.perf_counter() - began
    with trace(activities=[ProfilerActivity.CPU]) as seen:
        learner.train(batch)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": vocabulary,
        "samples": size.profiled,
        "seconds": took,
        **by_kind({event.key: event.self_cpu_time_total for event in seen.key_averages()}),
    }


def by_kind(times: dict[str, float], longest: int = 12) -> dict[str, dict[str, float]]:
    """Return the share of the time by kind of operation, and of the longest operations by name."""
    total = sum(times.values())
    kinds = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for name, spent in times.items():
        kind = next((k for k, parts in KINDS.items() if any(p in name.lower() for p in parts)), "everything else")
        kinds[kind] += spent / total
    top = sorted(times, key=lambda name: -times[name])[:longest]
    return {"kinds": kinds, "operations": {name: times[name] / total for name in top}}


def show(figures: dict[str, Any]) -> None:
    """Print the results."""
    peak = ", ".join(f"{name} {value:.1f}" for name, value in figures["peak"].items())
    print(f"{figures['parameters'] / 1e6:.1f}M parameters; peak: {peak}")
    for part, found in figures["parts"].items():
        print(f"{part:<10} {found['seconds']:7.2f} s  {found['gflops']:7.1f} GFLOP/s  "
              f"{found['share_of_peak']:.1%} of the peak")  # fmt: skip
    for kind, share in figures["update"]["kinds"].items():
        print(f"update: {kind:<32} {share:.1%}")
