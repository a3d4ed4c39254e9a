"""Compare the estimates of `metaalign-rl plan` with measurements of the real learner and engine on this machine.

    python -m benchmarks.plan            # two sizes; writes benchmarks/results/plan.json
    python -m benchmarks.plan --rates    # first measure matrix products and bandwidth, and write them to rates.json
    python -m benchmarks.plan --clock cpu --threads 1   # on a shared machine: CPU seconds of one thread

The results have, per size and data type: the estimated and measured seconds of each part and their ratio, the peak
memory of the learner and the engine in GiB, and tokens per second. The ratio must be 0.5 to 2 for times, and 1/1.3 to
1.3 for the learner's memory.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks import plan_parts
from benchmarks.about import RESULTS, machine
from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import ClusterConfig, Config, ModelConfig, PPOConfig, RolloutConfig
from metaalign_rl.core.arguments import path
from metaalign_rl.core.files import read_json, write_json
from metaalign_rl.core.units import GIB
from metaalign_rl.plan import memory, speed
from metaalign_rl.plan.rates import CPU, RATES, find_device
from metaalign_rl.plan.shape import read_shape
from metaalign_rl.plan.work import Case, work_of

SIZES = {"13M": (384, 7, 1024), "25M": (512, 8, 1408)}  # hidden size, layers, feed-forward
WORK = {"samples": 32, "prompt": 96, "answer": 32}
TYPES = {"float32": 0, "bfloat16": 2}  # data type: ZeRO stage
BARS = {"seconds": 2.0, "memory_gib": 1.3}


def main() -> int:
    """Measure, compare and write. Return 1 if any limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=path, default=RESULTS / "plan.json", help="the JSON file to write")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--clock", choices=plan_parts.CLOCKS, default="wall", help="wall time or CPU time")
    parser.add_argument("--rates", action="store_true", help="first measure this machine's rates")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.rates:
        write_rates(in_new_process(plan_parts.primitives, args.threads, args.clock))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, shape in SIZES.items():
            in_new_process(plan_parts.make_model, Path(folder) / size, *shape)
            for dtype in TYPES:
                found[f"{size} {dtype}"] = compare(Path(folder) / size, dtype, args.threads, args.clock)
    missed = list(show(found))
    about = {"machine": machine(), "threads": args.threads, "clock": args.clock, "work": WORK, "missed": missed}
    write_json(args.output, about | {"sizes": found})
    return int(bool(missed))


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_rates(measured: dict[str, float]) -> None:
    """Write this machine's matrix products and bandwidth per core to the rates."""
    rates = read_json(RATES)
    rates["cpu"] |= {"bandwidth": measured.pop("bandwidth"), "flops": measured}
    write_json(RATES, rates)


def compare(model: Path, dtype: str, threads: int, clock: str) -> dict[str, Any]:
    """Estimate and measure the seconds and the memory of the learner and the engine."""
    settings = LearnerConfig(minibatch_size=WORK["samples"], micro_batch_tokens=2048, zero_stage=TYPES[dtype])
    learner = in_new_process(plan_parts.learner, model, threads, settings, WORK, dtype, clock)
    engine = in_new_process(plan_parts.engine, model, threads, WORK, dtype, clock)
    case = make_case(model, dtype, threads, settings)
    rollout = speed.rollout_seconds(case)
    tokens = WORK["samples"] * (WORK["prompt"] + WORK["answer"])
    seconds = {
        "prefill": (rollout["prefill"], engine["prefill"]),
        "rollout": (sum(rollout.values()), engine["rollout"]),
        "reference": (speed.reference_seconds(case), learner["reference"]),
        "learn": (speed.learn_seconds(case), learner["learn"]),
    }
    bytes_ = {
        "learner": (sum(memory.learner_memory(case).values()), learner["peak_bytes"]),
        "engine": (sum(memory.engine_memory(case).values()), engine["peak_bytes"]),
    }
    return {
        "parameters": case.policy.parameters,
        "seconds": {part: with_ratio(*pair) for part, pair in seconds.items()},
        "memory_gib": {role: with_ratio(*(value / GIB for value in pair)) for role, pair in bytes_.items()},
        "tokens_per_second": {
            "rollout": WORK["samples"] * engine["answer_tokens"] / engine["rollout"],
            "learn": tokens / learner["learn"],
        },
    }


def make_case(model: Path, dtype: str, threads: int, settings: LearnerConfig) -> Case:
    """Describe the measured case to the plan."""
    config = Config(
        cluster=ClusterConfig(cpus=threads),
        model=ModelConfig(max_tokens=WORK["prompt"] + WORK["answer"], dtype=dtype),
        rollout=RolloutConfig(max_new_tokens=WORK["answer"], kv_cache_gib=plan_parts.KV_CACHE_GIB),
        learner=settings,
        ppo=PPOConfig(prompts_per_step=WORK["samples"], samples_per_prompt=1),
    )
    shape = read_shape(model / "config.json")
    return Case(config=config, policy=shape, reward=shape, device=find_device(CPU, threads), work=work_of(config))


def with_ratio(estimated: float, measured: float) -> dict[str, float]:
    """Return both values and their ratio."""
    return {"estimated": estimated, "measured": measured, "ratio": estimated / measured}


def show(found: dict[str, Any]) -> Any:
    """Print the results. Yield the limits that are missed."""
    for size, figures in found.items():
        for kind, bar in BARS.items():
            for part, entry in figures[kind].items():
                print(f"{size:<14} {part:<10} {kind:<10} {entry['estimated']:8.3f} estimated "
                      f"{entry['measured']:8.3f} measured, ratio {entry['ratio']:.2f}")  # fmt: skip
                is_bar = kind == "seconds" or part == "learner"  # an engine does not touch all of its reserved cache
                if is_bar and not 1 / bar <= entry["ratio"] <= bar:
                    yield f"{size}, {part} {kind}: {entry['ratio']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
