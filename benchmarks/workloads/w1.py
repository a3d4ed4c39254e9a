"""W1: compare PPO with OpenRLHF and RLOO with TRL. `benchmarks/peers/openrlhf_on_cpu/w1.py` describes the workload.

Each round runs the systems one after the other. Ours is `metaalign-rl run` with a config like a user's. It
reads the same prompts with the project's chat template, which adds two tokens to each.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.about import command
from benchmarks.peers.environment import peer_python, versions
from benchmarks.peers.openrlhf_on_cpu.w1 import make_workload
from benchmarks.workloads.common import CPUS, PACKAGES, TAIL, Timing, machine, parts_of, prompt, train, write_config
from metaalign_rl.core.files import read_jsonl, write_json, write_jsonl, write_text

PEERS = Path(__file__).resolve().parents[1] / "peers"
SAMPLES, NEW_TOKENS, MICRO_BATCH, CONTEXT = 128, 32, 32, 128
# Maximum of ours over theirs. PPO has a critic on both sides, RLOO on neither.
BARS = {
    "startup: ours / openrlhf": 1 / 3,
    "step: ours / openrlhf": 1 / 3,
    "step: ours_rloo / trl_rloo": 1.0,
}
REWARD = """def count_of_a(rows, answers):
    return [answer.count("a") / 10 for answer in answers]
"""
SETTINGS = {
    "run.stages": ["data", "ppo"],
    "cluster.cpus": CPUS,
    "cluster.memory_gib": 4,
    "cluster.pin": True,
    "data.source": "jsonl",
    "model.max_tokens": CONTEXT,
    "rollout.kv_cache_gib": 0.25,
    "rollout.max_new_tokens": NEW_TOKENS,
    "learner.learning_rate": 1e-5,
    "learner.critic_learning_rate": 1e-4,
    "learner.minibatch_size": SAMPLES,
    "learner.epochs": 1,
    "learner.value_clip": 0.5,
    "ppo.model_weight": 0.0,
    "ppo.function_weight": 1.0,
    "ppo.kl_coef": 0.01,
    "ppo.lam": 1.0,
}
PPO = {
    "model.dtype": "bfloat16",
    "learner.zero_stage": 2,
    "ppo.prompts_per_step": SAMPLES,
    "ppo.samples_per_prompt": 1,
}
RLOO = {
    "ppo.algorithm": "rloo",
    "model.dtype": "float32",
    "learner.learning_rate": 1e-6,
    "learner.zero_stage": 0,
    "learner.share_prompts": True,
    "learner.old_logprobs": "engine",
    "rollout.engines": CPUS,  # small models gain little from a second thread, but more engines start slower
    "learner.world_size": CPUS,
    "ppo.stream_chunks": 1,  # all answers end at about the same time
    "ppo.prompts_per_step": SAMPLES // 2,
    "ppo.samples_per_prompt": 2,
}


def run(args: argparse.Namespace) -> None:
    """Measure the systems in turns. Write the results after each round."""
    if unknown := set(args.only) - set(SYSTEMS):
        sys.exit(f"--only: expected some of {', '.join(SYSTEMS)}, found {', '.join(sorted(unknown))}")
    chosen = {name: system for name, system in SYSTEMS.items() if name in (args.only or SYSTEMS)}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for number in range(1, args.rounds + 1):
        for name, system in chosen.items():
            with tempfile.TemporaryDirectory() as folder:
                found = system(Path(folder), args.steps)
            rounds[name].append(found)
            startup, step = found["startup_s"], found["step_s_median"]
            print(f"round {number}  {name:<10} start-up {startup:6.1f} s  step {step:.3f} s", flush=True)
        done = {name: summary(runs) for name, runs in rounds.items()}
        figures = {"command": command(), **machine(), **done, "ratios": ratios(done)}
        write_json(args.json, figures)
    for name, ratio in figures["ratios"].items():
        print(f"{name:<28} {ratio:.3f}, expected at most {BARS[name]:.3f}: {'ok' if ratio <= BARS[name] else 'MISSED'}")


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median start-up and step over the rounds, without each first step, and the rounds themselves."""
    step = statistics.median(second for one in rounds for second in one["step_s"][1:])
    return {
        "startup_s": statistics.median(one["startup_s"] for one in rounds),
        "step_s_median": step,
        "step_s": [second for one in rounds for second in one["step_s"]],
        "samples_per_second": SAMPLES / step,
        "rounds": list(rounds),
    }


