"""The metrics of a PPO step: their values, where they are written, and their documentation."""

import json
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config, PPOConfig, RunConfig
from metaalign_rl.core.dataflow import Reward, Rollout, Sample
from metaalign_rl.core.files import read_jsonl, read_log
from metaalign_rl.data.world import build
from metaalign_rl.learner.batch import batch_of
from metaalign_rl.monitoring import metric_registry
from metaalign_rl.monitoring.backends import TensorBoardBackend
from metaalign_rl.monitoring.metrics_logger import MetricsLogger, open_metrics_logger
from metaalign_rl.ppo.step_metrics import rollout_metrics
from metaalign_rl.preflight import checks

STEP = {
    **dict.fromkeys((*metric_registry.RESPONSE_METRICS, *metric_registry.STEP_METRICS), 0.5),
    **{f"tier/user/{name}": 0.25 for name in metric_registry.RESPONSE_METRICS},
    **{f"seconds_{part}": 1.0 for part in metric_registry.PARTS},
    "seconds_step": float(len(metric_registry.PARTS)),
    "samples": 8,
}


def metrics(step: int, **figures: float) -> dict[str, float]:
    return {**STEP, "step": step, **figures}


def steps_in(path: Path) -> list[int]:
    return [line["step"] for _, line in read_jsonl(path)]


# Values.


def describe_two(first_versions: tuple[int, int] = (0, 0), version: int = 0) -> dict[str, float]:
    """The metrics of two responses: one token, reward 1, system tier; and three tokens, reward 0, user tier."""
    rows = build.prompts(0, 50)
    rollouts = []
    for tier, tokens, value, first in zip(("system", "user"), (1, 3), (1.0, 0.0), first_versions, strict=True):
        row = next(row for row in rows if row.tier == tier)
        sample = Sample(0, [1], [2] * tokens, [-1.0] * tokens, "x", True, version, first_version=first)
        rollouts.append(Rollout(row, sample, Reward(value, value, None)))
    batch = batch_of([rollout.sample for rollout in rollouts], pad_id=0)
    mask = batch.action_mask.float()
    return rollout_metrics(rollouts, replace(batch, logprobs=-mask, ref_logprobs=-1.5 * mask), version)


def test_rewards_are_means_over_responses_and_nats_are_means_over_tokens() -> None:
    found = describe_two()
    assert found["reward"] == 0.5
    assert (found["response_tokens"], found["tier/user/response_tokens"]) == (2.0, 3.0)
    assert found["kl"] == found["tier/user/kl"] == pytest.approx(0.5)
    assert found["surprisal"] == found["tier/system/surprisal"] == pytest.approx(1.0)


def test_staleness_counts_the_updates_since_the_first_token_of_a_response() -> None:
    found = describe_two(first_versions=(7, 4), version=7)
    assert (found["staleness"], found["staleness_max"]) == (1.5, 3)


# Where they are written.


def test_the_metrics_of_a_repeated_step_replace_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for first in (1, 2):
        with MetricsLogger(path, TensorBoardBackend(tmp_path / "tensorboard")) as log:
            log.write(metrics(first))
            log.write(metrics(first + 1))
    assert steps_in(path) == [1, 2, 3]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("step")] == [1, 2, 3]


@pytest.mark.parametrize("left", [0, 1, 20, -1])
def test_a_line_that_a_kill_cut_off_breaks_neither_reading_nor_resuming(tmp_path: Path, left: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLogger(path) as log:
        log.write(metrics(1))
        whole = path.stat().st_size
        log.write(metrics(2))
    path.write_bytes(path.read_bytes()[whole:][:left].join([path.read_bytes()[:whole], b""]))
    assert [line["step"] for line in read_log(path)] == [1]
    with MetricsLogger(path) as log:
        log.write(metrics(2))
    assert steps_in(path) == [1, 2]


def test_the_cost_of_a_steps_line_does_not_grow_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(metrics(step)) + "\n" for step in range(1, 2001)))
    with MetricsLogger(path) as log:
        log.write(metrics(2001))
        before = path.stat()
        for name in ("read_log", "write_jsonl"):  # only the first line of a process may read the others
            monkeypatch.delattr(f"metaalign_rl.monitoring.metrics_logger.{name}")
        log.write(metrics(2002))
    after = path.stat()
    assert after.st_ino == before.st_ino
    assert after.st_size - before.st_size == len(path.read_text().splitlines()[-1]) + 1


def test_an_alarm_is_recorded_and_is_printed_once_even_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    for steps in (range(1, 31), range(31, 41)):
        with MetricsLogger(path) as log:
            for step in steps:
                log.write(metrics(step, kl=0.1 if step < 25 else 5.0))
    alarms = [line["step"] for line in read_log(path) if line["alarm"]]
    assert alarms == list(range(26, 41))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith("ALARM at step 26: exploding KL since step 24")


