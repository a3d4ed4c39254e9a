"""Compare the estimated main memory of each stage with a real run on this machine's CPUs.

    python -m benchmarks.plan_memory --model MODEL            # writes benchmarks/results/plan_memory.json
    python -m benchmarks.plan_memory --model MODEL model.dtype=bfloat16 learner.zero_stage=1

Each stage runs as a command of its own on rows that fill `model.max_tokens`. The measurement is the largest sum of the
proportional set sizes (PSS) of all its processes: the driver, Ray's and the actors. PSS counts a page that n processes
share as 1/n in each. The ratio of estimate and measurement must be 0.8 to 1.2.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

from benchmarks.about import RESULTS, machine
from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.arguments import path
from metaalign_rl.core.files import write_json, write_jsonl
from metaalign_rl.core.units import GIB
from metaalign_rl.plan.case import case_of
from metaalign_rl.plan.stages import STAGES, host_memory

BAR = 1.2
PERIOD = 0.5  # seconds between two samples
ROWS = {"demonstrations": 16, "pairs": 16, "prompts": 16}
SETTINGS = (
    "data.source=jsonl", "model.max_tokens=256", "sft.batch_size=8", "sft.gradient_accumulation=2",
    "sft.learning_rate=1e-5", "reward.batch_size=8", "reward.gradient_accumulation=4", "reward.controls=[]",
    "reward.learning_rate=1e-5", "reward.on_policy_prompts=0", "rollout.max_new_tokens=64", "rollout.kv_cache_gib=0.5",
    "learner.minibatch_size=16", "learner.micro_batch_tokens=1024", "learner.zero_stage=0", "ppo.steps=2",
    "ppo.prompts_per_step=8", "ppo.samples_per_prompt=2", "cluster.memory_gib=4",
)  # fmt: skip


def main() -> int:
    """Measure, compare and write. Return 1 if any limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=path, required=True, help="folder of a checkpoint to start from")
    parser.add_argument("--output", type=path, default=RESULTS / "plan_memory.json", help="the JSON file to write")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings over those of this benchmark")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder) / "rows")
        config = Path(folder) / "empty.yaml"
        config.write_text("# all settings are words\n")
        words = [*SETTINGS, f"model.path={args.model}", f"data.path={folder}/rows", f"run.root={folder}", *args.words]
        estimated = estimates(words)
        for stage in STAGES:
            stages = "[data, sft]" if stage == "sft" else f"[{stage}]"
            found[stage] = entry(estimated[stage], peak_bytes(config, [*words, f"run.stages={stages}"]))
            print(f"{stage:<8}", *(f"{name} {value:.2f}" for name, value in found[stage].items() if name != "parts"))
    missed = [stage for stage, values in found.items() if not 1 / BAR <= values["ratio"] <= BAR]
    about = {"machine": machine(), "model": args.model.name, "settings": [*SETTINGS, *args.words]}
    write_json(args.output, about | {"missed": missed, "gib": found})
    return int(bool(missed))


def write_rows(folder: Path) -> None:
    """Write rows whose dialogs are too long, so that each is cut to the most that the model may read."""
    draw = random.Random(0)
    words = ("river", "stone", "light", "house", "paper", "green", "seven", "quiet", "north", "table")

    def text(count: int) -> str:
        return " ".join(draw.choice(words) for _ in range(count))

    for use, count in ROWS.items():
        row = {"family": "helpful", "relation": "system_only", "tier": "system", "user_info": ""}
        answers = {"demonstrations": ("response",), "pairs": ("chosen", "rejected"), "prompts": ()}[use]
        rows = (
            {"id": str(number), **row, "system_info": text(10), "messages": [{"role": "user", "content": text(400)}],
             **{answer: text(50) for answer in answers}}
            for number in range(count)
        )  # fmt: skip
        write_jsonl(folder / f"{use}.jsonl", rows)


def estimates(words: list[str]) -> dict[str, dict[str, float]]:
    """Return the estimated bytes by stage and part, as the preflight computes them before the run."""
    config = loader.load(Config, None, words)
    case = case_of(config)
    assert case is not None, "the model's shape is unknown"
    return host_memory(case)


def entry(parts: dict[str, float], measured: int) -> dict[str, Any]:
    """Return estimate and measurement in GiB, with their ratio."""
    total = sum(parts.values())
    in_gib = {name: round(size / GIB, 3) for name, size in parts.items()}
    return {"estimated": total / GIB, "measured": measured / GIB, "ratio": total / measured, "parts": in_gib}


def peak_bytes(config: Path, words: list[str]) -> int:
    """Run the pipeline and return the largest sum of its processes' memory."""
    mark = f"PLAN_MEMORY={uuid4().hex}"
    name, _, value = mark.partition("=")
    command = [sys.executable, "-m", "metaalign_rl", "run", str(config), *words]
    process = subprocess.Popen(command, env=os.environ | {name: value}, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(pss, marked(mark.encode()))))
        time.sleep(PERIOD)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return peak


def marked(mark: bytes) -> list[Path]:
    """Return the folders in /proc of the processes whose environment has `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                found.append(folder)
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def pss(process: Path) -> int:
    """Return the proportional set size of a process in bytes; 0 if it has ended."""
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    sys.exit(main())
