"""Environments for peers that need other versions than the project."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from metaalign_rl.core.files import write_text

ROOT = Path(__file__).resolve().parents[2]
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def peer_python(name: str) -> str:
    """The Python of a peer's environment in build/peers/. The first call creates it, which takes 1 to 2 minutes.

    It has the packages of requirements/cpu.txt, in the versions of `benchmarks/peers/NAME.txt` where that names them.
    """
    folder = ROOT / "build" / "peers" / name
    python, wanted = folder / "bin" / "python", folder / "requirements.txt"
    text = requirements(name)
    if wanted.is_file() and wanted.read_text() == text:
        return str(python)
    print(f"creating {folder} for {name}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    (folder / "wanted.txt").write_text(text)
    torch = next(line for line in text.splitlines() if line.startswith("torch=="))
    if subprocess.run([*install, torch]).returncode:  # the configured index does not have the CPU build
        subprocess.run([*install, "--extra-index-url", TORCH_CPU_INDEX, torch], check=True)
    subprocess.run([*install, "-r", folder / "wanted.txt"], check=True)
    write_text(wanted, text)  # last: it says that the environment is complete
    return str(python)


def requirements(name: str) -> str:
    """The peer's versions, and those of the project for all other packages."""
    pins = {line.partition("==")[0]: line for line in _lines(ROOT / "benchmarks" / "peers" / f"{name}.txt")}
    others = {line.partition("==")[0]: line for line in _lines(ROOT / "requirements" / "cpu.txt")}
    return "".join(f"{line}\n" for line in (others | pins).values() if "==" in line)


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that this Python has."""
    program = (
        "import json, sys; from importlib.metadata import distributions;"
        "print(json.dumps({d.name: d.version for d in distributions() if d.name in sys.argv[1:]}))"
    )
    done = subprocess.run([python, "-c", program, *packages], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
