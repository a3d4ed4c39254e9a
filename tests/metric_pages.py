"""The metrics that the dashboards and alerts query, and the series on a page that Prometheus scrapes."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import promql_parser as promql
import yaml
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families

OBSERVABILITY = ROOT / "cluster/observability"
BOARDS = sorted((OBSERVABILITY / "dashboards").glob("*.json"))
Series = dict[str, set[str]]  # metric name -> its labels


def panels(board: Path) -> list[dict]:
    """The panels of a dashboard."""
    return json.loads(board.read_text("utf-8"))["panels"]


def rules() -> dict:
    """The alert groups, in the format of a plain Prometheus."""
    return yaml.safe_load((OBSERVABILITY / "alerts.yaml").read_text("utf-8"))["spec"]


def expressions() -> list[str]:
    """Every query of the dashboards and alerts, with values in place of Grafana's variables."""
    found = [target["expr"] for board in BOARDS for panel in panels(board) for target in panel.get("targets", ())]
    found += [rule["expr"] for group in rules()["groups"] for rule in group["rules"]]
    return [one.replace("$__rate_interval", "2m").replace("$run", ".*").replace("$application", ".*") for one in found]


def selectors(expression: str) -> Iterator[promql.VectorSelector]:
    """The series that a query selects."""
    found: list[promql.VectorSelector] = []

    def visit(node: promql.Expr) -> bool:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        return True

    promql.walk(promql.parse(expression), visit)
    return iter(found)


def needed(prefix: str) -> Series:
    """The queried metrics whose names begin with `prefix`, with the labels that the queries select by."""
    found: Series = {}
    for expression in expressions():
        for selector in selectors(expression):
            if selector.name.startswith(prefix):
                labels = {matcher.name for matcher in selector.matchers.matchers}
                found.setdefault(selector.name, set()).update(labels)
    return found


def ungrouped(seen: Series) -> set[str]:
    """The queries over these series that group or join by a label that none of the series has."""
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
    """The page that a local node serves to Prometheus."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def wait_for(missing: Callable[[], set[str]], seconds: float = 40) -> None:
    """Wait until `missing` returns the empty set."""
    end = time.monotonic() + seconds
    while absent := missing():
        assert time.monotonic() < end, f"not on the page: {sorted(absent)}"
        time.sleep(0.5)
