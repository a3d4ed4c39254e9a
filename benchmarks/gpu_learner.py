"""Measure the learner's speed on a 0.5B model: tokens per second and MFU, by ZeRO stage and micro-batch size.

Not run on a GPU yet.

    python -m benchmarks.gpu_learner --peak-tflops 989 --json OUT     # an H100 in bfloat16
    python -m benchmarks.gpu_learner --device cpu --tiny --json OUT   # to test the script

There is one rank. A random Qwen2 with the shape of Qwen2.5-0.5B is the policy, the reference and the critic. Each
setting runs `evaluate` and `train` in a new process. MFU counts 2 floating-point operations per weight and token plus
those of attention, three times as many for `train`, over the device's peak in bfloat16 without sparsity. A setting that
does not fit into the device's memory is recorded as out of memory.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.about import command
from benchmarks.workloads.common import machine
from metaalign_rl.core.arguments import path
from metaalign_rl.core.files import write_json
from metaalign_rl.core.units import GIB

STAGES = (1, 2, 3)  # bfloat16 does not work with stage 0
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Size:
    """The size of the model and of a batch."""

    shape: dict[str, int]
    samples: int
    prompt: int
    response: int
    micro_batch_tokens: Sequence[int]


FULL = Size(
    {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936,
    },
    samples=128, prompt=256, response=256, micro_batch_tokens=(8192, 16_384, 32_768, 65_536),
)  # fmt: skip
TINY = Size(
    {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 256,
    },
    samples=4, prompt=8, response=8, micro_batch_tokens=(32,),
)  # fmt: skip


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=path, required=True, help="the JSON file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and batch, to test the script")
    parser.add_argument("--peak-tflops", type=float, help="peak rate of the device in bfloat16; needed for MFU")
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES, choices=STAGES, help="default: 1 2 3")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    size, found = TINY if args.tiny else FULL, []
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder) / "model", size)
        for stage in args.stages:
            for tokens in size.micro_batch_tokens:
                setting = {"zero_stage": stage, "micro_batch_tokens": tokens}
                figures = in_new_process(Path(folder), size, stage, tokens, args.peak_tflops)
                print(setting, figures, flush=True)
                found.append(setting | figures)
                write_json(args.json, {"command": command(), **machine(), "device": args.device, "measured": found})


def make_model(folder: Path, size: Size) -> None:
    """Write the random model."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    context = size.prompt + size.response
    config = Qwen2Config(**size.shape, max_position_embeddings=context, tie_word_embeddings=False)
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def in_new_process(folder: Path, size: Size, stage: int, tokens: int, peak: float | None) -> dict[str, Any]:
    """Measure one setting in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, folder, size, stage, tokens, peak).result()


def measure(folder: Path, size: Size, stage: int, tokens: int, peak: float | None) -> dict[str, Any]:
    """Measure tokens per second and MFU of `evaluate` and `train`, and the peak memory in GiB."""
    import torch

    from metaalign_rl.config.learner import LearnerConfig
    from metaalign_rl.learner.batch import make_batch
    from metaalign_rl.learner.worker import Learner

    config = LearnerConfig(zero_stage=stage, micro_batch_tokens=tokens, minibatch_size=size.samples)
    rendezvous = f"file://{folder}/rendezvous-{stage}-{tokens}"
    ids = torch.randint(1, size.shape["vocab_size"], (size.samples, size.prompt + size.response)).tolist()
    batch = make_batch([(line[: size.prompt], line[size.prompt :]) for line in ids], pad_id=0)
    try:
        learner = Learner(config, 0, 1, rendezvous, dtype="bfloat16", seed=0)
        model = folder / "model"
        learner.setup(model, model, model)
        evaluated = learner.evaluate(batch)
        assert evaluated is not None and evaluated.values is not None
        ready = replace(evaluated, advantages=torch.ones_like(evaluated.values), returns=evaluated.values + 1)
        seconds = {"evaluate": timed(lambda: learner.evaluate(batch)), "train": timed(lambda: learner.train(ready))}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    policy, critic = flops(size, with_head=True), flops(size, with_head=False)
    work = {"evaluate": 2 * policy + critic, "train": 3 * (policy + critic)}
    figures: dict[str, Any] = {}
    for name, took in seconds.items():
        figures[name] = {
            "seconds": took,
            "tokens_per_second": size.samples * (size.prompt + size.response) / took,
            "tflops": work[name] / took / 1e12,
            "mfu": work[name] / took / 1e12 / peak if peak else None,
        }
    memory = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
    return figures | {"memory_gib": memory}


def timed(work: Callable[[], object]) -> float:
    """Return the seconds of the fastest of several calls, after one call to warm up."""
    import torch

    taken = []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


def flops(size: Size, *, with_head: bool) -> float:
    """Count the operations of a forward pass over the batch. The output layer is computed for answers only."""
    shape, length = size.shape, size.prompt + size.response
    hidden = shape["hidden_size"]
    keys = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * hidden * (hidden + keys) + 3 * hidden * shape["intermediate_size"] + hidden * length
    head = hidden * shape["vocab_size"] * size.response if with_head else 0
    return 2.0 * size.samples * (shape["num_hidden_layers"] * layer * length + head)


if __name__ == "__main__":
    main()
