"""`pip install metaalign-rl` without extras: a reward model trains and scores without Ray, vLLM and the like.

The environment is real but made without downloads. It contains the project's own wheel, and links to the installed
packages that the wheel requires, directly or indirectly.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from reward_toys import color_pairs, language_model

from metaalign_rl.core.files import write_jsonl

ABSENT = ("ray", "vllm", "deepspeed", "openrlhf", "fastapi", "uvicorn", "peft", "datasets")
ROW = {"system_info": "say red", "messages": [{"role": "user", "content": "what color is it"}], "response": "red"}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of this environment."""
    folder = tmp_path_factory.mktemp("standalone")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python: Path = folder / "env/bin/python"
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    with ZipFile(built_wheel(folder)) as wheel:
        wheel.extractall(packages)
    (project,) = packages.glob("metaalign_rl-*.dist-info")
    for needed in closure(Distribution.at(project)):
        link(needed, packages)
    return python


def built_wheel(folder: Path) -> Path:
    """The wheel of this working tree. It is built from a copy, because setuptools writes into the source folder."""
    for name in ("reward", "metaalign_rl"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def closure(root: Distribution) -> Iterator[Distribution]:
    """The installed distributions that `root` requires, directly or indirectly, without its extras."""
    seen, waiting = set(), [(root, {""})]
    while waiting:
        needing, extras = waiting.pop()
        for text in needing.requires or ():
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            if name in seen:
                continue
            try:
                found = distribution(name)
            except PackageNotFoundError:  # requirements/overrides.txt leaves out packages that a CPU does not need
                continue
            seen.add(name)
            waiting.append((found, requirement.extras or {""}))
            yield found


def link(needed: Distribution, packages: Path) -> None:
    """Link a distribution's modules, packages and metadata into a folder."""
    for name in {file.parts[0] for file in needed.files or ()} - {"..", "__pycache__"}:
        target = packages / name
        if not target.exists():
            target.symlink_to(str(needed.locate_file(name)))


def run(python: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run the environment's interpreter outside the working tree."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, *map(str, words)]
    return subprocess.run(command, cwd=python.parent, env=env, capture_output=True, text=True)


def reward(python: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run `metaalign-reward` as its console script does."""
    return run(python, "-c", "import sys; from reward.cli import main; sys.exit(main())", *words)


def test_the_packages_of_the_extras_are_not_installed(python: Path) -> None:
    program = f"from importlib.util import find_spec; print([name for name in {ABSENT} if find_spec(name)])"
    assert run(python, "-c", program).stdout == "[]\n"
    assert "env/lib" in run(python, "-c", "import reward, metaalign_rl; print(reward.__file__)").stdout


def test_the_wheel_contains_the_command_line_and_all_files_that_it_reads(python: Path) -> None:
    assert run(python, "-m", "metaalign_rl", "--version").stdout.startswith("metaalign-rl ")
    (installed,) = (python.parents[1] / "lib").glob("python*/site-packages")
    for package in ("metaalign_rl", "reward"):
        for file in (ROOT / package).rglob("*.*"):
            assert file.suffix == ".pyc" or file.is_dir() or (installed / file.relative_to(ROOT)).is_file(), file


@pytest.mark.slow
def test_the_reward_model_trains_scores_evaluates_explains_and_exports(python: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [row.to_json() for row in color_pairs(60)])
    write_jsonl(tmp_path / "rows.jsonl", [ROW])
    steps = {
        "train": f"--base {language_model()} --data pairs.jsonl --output model --max-tokens 128",
        "score": "--model model --input rows.jsonl --output scores.jsonl",
        "evaluate": "--model model --data pairs.jsonl --output report.json",
        "explain": "--model model --input rows.jsonl --output moved.jsonl",
        "export": "--scalar --model model --output scalar",
    }
    program = f"""
import os
os.chdir({str(tmp_path)!r})
from reward.cli import main
for name, words in {steps!r}.items():
    assert main([name, *words.split()]) == 0, name
from reward import Scorer
print(Scorer.from_pretrained("model", device="cpu").score([{ROW!r}])[0].overall)
"""
    done = run(python, "-c", program)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "scores.jsonl").read_text())
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(scores["overall"], abs=1e-5)
    assert json.loads((tmp_path / "report.json").read_text())["pairs"] == 60
    assert set(json.loads((tmp_path / "moved.jsonl").read_text())["moved"]) == {"system"}
    assert json.loads((tmp_path / "scalar/config.json").read_text())["id2label"] == {"0": "overall"}


def test_the_error_of_serving_names_the_missing_extra(python: Path, tmp_path: Path) -> None:
    done = reward(python, "serve", "--model", tmp_path)
    assert done.returncode == 2
    assert done.stderr == 'error: serve: fastapi is not installed; pip install "metaalign-rl[serve]"\n'


def test_importing_the_package_loads_few_modules(python: Path) -> None:
    program = "import sys; before = set(sys.modules); import reward, reward.cli; print(*set(sys.modules) - before)"
    loaded = set(run(python, "-c", program).stdout.split())
    assert {"reward", "reward.cli"} <= loaded
    assert not {name.split(".")[0] for name in loaded} & {"torch", "transformers", "numpy", "httpx", "pydantic"}
    assert len(loaded) < 200
