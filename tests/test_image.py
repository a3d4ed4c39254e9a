"""The Dockerfiles, checked without Docker: a linter, and what the project and the manifests need of them."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT, load_script

DOCKERFILES = sorted((ROOT / "cluster/image").glob("Dockerfile.*"))
dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """The script that runs the steps of a Dockerfile without Docker."""
    return load_script(ROOT / "cluster/image/check.py")


@dockerfile
def test_the_linter_finds_no_problem(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@dockerfile
def test_every_copied_file_exists_and_is_not_ignored(dockerfile: Path, check: ModuleType) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [words.split()[:-1] for name, words in check.instructions(dockerfile.read_text()) if name == "COPY"]
    for source in (source for sources in copied for source in sources if not sources[0].startswith("--from")):
        assert (ROOT / source).exists()
        assert source.split("/")[0] in kept


@dockerfile
def test_the_image_runs_as_its_own_user_and_is_pinned(dockerfile: Path, check: ModuleType) -> None:
    found = list(check.instructions(dockerfile.read_text()))
    last = [words for name, words in found if name == "USER"]
    assert last == ["1000:1000"]
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm", found[0][1])
    device = dockerfile.suffix[1:]
    assert any(f"make packages DEVICE={device} DEV_REQUIREMENTS= VENV=/opt/venv" in words for _, words in found)


def test_the_two_images_have_most_steps_in_common(check: ModuleType) -> None:
    cpu, cuda = (list(check.instructions(path.read_text())) for path in DOCKERFILES)
    same = [one for one in cpu if one in cuda]
    assert len(same) > 0.7 * len(cpu)


def test_the_script_runs_the_steps_of_a_dockerfile_under_another_root(tmp_path: Path, check: ModuleType) -> None:
    folder = check.Folder(tmp_path)
    dockerfile = """
WORKDIR /build
COPY pyproject.toml LICENSE ./
COPY requirements/cpu.txt requirements/
COPY configs configs
RUN --mount=type=cache,target=/root/.cache/pip mkdir -p /opt/made \\
    && ls > /opt/made/list
RUN apt-get install -y what-is-not-there
"""
    for name, words in check.instructions(dockerfile):
        folder.do(name, words)
    assert (tmp_path / "opt/made/list").read_text().split() == ["LICENSE", "configs", "pyproject.toml", "requirements"]
    assert (tmp_path / "build/requirements/cpu.txt").read_text() == (ROOT / "requirements/cpu.txt").read_text()
    with pytest.raises(subprocess.CalledProcessError):
        folder.do("RUN", "false")
