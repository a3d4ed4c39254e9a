"""A running quickstart as another process sees it: its metrics, its open ports, and who may connect to its Ray."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen

import psutil
from metric_pages import Series, read, scrape
from processes import family

LIST_KEYS = "from ray._raylet import GcsClient; print(GcsClient(address={!r}).internal_kv_keys(b'', None))"


@dataclass
class Seen:
    """The observations of a run from outside.

    Attributes:
        series: the series on the metrics page of its Ray.
        listeners: addresses on which its processes listened, each with the process's name.
        stranger: output and errors of a client without the token that connects to its Ray.
        owner: the same of a client with the token.
        error: the last error of the watching process.
    """

    series: Series = field(default_factory=dict)
    listeners: set[tuple[str, str]] = field(default_factory=set)
    stranger: tuple[str, str] = ("", "")
    owner: tuple[str, str] = ("", "")
    error: str = ""

    def write(self, path: Path) -> None:
        """Save as JSON."""
        series = {name: sorted(labels) for name, labels in self.series.items()}
        path.write_text(json.dumps([series, sorted(self.listeners), self.stranger, self.owner, self.error]))

    @classmethod
    def read(cls, path: Path) -> "Seen":
        """Load what `write` saved."""
        series, listeners, stranger, owner, error = json.loads(path.read_text())
        series = {name: set(labels) for name, labels in series.items()}
        return cls(series, {(where, who) for where, who in listeners}, tuple(stranger), tuple(owner), error)


def watch(run: Popen) -> Seen:
    """Watch a run until it ends."""
    seen, known = Seen(), set()
    while run.poll() is None:
        time.sleep(2)
        try:
            look_at(family(run.pid)[1:], seen, known)
        except (psutil.Error, OSError) as error:  # something that starts or ends just now
            seen.error = repr(error)
    return seen


def look_at(processes: list[psutil.Process], seen: Seen, known: set[str]) -> None:
    """Add what there is to see of these processes. `known`: see `unknown_lines`."""
    seen.listeners |= set(listeners(processes))
    for page in map(scrape, metrics_ports(processes)):
        for name, labels in read(unknown_lines(page, known)).items():
            seen.series.setdefault(name, set()).update(labels)
    if seen.series and not seen.owner[0]:
        seen.stranger, seen.owner = connect_twice(processes)


def unknown_lines(page: str, known: set[str]) -> str:
    """The page's lines about series that are not in `known`, which are added to it: parsing is slow."""
    lines = {line.rpartition(" ")[0]: line for line in page.splitlines() if line and not line.startswith("#")}
    new = [line for series, line in lines.items() if series not in known]
    known.update(lines)
    return "".join(f"{line}\n" for line in new)


def listeners(processes: Iterable[psutil.Process]) -> Iterator[tuple[str, str]]:
    """The addresses on which processes listen, each with the process's name."""
    for process in processes:
        with suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield connection.laddr.ip, process.name()


def metrics_ports(processes: Iterable[psutil.Process]) -> Iterator[int]:
    """Ports of the metrics pages. Ray writes each node's port to a file in its session folder."""
    for folder in set(options(processes, "--session-dir=")):
        for file in Path(folder).glob("metrics_export_port_*"):
            with suppress(ValueError):  # not written yet
                yield int(file.read_text())


def options(processes: Iterable[psutil.Process], prefix: str) -> Iterator[str]:
    """The values of an option on the processes' command lines."""
    for process in processes:
        with suppress(psutil.Error):
            yield from (word.removeprefix(prefix) for word in process.cmdline() if word.startswith(prefix))


def connect_twice(processes: list[psutil.Process]) -> tuple[tuple[str, str], tuple[str, str]]:
    """Output and errors of two clients of the run's Ray: one without its token, one with it."""
    (address,) = set(options(processes, "--gcs-address="))
    (token,) = {process.environ().get("RAY_AUTH_TOKEN", "") for process in processes[:1]}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    stranger, owner = (
        subprocess.run(
            [sys.executable, "-c", LIST_KEYS.format(address)], env=plain | more, capture_output=True, text=True
        )
        for more in ({}, with_token)
    )
    return (stranger.stdout, stranger.stderr), (owner.stdout, owner.stderr)
