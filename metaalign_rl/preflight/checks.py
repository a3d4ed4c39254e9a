"""What a run needs of this machine, compared with what is there. Light."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.checkpoints import is_checkpoint
from metaalign_rl.core.units import GIB
from metaalign_rl.data.public import ADAPTERS
from metaalign_rl.runtime.ray_session import is_submitted

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class PreflightCheck:
    """One thing that a run needs.

    Attributes:
        name: the key of the config that asks for it.
        remedy: what to do when it is not there.
        tight: it may fail or wait: an estimate came close, or others hold it; a run starts all the same.
    """

    name: str
    needed: str
    found: str
    ok: bool
    remedy: str
    tight: bool = False

    @property
    def verdict(self) -> str:
        """In a word."""
        return "MISSING" if not self.ok else "TIGHT" if self.tight else "ok"


def check_memory(config: Config) -> PreflightCheck:
    needed, found = config.cluster.memory_gib, free_memory() / GIB
    remedy = "free some memory, or lower the batch sizes and cluster.memory_gib with them"
    return PreflightCheck("cluster.memory_gib", f"{needed:g} GiB free", f"{found:.1f} GiB", found >= needed, remedy)


def check_root(config: Config) -> PreflightCheck:
    root = Path(config.run.root)
    if is_submitted() and not root.is_absolute():
        remedy = "the job works in a copy that Ray deletes: give a folder on storage that every node sees"
        return PreflightCheck("run.root", "an absolute folder", repr(config.run.root), False, remedy)
    good = is_writable(root)
    found = str(root.absolute()) if good else f"{root.absolute()}, not writable"
    return PreflightCheck("run.root", "a writable folder", found, good, "give another folder as run.root=FOLDER")


def check_disk(config: Config) -> PreflightCheck:
    needed = config.cluster.disk_gib
    found = shutil.disk_usage(nearest_folder(Path(config.run.root))).free / GIB
    remedy = "free some space, or give a run.root on another disk"
    return PreflightCheck("cluster.disk_gib", f"{needed:g} GiB free", f"{found:.1f} GiB", found >= needed, remedy)


def check_sources(config: Config) -> list[PreflightCheck]:
    """The folders and files that the config names; a hub's model only where SFT prepares it."""
    checks = []
    if config.data.source == "jsonl":
        checks.append(_check_path("data.path", config.data.path, "a readable folder", Path.is_dir))
    elif config.data.source == "verih":
        checks.append(_check_path("data.path", config.data.path, "a readable file", Path.is_file))
    elif config.data.source in ADAPTERS and not _is_hub_id(config.data.path):
        needed = f"a hub id such as {ADAPTERS[config.data.source].hub_id}, or a folder or file"
        checks.append(_check_path("data.path", config.data.path, needed, Path.exists))
    has_sft = "sft" in config.run.stages or RunFolder.of(config).sft.is_dir()
    starts_from_it = not has_sft and not {"reward", "ppo", "evaluate"}.isdisjoint(config.run.stages)
    if config.model.path and (starts_from_it or not _is_hub_id(config.model.path)):
        checks.append(_check_path("model.path", config.model.path, "a checkpoint folder", is_checkpoint))
    if config.reward.path:
        checks.append(_check_path("reward.path", config.reward.path, "a checkpoint folder", is_checkpoint))
    if config.reward.function:
        path = config.reward.function.rpartition(":")[0]
        checks.append(_check_path("reward.function", path, "a readable Python file", Path.is_file))
    if config.reward.url:
        checks.append(_check_url("reward.url", config.reward.url))
    return checks


def check_wandb(config: Config) -> Iterator[PreflightCheck]:
    """Whether the package is there that `run.wandb_project` asks for; the environment leaves it out."""
    if config.run.wandb_project and "ppo" in config.run.stages:
        found = find_spec("wandb") is not None
        remedy = "install it with `pip install wandb`, or leave run.wandb_project empty"
        yield PreflightCheck(
            "run.wandb_project", "the package wandb", "installed" if found else "not installed", found, remedy
        )


def _check_path(name: str, value: str, needed: str, is_good: Callable[[Path], bool]) -> PreflightCheck:
    path = Path(value)
    good = bool(value) and is_good(path) and os.access(path, os.R_OK)
    problem = ", which is none" if path.exists() else ", which does not exist"
    found = repr(value) if good or not value else f"{value!r}{problem}"
    return PreflightCheck(name, needed, found, good, f"give one as {name}=PATH")


def _check_url(name: str, url: str) -> PreflightCheck:
    """Whether a scorer's server is ready; asked once, before anything is started."""
    from urllib.error import URLError
    from urllib.request import urlopen

    try:
        with urlopen(f"{url.rstrip('/')}/ready", timeout=5):
            found = ""
    except (URLError, ValueError, OSError) as error:
        found = f", {getattr(error, 'reason', error)}"
    return PreflightCheck(
        name, "a server that is ready", f"{url!r}{found}", not found, "start it: metaalign-reward serve"
    )


def _is_hub_id(value: str) -> bool:
    """Whether it is a hub's `owner/name`: one whose first folder is here is a mistyped path instead."""
    return bool(_HUB_ID.fullmatch(value)) and value[0] != "." and not Path(value.split("/")[0]).exists()


def is_writable(path: Path) -> bool:
    """Whether files can be written under the folder, which need not exist yet."""
    return (path.is_dir() or not path.exists()) and os.access(nearest_folder(path), os.W_OK | os.X_OK)


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def free_memory() -> int:
    """Bytes that this machine, or the container's limit, leaves free. Cached files count as free."""
    free = _table(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        used = int((group / "memory.current").read_text()) - _table(group / "memory.stat")["inactive_file"]
        free = min(free, int(limit) - used)
    return free


def _table(path: Path) -> dict[str, int]:
    """The numbers of one of the kernel's files, by the first word of their lines."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
