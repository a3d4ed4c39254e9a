"""The estimates of `metaalign-rl plan` beside what the real learner and the real engine measure on this machine.

    python benchmarks/plan.py            # two sizes; writes benchmarks/results/plan.json
    python benchmarks/plan.py --rates    # first measure products and bandwidth anew, into rates.json
    python benchmarks/plan.py --clock cpu --threads 1   # where other work shares the machine: CPU seconds of one thread

By size, type and part: seconds estimated and measured, and their ratio; the learner's and the engine's peak memory in
GiB; tokens a second. The bars: a ratio of 0.5 to 2 for times, 1/1.3 to 1.3 for the learner's memory.
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

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this file is run as a script

from benchmarks import plan_parts
from benchmarks.run import RESULTS, machine
from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import ClusterConfig, Config, ModelConfig, PPOConfig, RolloutConfig
from metaalign_rl.core.files import read_json, write_json
from metaalign_rl.core.units import GIB
from metaalign_rl.plan import memory, speed
from metaalign_rl.plan.rates import CPU, RATES, find_device
from metaalign_rl.plan.shape import read_shape
from metaalign_rl.plan.work import Case, work_of

SIZES = {"13M": (384, 7, 1024), "25M": (512, 8, 1408)}  # hidden size, layers, feed-forward
WORK = {"samples": 32, "prompt": 96, "answer": 32}
TYPES = {"float32": 0, "bfloat16": 2}  # and the ZeRO stage beside them
BARS = {"seconds": 2.0, "memory_gib": 1.3}


def main() -> int:
    """Measure, compare and write; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "plan.json")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=plan_parts.CLOCKS, default="wall")
    parser.add_argument("--rates", action="store_true", help="measure this machine's rates anew")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.rates:
        write_rates(alone(plan_parts.primitives, args.threads, args.clock))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size, shape in SIZES.items():
            alone(plan_parts.make_model, Path(folder) / size, *shape)
            for dtype in TYPES:
                found[f"{size} {dtype}"] = compare(Path(folder) / size, dtype, args.threads, args.clock)
    missed = list(show(found))
    about = {"machine": machine(), "threads": args.threads, "clock": args.clock, "work": WORK, "missed": missed}
    write_json(args.output, about | {"sizes": found})
    return int(bool(missed))


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_rates(measured: dict[str, float]) -> None:
    """Put this machine's products and bandwidth, by CPU, into the rates."""
    rates = read_json(RATES)
    rates["cpu"] |= {"bandwidth": measured.pop("bandwidth"), "flops": measured}
    write_json(RATES, rates)


def compare(model: Path, dtype: str, threads: int, clock: str) -> dict[str, Any]:
    """Seconds and memory of learner and engine, estimated and measured."""
    settings = LearnerConfig(minibatch_size=WORK["samples"], micro_batch_tokens=2048, zero_stage=TYPES[dtype])
    learner = alone(plan_parts.learner, model, threads, settings, WORK, dtype, clock)
    engine = alone(plan_parts.engine, model, threads, WORK, dtype, clock)
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
        "seconds": {part: beside(*pair) for part, pair in seconds.items()},
        "memory_gib": {role: beside(*(value / GIB for value in pair)) for role, pair in bytes_.items()},
        "tokens_per_second": {
            "rollout": WORK["samples"] * engine["answer_tokens"] / engine["rollout"],
            "learn": tokens / learner["learn"],
        },
    }


def make_case(model: Path, dtype: str, threads: int, settings: LearnerConfig) -> Case:
    """What was measured, as the plan sees it."""
    config = Config(
        cluster=ClusterConfig(cpus=threads),
        model=ModelConfig(max_tokens=WORK["prompt"] + WORK["answer"], dtype=dtype),
        rollout=RolloutConfig(max_new_tokens=WORK["answer"], kv_cache_gib=plan_parts.KV_CACHE_GIB),
        learner=settings,
        ppo=PPOConfig(prompts_per_step=WORK["samples"], samples_per_prompt=1),
    )
    shape = read_shape(model / "config.json")
    return Case(config=config, policy=shape, reward=shape, device=find_device(CPU, threads), work=work_of(config))


def beside(estimated: float, measured: float) -> dict[str, float]:
    """Both, and their ratio."""
    return {"estimated": estimated, "measured": measured, "ratio": estimated / measured}


def show(found: dict[str, Any]) -> Any:
    """Print the figures; the bars that are missed."""
    for size, figures in found.items():
        for kind, bar in BARS.items():
            for part, entry in figures[kind].items():
                print(f"{size:<14} {part:<10} {kind:<10} {entry['estimated']:8.3f} estimated "
                      f"{entry['measured']:8.3f} measured, ratio {entry['ratio']:.2f}")  # fmt: skip
                is_bar = kind == "seconds" or part == "learner"  # an engine's cache is reserved, and not all touched
                if is_bar and not 1 / bar <= entry["ratio"] <= bar:
                    yield f"{size}, {part} {kind}: {entry['ratio']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
