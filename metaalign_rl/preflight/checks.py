"""Checks of this machine: memory, disk, paths and servers that a run needs. Imports no heavy packages."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from metaalign_rl.config.schema import Config
from metaalign_rl.core.checkpoints import is_hub_id, require_context, require_loadable
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.loading import Kind, require_complete
from metaalign_rl.core.net import proxy_for, via
from metaalign_rl.core.units import GIB
from metaalign_rl.data.public import ADAPTERS
from metaalign_rl.runtime.ray_session import is_submitted

# Linux's names of the instructions that multiply bfloat16 matrices, on x86 and Arm.
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}


@dataclass(frozen=True, slots=True)
class PreflightCheck:
    """One requirement of a run.

    Attributes:
        name: the setting that requires it.
        needed, found: short texts, such as "4 GPUs" and "2".
        ok: the run may start.
        remedy: how to meet the requirement.
        is_warning: the run may start, but could fail, wait or be slow: an estimate is close to the limit, other jobs
            use the resource, or a CPU lacks instructions.
    """

    name: str
    needed: str
    found: str
    ok: bool
    remedy: str
    is_warning: bool = False

    @property
    def verdict(self) -> str:
        """MISSING, WARNING or ok."""
        return "MISSING" if not self.ok else "WARNING" if self.is_warning else "ok"


def check_memory(config: Config) -> PreflightCheck:
    """Whether `cluster.memory_gib` is free on this machine."""
    needed, found = config.cluster.memory_gib, free_memory() / GIB
    remedy = "free some memory, or lower cluster.memory_gib together with the batch sizes"
    return PreflightCheck("cluster.memory_gib", f"{needed:g} GiB free", f"{found:.1f} GiB", found >= needed, remedy)


def check_dtype(config: Config, cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[PreflightCheck]:
    """A warning if the run computes in bfloat16 on a CPU without instructions for it."""
    if config.cluster.gpus or config.model.dtype != "bfloat16":
        return
    lines = cpuinfo.read_text().splitlines()
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    if not flags & BFLOAT16_FLAGS:
        needed, found = "a CPU with bfloat16 instructions", "none, so bfloat16 is several times slower than float32"
        yield PreflightCheck("model.dtype", needed, found, True, "set model.dtype=float32", is_warning=True)


def check_root(config: Config) -> PreflightCheck:
    """Whether `run.root` is writable and, for a submitted job, absolute."""
    root = Path(config.run.root)
    if is_submitted() and not root.is_absolute():
        remedy = "the job runs in a copy that Ray deletes: give a folder on storage that every node sees"
        return PreflightCheck("run.root", "an absolute folder", repr(config.run.root), False, remedy)
    good = is_writable(root)
    found = str(root.absolute()) if good else f"{root.absolute()}, not writable"
    return PreflightCheck("run.root", "a writable folder", found, good, "give another folder as run.root=FOLDER")


def check_disk(config: Config) -> PreflightCheck:
    """Whether `cluster.disk_gib` is free under `run.root`."""
    needed = config.cluster.disk_gib
    found = shutil.disk_usage(nearest_folder(Path(config.run.root))).free / GIB
    remedy = "free some space, or give a run.root on another disk"
    return PreflightCheck("cluster.disk_gib", f"{needed:g} GiB free", f"{found:.1f} GiB", found >= needed, remedy)


def check_sources(config: Config) -> list[PreflightCheck]:
    """Whether the data, checkpoints, files and servers in the config exist.

    A hub id is not checked: the model is checked when it has been downloaded.
    """
    checks = []
    if config.data.source == "jsonl":
        checks.append(_check_path("data.path", config.data.path, "a readable folder", Path.is_dir))
    elif config.data.source == "verih":
        checks.append(_check_path("data.path", config.data.path, "a readable file", Path.is_file))
    elif config.data.source in ADAPTERS and not is_hub_id(config.data.path):
        needed = f"a hub id such as {ADAPTERS[config.data.source].hub_id}, or a folder or file"
        checks.append(_check_path("data.path", config.data.path, needed, Path.exists))
    if config.model.path.endswith(".gguf"):
        checks.append(_check_path("model.path", config.model.path, "a readable GGUF file", Path.is_file))
    elif config.model.path and not is_hub_id(config.model.path):
        checks.append(_check_checkpoint("model.path", config.model.path, "CausalLM", config.model.max_tokens))
    if config.reward.path:
        tokens = config.model.max_tokens
        checks.append(_check_checkpoint("reward.path", config.reward.path, "SequenceClassification", tokens))
    if config.reward.function:
        path = config.reward.function.rpartition(":")[0]
        checks.append(_check_path("reward.function", path, "a readable Python file", Path.is_file))
    if config.reward.url:
        checks.append(_check_url("reward.url", config.reward.url))
    return checks


def check_wandb(config: Config) -> Iterator[PreflightCheck]:
    """Whether `wandb` is installed, if `run.wandb_project` is set; the environment does not include it."""
    if config.run.wandb_project and "ppo" in config.run.stages:
        found = find_spec("wandb") is not None
        remedy = "install it with `pip install wandb`, or leave run.wandb_project empty"
        yield PreflightCheck(
            "run.wandb_project", "the package wandb", "installed" if found else "not installed", found, remedy
        )


def check_openrlhf(config: Config) -> Iterator[PreflightCheck]:
    """Whether `openrlhf`, which has PPO's losses, is installed: no extra for a device includes it."""
    if "ppo" in config.run.stages and find_spec("openrlhf") is None:
        remedy = "install it with `pip install --no-deps openrlhf`"
        yield PreflightCheck("run.stages", "the package openrlhf for ppo", "not installed", False, remedy)


