"""Measure the weight sync from the learner to the engine: seconds and GB/s by route, for a policy of 0.5B parameters.

The routes over GPUs have not been run yet.

    python -m benchmarks.gpu_weights --json OUT                       # the routes that this machine's GPUs allow
    python -m benchmarks.gpu_weights --device cpu --tiny --json OUT   # to test the script

Each route is a real run of a few short PPO steps. The result is the metric `seconds_transfer`. The routes are:
    store: through Ray's object store, between CPUs
    ipc: by CUDA IPC, on one GPU that the learner and the engine share
    nccl: by NCCL, between two GPUs
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.about import command
from benchmarks.workloads import toy
from benchmarks.workloads.common import machine, train, write_config
from metaalign_rl.core.arguments import path
from metaalign_rl.core.checkpoints import weight_files
from metaalign_rl.core.files import write_json

GPUS = {"store": 0, "ipc": 1, "nccl": 2}  # GPUs that each route needs; the run chooses the route by its GPUs
FULL = toy.Shape(hidden=896, layers=24, wide=4864, key_heads=2, vocabulary=151_936)
TINY = toy.Shape(hidden=64, layers=1, wide=64)
STEPS, CONTEXT = 6, 64


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=path, required=True, help="the JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to test the script")
    parser.add_argument("--routes", nargs="+", choices=GPUS, help="default: all for which there are enough GPUs")
    args = parser.parse_args()
    gpus = count_gpus() if args.device == "cuda" else 0
    routes = args.routes or [route for route, needed in GPUS.items() if needed <= gpus]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made = toy.make(Path(folder), TINY if args.tiny else FULL, 32, CONTEXT)
        size = sum(file.stat().st_size for file in weight_files(Path(folder) / "policy")) // 2
        for route in routes:
            found[route] = measure(Path(folder), made, route, size)
            print(f"{route}: {found[route]['seconds']:.3f} s, {found[route]['gb_per_s']:.2f} GB/s", flush=True)
            write_json(args.json, {"command": command(), **machine(), "bytes": size, "routes": found})


def count_gpus() -> int:
    """Return the number of GPUs that torch finds."""
    import torch

    return int(torch.cuda.device_count())


def measure(folder: Path, made: dict[str, Any], route: str, size: int) -> dict[str, float]:
    """Return the median and the fastest transfer of a run, without the first, in which the two ends connect.

    Args:
        size: bytes of the weights in bfloat16. The checkpoint holds float32.
    """
    settings = {
        "run.name": route,
        "cluster.gpus": GPUS[route],
        "model.dtype": "bfloat16",
        "rollout.max_new_tokens": 8,
        "ppo.steps": STEPS,
        "ppo.prompts_per_step": 8,
        "ppo.samples_per_prompt": 1,
        "ppo.save_steps": STEPS,
        "ppo.max_mismatch": 0.1,
    }
    write_config(folder / f"{route}.yaml", made | settings)
    _, lines = train(folder / f"{route}.yaml", folder / route)
    taken = [line["seconds_transfer"] for line in lines[1:]]
    median = statistics.median(taken)
    return {"seconds": median, "fastest_seconds": min(taken), "gb_per_s": size / median / 1e9}


if __name__ == "__main__":
    main()