def ratios(systems: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the ratios of ours over theirs for the measured systems."""
    found = {}
    for name in BARS:
        figure, _, pair = name.partition(": ")
        ours, theirs = pair.split(" / ")
        key = "startup_s" if figure == "startup" else "step_s_median"
        if ours in systems and theirs in systems:
            found[name] = systems[ours][key] / systems[theirs][key]
    return found


def ours(settings: dict[str, Any], folder: Path, steps: int) -> dict[str, Any]:
    """Run and time `metaalign-rl run`."""
    longest = make_ours(folder, steps * SAMPLES)
    places = {
        "run.name": "run",
        "run.root": str(folder),
        "data.path": str(folder / "data"),
        "model.path": str(folder / "policy"),
        "reward.function": f"{folder}/reward.py:count_of_a",
        "learner.micro_batch_tokens": MICRO_BATCH * (longest + NEW_TOKENS),
        "ppo.steps": steps,
        "ppo.save_steps": steps,
    }
    write_config(folder / "config.yaml", SETTINGS | settings | places)
    timing, lines = train(folder / "config.yaml", folder / "run")
    return _found(timing) | {"parts": parts_of(lines)}


def make_ours(folder: Path, prompts: int) -> int:
    """Write the peers' model with our chat template, their prompts as rows, and the reward function.

    Returns:
        The number of tokens of the longest prompt.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from metaalign_rl.core.meta_prompt import SPECIAL_TOKENS, MetaPrompt, encode, install
    from metaalign_rl.core.tokenizers import load_tokenizer

    logging.set_verbosity_error()  # it prints a long note about the new embeddings
    logging.disable_progress_bar()
    make_workload(str(folder), prompts)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[2:])})
    install(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    texts = [line["input"] for _, line in read_jsonl(folder / "prompts.jsonl")]
    write_jsonl(folder / "data" / "prompts.jsonl", (prompt(number, text) for number, text in enumerate(texts)))
    write_text(folder / "reward.py", REWARD)
    saved = load_tokenizer(folder / "policy")
    dialogs = [[{"role": "user", "content": text}] for text in texts]
    return max(len(encode(saved, MetaPrompt(), dialog, max_tokens=CONTEXT)) for dialog in dialogs)


def openrlhf(folder: Path, steps: int) -> dict[str, Any]:
    """Run stock OpenRLHF. Its script measures the start-up as ours does, by the end of the first step."""
    python = peer_python("openrlhf")
    said, _ = _peer("openrlhf_on_cpu/w1.py", folder, steps, python)
    return _found(Timing(said["startup_s"], said["step_s"])) | {"versions": versions(python, PACKAGES)}


def trl_rloo(folder: Path, steps: int) -> dict[str, Any]:
    """Run TRL's trainer. Its start-up is all time outside of steps, including making the workload and exiting."""
    said, took = _peer("trl_rloo_w1.py", folder, steps, sys.executable)
    return _found(Timing(took - sum(said["step_s"]), said["step_s"]))


def _peer(script: str, folder: Path, steps: int, python: str) -> tuple[dict[str, Any], float]:
    """Run a peer's script. Return the JSON of its last line, and its seconds."""
    words = [python, str(PEERS / script), "--steps", str(steps), "--workdir", str(folder)]
    began = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True)
    took = time.monotonic() - began
    if done.returncode:
        log = folder / "log.txt"
        sys.exit(f"{script}: {done.stderr[-TAIL:]}\n{log.read_text()[-TAIL:] if log.is_file() else ''}")
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said, took


def _found(timing: Timing) -> dict[str, Any]:
    return {"startup_s": timing.startup_s, "step_s_median": timing.median, "step_s": timing.step_s}


SYSTEMS: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "ours": partial(ours, PPO),
    "openrlhf": openrlhf,
    "ours_rloo": partial(ours, RLOO),
    "trl_rloo": trl_rloo,
}