@pytest.mark.slow
def test_every_exported_name_is_on_the_page_that_prometheus_scrapes(local_ray: Config, tmp_path: Path) -> None:
    import ray

    config = Config(run=RunConfig(name="seen"), ppo=PPOConfig(steps=1))
    with open_metrics_logger(config, RunFolder(tmp_path)) as log:
        log.write(metrics(1))
        page = scrape(ray.nodes()[0], until=metric_registry.EXPORTED)
        again = scrape(ray.nodes()[0], until=[f"{metric_registry.PREFIX}step"])
    kinds = dict(re.findall(r"# TYPE ray_(metaalign_ppo_\w+?)(?:_total)? (\w+)", page))
    assert kinds == {name: exported.kind for name, exported in metric_registry.EXPORTED.items()}
    assert value(page, "reward", run="seen", tier="all", relation="all") == 0.5
    assert value(page, "reward", run="seen", tier="user", relation="all") == 0.25
    assert value(page, "samples_total", run="seen") == 8
    assert value(page, "seconds_total", run="seen", part="learn") == 1.0
    assert value(page, "step_seconds_count", run="seen") == 1
    assert value(again, "step", run="seen") == 1, "a gauge must be on every page while PPO runs"
    assert value(page, "finished_total", run="seen") == 1


def scrape(node: dict, until: Iterable[str]) -> str:
    """The first metrics page of a node that has all these names. The node listens on the loopback only."""
    assert node["NodeManagerAddress"] == "127.0.0.1"
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics") as answer:
            page = answer.read().decode()
        missing = [name for name in until if not re.search(rf"^ray_{name}(_total|_count)?{{", page, re.MULTILINE)]
        if not missing:
            return page
        time.sleep(0.2)
    raise AssertionError(f"no {missing} in\n{page}")


def value(page: str, name: str, **tags: str) -> float:
    (line,) = [
        line
        for line in page.splitlines()
        if line.startswith(f"ray_metaalign_ppo_{name}{{") and all(f'{k}="{v}"' in line for k, v in tags.items())
    ]
    return float(line.rpartition(" ")[2])


class StubRun:
    """The part of a W&B run that the code uses."""

    def __init__(self, **options: Any) -> None:
        self.options, self.finished = options, False
        self.logged: list[tuple[int, float]] = []

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.logged.append((step, metrics["reward"]))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[StubRun]:
    """The runs that were started on a stub of the package."""
    runs: list[StubRun] = []

    def init(**options: Any) -> StubRun:
        runs.append(StubRun(**options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return runs


def test_a_resumed_run_continues_the_same_run_on_weights_and_biases(wandb_runs: list[StubRun], tmp_path: Path) -> None:
    config = Config(run=RunConfig(name="seen", wandb_project="tiers"))
    for step in (1, 2):
        with open_metrics_logger(config, RunFolder(tmp_path / "run")) as log:
            log.write(metrics(step, reward=step / 10))
    first, second = wandb_runs
    assert first.options["project"] == "tiers" and first.options["name"] == "seen"
    assert first.options["id"] == second.options["id"]
    assert second.options["resume"] == "allow"
    assert second.options["config"]["ppo"]["kl_coef"] == config.ppo.kl_coef
    assert (first.logged, second.logged) == ([(1, 0.1)], [(2, 0.2)])
    assert first.finished and second.finished


def test_preflight_refuses_a_wandb_project_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (check,) = checks.check_wandb(Config(run=RunConfig(wandb_project="tiers")))
    assert not check.ok
    assert "pip install wandb" in check.remedy
    assert list(checks.check_wandb(Config())) == []


# Documentation.


def documented() -> set[str]:
    """The names in the first column of the tables in docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text("utf-8")
    first = re.findall(r"^\| (`[^|]+`) \|", text, re.MULTILINE)
    return {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}


def test_every_metric_and_every_exported_name_is_documented() -> None:
    known = {
        *metric_registry.RESPONSE_METRICS,
        *metric_registry.STEP_METRICS,
        metric_registry.SAMPLES,
        metric_registry.STEP_SECONDS,
    }
    known |= {f"seconds_{part}" for part in metric_registry.PARTS} | set(metric_registry.EXPORTED)
    known |= {f"{cut}/<{cut}>/{name}" for cut in ("tier", "relation") for name in metric_registry.RESPONSE_METRICS}
    assert documented() == known


def test_every_metric_of_a_run_is_in_the_registry(tiny_run: Path) -> None:
    unknown = {
        key for line in read_log(tiny_run / "metrics.jsonl") for key in line if not metric_registry.is_known(key)
    }
    assert not unknown, f"add to metaalign_rl/monitoring/metric_registry.py and docs/metrics.md: {sorted(unknown)}"