def _check_path(name: str, value: str, needed: str, is_good: Callable[[Path], bool]) -> PreflightCheck:
    path = Path(value)
    good = bool(value) and is_good(path) and os.access(path, os.R_OK)
    problem = ", which is not one" if path.exists() else ", which does not exist"
    found = repr(value) if good or not value else f"{value!r}{problem}"
    return PreflightCheck(name, needed, found, good, f"give one as {name}=PATH")


def _check_checkpoint(name: str, value: str, kind: Kind, max_tokens: int) -> PreflightCheck:
    """Whether the checkpoint can be loaded with all of its weights, and has the context for `model.max_tokens`."""
    needed, folder = "a checkpoint that can be loaded", Path(value)
    if not folder.exists():
        made = " (a run's stage sft makes this folder: run it first)" if folder.name == "sft" else ""
        return PreflightCheck(name, needed, f"{value!r}, which does not exist", False, f"give one as {name}=PATH{made}")
    try:
        require_loadable(folder)
        require_complete(folder, kind)
        require_context(folder, max_tokens)
    except UserError as error:
        found, _, remedy = str(error).rpartition("; ")
        return PreflightCheck(name, needed, found, False, remedy)
    return PreflightCheck(name, needed, repr(value), True, "")


def _check_url(name: str, url: str) -> PreflightCheck:
    """Whether the scorer at `url` answers that it is ready."""
    from urllib.error import URLError
    from urllib.request import ProxyHandler, build_opener

    proxy = proxy_for(url)
    opener = build_opener(ProxyHandler({urlsplit(url).scheme: proxy} if proxy else {}))
    try:
        with opener.open(f"{url.rstrip('/')}/ready", timeout=5):
            found = ""
    except (URLError, ValueError, OSError) as error:
        found = f", {getattr(error, 'reason', error)}"
    remedy = f"it was asked{via(proxy)}" if proxy else "start it: metaalign-reward serve"
    return PreflightCheck(name, "a server that is ready", f"{url!r}{found}", not found, remedy)


def is_writable(path: Path) -> bool:
    """Whether files can be written in the folder, which may not exist yet."""
    return (path.is_dir() or not path.exists()) and os.access(nearest_folder(path), os.W_OK | os.X_OK)


def nearest_folder(path: Path) -> Path:
    """The folder itself if it exists, else its nearest existing parent."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def free_memory() -> int:
    """Free memory in bytes, of this machine or within the container's limit. Cached files count as free."""
    free = _table(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        used = int((group / "memory.current").read_text()) - _table(group / "memory.stat")["inactive_file"]
        free = min(free, int(limit) - used)
    return free


def _table(path: Path) -> dict[str, int]:
    """The numbers in one of the kernel's files, by the first word of each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
