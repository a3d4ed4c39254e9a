"""What Prometheus would see of a run while it goes on, and what the boards and alerts ask for."""

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from urllib.error import URLError
from urllib.request import urlopen

import promql_parser as promql
import psutil
import yaml
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families

OBSERVABILITY = ROOT / "cluster/observability"
BOARDS = sorted((OBSERVABILITY / "dashboards").glob("*.json"))
Series = dict[str, set[str]]  # a metric's name and the labels that it has


def panels(board: Path) -> list[dict]:
    return json.loads(board.read_text("utf-8"))["panels"]


def rules() -> dict:
    """The groups of alerts, as a plain Prometheus reads them."""
    return yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text("utf-8"))["spec"]


def expressions() -> list[str]:
    """All that boards and alerts ask for, with values for Grafana's variables."""
    asked = [target["expr"] for board in BOARDS for panel in panels(board) for target in panel.get("targets", ())]
    asked += [rule["expr"] for group in rules()["groups"] for rule in group["rules"]]
    return [one.replace("$__rate_interval", "2m").replace("$run", ".*").replace("$application", ".*") for one in asked]


def selectors(expression: str) -> Iterator[promql.VectorSelector]:
    """The series that an expression selects."""
    found: list[promql.VectorSelector] = []

    def visit(node: promql.Expr) -> bool:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        return True

    promql.walk(promql.parse(expression), visit)
    return iter(found)


def needed(prefix: str) -> Series:
    """Names that begin with `prefix` and the labels by which they are selected."""
    asked: Series = {}
    for expression in expressions():
        for selector in selectors(expression):
            if selector.name.startswith(prefix):
                labels = {matcher.name for matcher in selector.matchers.matchers}
                asked.setdefault(selector.name, set()).update(labels)
    return asked


def ungrouped(seen: Series) -> set[str]:
    """Expressions over these series that group or join by a label that none of them has."""
    wrong = set()
    for expression in expressions():
        names = {selector.name for selector in selectors(expression)}
        by = {label for cut in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression) for label in cut.split(", ")}
        if names <= seen.keys() and not by <= set().union(*(seen[name] for name in names)):
            wrong.add(expression)
    return wrong


def read(page: str) -> Series:
    """The series on a page."""
    seen: Series = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            seen.setdefault(sample.name, set()).update(sample.labels)
    return seen


def scrape(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


@dataclass
class Seen:
    """What was seen of a run from outside while it went on.

    Attributes:
        series: on the page of its Ray.
        listeners: the addresses at which its processes listened, each with a process's name.
    """

    series: Series = field(default_factory=dict)
    listeners: set[tuple[str, str]] = field(default_factory=set)

    def write(self, path: Path) -> None:
        series = {name: sorted(labels) for name, labels in self.series.items()}
        path.write_text(json.dumps([series, sorted(self.listeners)]))

    @classmethod
    def read(cls, path: Path) -> "Seen":
        series, listeners = json.loads(path.read_text())
        return cls({name: set(labels) for name, labels in series.items()}, {(where, who) for where, who in listeners})


def watch(run: Popen) -> Seen:
    """Look at a run until it ends."""
    seen = Seen()
    while run.poll() is None:
        time.sleep(0.5)
        with suppress(psutil.Error):
            family = psutil.Process(run.pid).children(recursive=True)
            seen.listeners |= set(listeners(family))
            with suppress(URLError, ConnectionError, TimeoutError):
                for port in _ports(family):
                    for name, labels in read(scrape(port)).items():
                        seen.series.setdefault(name, set()).update(labels)
    return seen


def listeners(processes: Iterable[psutil.Process]) -> Iterator[tuple[str, str]]:
    """The addresses at which processes listen, each with its process's name."""
    for process in processes:
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield connection.laddr.ip, process.name()


def wait_for(missing: Callable[[], set[str]], seconds: float = 40) -> None:
    """Until nothing is missing."""
    end = time.monotonic() + seconds
    while absent := missing():
        assert time.monotonic() < end, f"not on the page: {sorted(absent)}"
        time.sleep(0.5)


def _ports(family: Iterable[psutil.Process]) -> Iterator[int]:
    """Ray keeps the port of each node's page in a file of its session, which its processes name."""
    words = {word for child in family for word in child.cmdline()}
    for folder in {word.partition("=")[2] for word in words if word.startswith("--session-dir=")}:
        for file in Path(folder).glob("metrics_export_port_*"):
            with suppress(ValueError):  # not written yet
                yield int(file.read_text())
