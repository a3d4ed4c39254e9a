"""Run a Dockerfile's install steps without a container engine: `python cluster/image/check.py Dockerfile [--keep DIR]`.

The script reads the COPY and RUN instructions from the file and runs them under a separate folder. The environment has
only PATH, HOME and pip's settings. Instructions that need root (apt-get, users) are skipped. At the end the script runs
the installed commands from outside the checkout.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("/opt", "/build", "/wheels")  # absolute paths in the image that are moved under the folder
NEEDS_ROOT = ("apt-get", "useradd")
ANSWERS = ("metaalign-rl --version", "metaalign-rl config configs/quickstart.yaml", "metaalign-reward --help")


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """Yield each instruction's name and arguments. Joins continued lines and drops the flags of RUN."""
    lines = "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, words = line.partition(" ")
            yield name, re.sub(r"--mount=\S+\s+", "", words).strip() if name == "RUN" else words.strip()


class Folder:
    """Runs instructions under `root`, which replaces the image's `/`. All build stages share it."""

    def __init__(self, root: Path) -> None:
        self.root, self.workdir = root, "/"
        pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        home = root / "home"
        home.mkdir()
        cache = subprocess.check_output(["python3", "-m", "pip", "cache", "dir"], text=True).strip()
        self.env = {"PATH": os.environ["PATH"], "HOME": str(home), "PIP_CACHE_DIR": cache, **pip}

    def inside(self, text: str) -> str:
        """Return the text with the image's folders replaced by those under `root`."""
        return re.sub(rf"(?<![\w.])({'|'.join(OURS)})\b", rf"{self.root}\1", text)

    def run(self, words: str) -> None:
        """Run a RUN instruction as the Dockerfile's shell does."""
        if any(name in words for name in NEEDS_ROOT):
            print(f"-- skipped: {words}", flush=True)
            return
        print(f"-- {words}", flush=True)
        subprocess.run(["sh", "-ec", self.inside(words)], check=True, cwd=self.inside(self.workdir), env=self.env)

    def copy(self, words: str) -> None:
        """Run a COPY from the checkout. A COPY between stages needs nothing: they share a folder."""
        if words.startswith("--from="):
            return
        *sources, target = shlex.split(words)
        for source in sources:
            place = Path(self.inside(self.workdir), target)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place = place / source if len(sources) > 1 else place / Path(source).name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)

    def do(self, name: str, words: str) -> None:
        """Run one instruction. Ignores those that only describe the image."""
        if name == "RUN":
            self.run(words)
        elif name == "COPY":
            self.copy(words)
        elif name == "WORKDIR":
            self.workdir = words
            Path(self.inside(words)).mkdir(parents=True, exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--keep", type=Path, help="install into this new or empty folder and keep it")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = (parsed.keep or Path(temporary)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        folder = Folder(root)
        for name, words in instructions(parsed.dockerfile.read_text("utf-8")):
            folder.do(name, words)
        for command in ANSWERS:
            folder.run(f"/opt/venv/bin/{command} > /dev/null")
    print("The install steps work.")


if __name__ == "__main__":
    main()
