"""Put load on the scorer's server from many clients. No request may be lost.

    python -m benchmarks.serving --json benchmarks/results/serving.json
    python -m benchmarks.serving --size 1m --seconds 5 --warm-up 2 --queue-tokens 4096 --json out.json   # a quick run

Starts `metaalign-reward serve` with a random model and sends new texts of 10 to 500 tokens through the retrying client.

Results:
    sent, answered, lost: requests over the full load
    tries: requests by status, from the server's metrics; clients repeat those with 429
    latency_seconds: until an answer, with retries, after the warm-up
    tokens_per_second: after the warm-up, from the server's metrics
    memory_mib: the server's resident memory
    max_score_difference: between a sample of the scores and those of a `Scorer` in this process

Clients and server share the machine. If other work runs on it too, set OMP_NUM_THREADS=1, because the threads of a
forward pass wait for each other.
"""

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.about import machine
from benchmarks.scorer import SIZES, make_model, mixed_rows
from metaalign_rl.core.arguments import path
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.files import write_json
from metaalign_rl.core.net import listen

SAMPLE = 256  # scores to compare
Memory = list[tuple[float, float]]  # seconds since the start of the load, MiB


@dataclass(slots=True)
class Asked:
    """One client's results: start and duration of each answered request, lost requests, and a sample of scores."""

    answered: list[tuple[float, float]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    sample: list[tuple[Row, list[float]]] = field(default_factory=list)


def main() -> int:
    """Measure and write. Return 1 if a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=path, required=True, help="the JSON file to write")
    parser.add_argument("--size", choices=SIZES, default="13m", help="parameters of the backbone (default: 13m)")
    parser.add_argument("--clients", type=int, default=64, help="default: 64")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of load after the warm-up (default: 60)")
    parser.add_argument("--warm-up", type=float, default=10, help="seconds of the warm-up (default: 10)")
    parser.add_argument(
        "--queue-tokens", type=int, default=262_144, help="limit of the server's queue; a small one makes it answer 429"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, words = make_model(Path(folder), SIZES[args.size])
        with serving(model, args.queue_tokens) as (url, pid):
            found = measure(url, pid, words, args.clients, args.warm_up, args.seconds)
        found["max_score_difference"] = difference(model, found.pop("sample"))
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    settings["threads"] = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count()
    write_json(args.json, {"command": "python -m benchmarks.serving", **settings, "machine": machine(), **found})
    show(found)
    return int(found["lost"] > 0)


@contextmanager
def serving(model: Path, queue_tokens: int) -> Iterator[tuple[str, int]]:
    """Run a real server; yield its address and process id. It must exit cleanly on SIGTERM."""
    with listen("127.0.0.1", 0) as found:
        port = found.getsockname()[1]
    words = ["serve", "--model", str(model), "--port", str(port), "--queue-tokens", str(queue_tokens)]
    words += ["--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-c", "import sys; from reward.cli import main; sys.exit(main())", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert f":{port}" in process.stdout.readline(), "the server did not start"
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
        assert process.wait(60) in (0, -signal.SIGTERM)


def measure(url: str, pid: int, words: list[str], clients: int, warm_up: float, seconds: float) -> dict[str, Any]:
    """Put load on the server and measure it."""
    ended, began, start = threading.Event(), time.monotonic(), resident(pid)
    share = -(-SAMPLE // clients)
    with ThreadPoolExecutor(clients) as pool:
        asking = [pool.submit(ask, url, words, number, share, began, ended) for number in range(clients)]
        memory = watch(url, pid, began, warm_up)
        tokens, since = counted(url)["metaalign_reward_tokens_total"], time.monotonic()
        memory += watch(url, pid, began, warm_up + seconds)
        rate = (counted(url)["metaalign_reward_tokens_total"] - tokens) / (time.monotonic() - since)
        ended.set()
        seen = [client.result() for client in asking]
    warm = next(mib for at, mib in memory if at >= warm_up)
    answered = [one for client in seen for one in client.answered]
    lost = [problem for client in seen for problem in client.lost]
    return {
        "sent": len(answered) + len(lost),
        "answered": len(answered),
        "lost": len(lost),
        "problems": Counter(lost),
        "tries": tries(counted(url)),
        "latency_seconds": latencies([took for at, took in answered if at >= warm_up]),
        "tokens_per_second": rate,
        "memory_mib": {
            "start": start, "after_warm_up": warm, "end": memory[-1][1], "growth": memory[-1][1] - warm,
            "over_time": memory,
        },
        "sample": [one for client in seen for one in client.sample],
    }  # fmt: skip


def ask(url: str, words: list[str], number: int, share: int, began: float, ended: threading.Event) -> Asked:
    """Run one client. It sends a new text after each answer and keeps the first `share` scores."""
    from reward.serving.client import RemoteScorer, ScorerUnavailable

    seen, remote, rng = Asked(), RemoteScorer(url), random.Random(f"client {number}")
    while not ended.is_set():
        rows, start = mixed_rows(words, rng, 1), time.monotonic()
        try:
            (score,) = remote.score(rows)
        except (ScorerUnavailable, ValueError) as error:
            seen.lost.append(str(error))
            continue
        seen.answered.append((start - began, time.monotonic() - start))
        if len(seen.sample) < share:
            seen.sample.append((rows[0], list(score.logits.values())))
    remote.close()
    return seen


def watch(url: str, pid: int, began: float, until: float) -> Memory:
    """Record the memory every second and print the progress."""
    memory: Memory = []
    while not memory or memory[-1][0] < until:
        time.sleep(min(1.0, max(0.0, began + until - time.monotonic()) + 0.01))
        memory.append((round(time.monotonic() - began, 1), resident(pid)))
        at, mib = memory[-1]
        line = f"{at:5.0f} s  tries {tries(counted(url))}  memory {mib:.0f} MiB"
        if sys.stderr.isatty() or len(memory) % 10 == 0:
            print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    return memory


def counted(url: str) -> dict[str, float]:
    """Read the server's metrics, with the requests to `/score` by status."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    found = {}
    for sample in (sample for family in families for sample in family.samples):
        if not sample.labels:
            found[sample.name] = sample.value
        elif sample.name == "metaalign_reward_requests_total" and sample.labels["path"] == "/score":
            found[f"status {sample.labels['status']}"] = sample.value
    return found


def tries(counts: dict[str, float]) -> dict[str, int]:
    """Return the requests that reached the server, by status."""
    return {name.split()[1]: int(count) for name, count in counts.items() if name.startswith("status ")}


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the maximum."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": cuts[49], "p99": cuts[98], "max": max(seconds)}


def difference(model: Path, sample: list[tuple[Row, list[float]]]) -> float:
    """Return the largest difference between a logit and that of a `Scorer`."""
    from reward import Scorer

    scores = Scorer.from_pretrained(model, device="cpu", dtype="float32").score([row for row, _ in sample])
    pairs = zip((list(score.logits.values()) for score in scores), (logits for _, logits in sample), strict=True)
    return max(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))


def show(found: dict[str, Any]) -> None:
    """Print the results."""
    latency, memory = found["latency_seconds"], found["memory_mib"]
    print(
        f"{found['sent']} requests sent, {found['answered']} answered, {found['lost']} lost; tries {found['tries']}\n"
        f"latency p50 {latency['p50']:.2f} s, p99 {latency['p99']:.2f} s; {found['tokens_per_second']:,.0f} tokens/s\n"
        f"memory {memory['start']:.0f} MiB at the start, {memory['after_warm_up']:.0f} after the warm-up, "
        f"{memory['end']:.0f} at the end: {memory['growth']:+.1f} MiB\n"
        f"scores differ by {found['max_score_difference']:.1e} at most"
    )


if __name__ == "__main__":
    sys.exit(main())
