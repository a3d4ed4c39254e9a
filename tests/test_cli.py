"""The command line: what it prints, and that every user mistake is one short line and status 2."""

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaalign_rl.cli import main
from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError
from metaalign_rl.runtime.root_cause import root_cause

ROOT = Path(__file__).resolve().parents[1]
ROW = {
    "id": "a",
    "family": "helpful",
    "relation": "system_only",
    "tier": "system",
    "system_info": "be brief",
    "user_info": "",
    "messages": [{"role": "user", "content": "what is the capital of norway?"}],
    "chosen": "oslo",
    "rejected": "bergen",
    "checks": {"dialog": {"name": "world.answers", "value": "oslo"}},
    "tags": {"split": "topic"},
}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a config that needs few resources."""
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    Path("config.yaml").write_text("run:\n  name: mine\ncluster: {cpus: 1, memory_gib: 0, disk_gib: 0}\n")
    return tmp_path


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Replace `pipeline.run`; the configs that it was called with."""
    runs: list[Config] = []
    replace_module(monkeypatch, "pipeline.run", run=runs.append)
    return runs


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Callable[..., Any]) -> None:
    module = types.ModuleType(f"metaalign_rl.{name}")
    vars(module).update(members)
    package, _, last = module.__name__.rpartition(".")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)


def write_rows(name: str, *records: dict[str, Any] | str) -> None:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    Path(name).write_text("\n".join(lines) + "\n")


# name: the command, and a part of its error message
MISTAKES = {
    "missing config": ("run missing.yaml", "missing.yaml: No such file"),
    "unknown key": ("run config.yaml ppo.lr=1", "unknown key 'ppo.lr'; did you mean "),
    "unknown key in a file": ("config unknown.yaml", "unknown.yaml:2: unknown key 'run.nmae'; did you mean"),
    "ill-typed key": (
        "run config.yaml ppo.steps=ten",
        "'ppo.steps': expected a whole number (int), found 'ten'",
    ),
    "word without =": ("config config.yaml ppo.steps", "'ppo.steps': expected key=value"),
    "no config": ("config", "give a config file"),
    "broken JSON": ("data validate broken.jsonl", "broken.jsonl:2: not valid JSON"),
    "wrong field": ("data validate wrong.jsonl", "wrong.jsonl:1: field 'tier': expected one of system, user"),
    "unknown check": ("data validate check.jsonl", "check.jsonl:3: field 'checks.dialog': unknown check"),
    "wrong argument": (
        "data validate args.jsonl",
        "args.jsonl:1: field 'checks.dialog': check 'world.answers'",
    ),
    "no rows": ("data show empty.jsonl", "empty.jsonl: the file holds no rows"),
    "no data file": ("data show none.jsonl", "none.jsonl: no such file"),
    "no model": ("run config.yaml model.path=/no/model", "needs a checkpoint that can be loaded, found '/no/model'"),
    "no scorer's server": ("run config.yaml reward.url=http://127.0.0.1:9", "reward.url: needs a server that is ready"),
    "no reward model": ("run config.yaml reward.path=nowhere", "reward.path: needs a checkpoint that can be loaded"),
    "no data": ("run config.yaml data.source=jsonl", "data.path: needs a readable folder, found ''"),
    "too few CPUs": ("run config.yaml cluster.cpus=4096", "cluster.cpus: needs 4096 CPUs, found "),
    "too little memory": ("run config.yaml cluster.memory_gib=1e6", "needs 1e+06 GiB free"),
    "no GGUF file": (
        "run config.yaml model.path=model.gguf",
        "model.path: needs a readable GGUF file, found 'model.gguf'",
    ),
    "output that is a file": (
        "data build config.yaml data.demonstrations=1 data.pairs=2 data.prompts=1 --output config.yaml",
        "config.yaml: ",
    ),
    "setting out of range": ("run config.yaml ppo.steps=0", "ppo.steps: expected 1 or more, found 0"),
    "unknown control": (
        "run config.yaml reward.controls=[tier]",
        "'reward.controls[0]': expected one of preference_",
    ),
    "no run": ("report nowhere", "nowhere: no such folder"),
    "unknown GPU": ("plan config.yaml --gpus 8 --gpu h1000", "--gpu h1000: unknown device; did you mean 'h100'"),
    "GPUs without a number": (
        "plan config.yaml --gpu h100",
        "--gpu h100: expected a number of GPUs, found none; give --gpus N",
    ),
    "uneven nodes": (
        "plan config.yaml --gpus 9 --nodes 2",
        "--gpus 9 --nodes 2: expected the same number of GPUs on each node",
    ),
    "unknown size": ("plan config.yaml --gpus 8 --model 6B", "--model 6B: no such checkpoint; give its folder, or"),
    "too large a model": (
        "plan config.yaml --gpus 1 --model 70B",
        "1 x NVIDIA H100 SXM are too small: a learner needs",
    ),
    "nothing to check": ("plan --check nowhere", "nowhere: no metrics.jsonl there; give the folder of a run"),
    "plan of nothing": ("plan", "give a config file, such as configs/quickstart.yaml, or --check RUN_DIR"),
}


@pytest.mark.parametrize(("command", "says"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_short_line_and_status_2(
    command: str, says: str, workplace: Path, pipeline: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("unknown.yaml").write_text("run:\n  nmae: x\n")
    write_rows("broken.jsonl", ROW, '{"id": ')
    write_rows("wrong.jsonl", ROW | {"tier": "sytem"})
    write_rows("check.jsonl", ROW, "", ROW | {"id": "b", "checks": {"dialog": {"name": "world.answer"}}})
    write_rows("args.jsonl", ROW | {"checks": {"dialog": {"name": "world.answers", "vlaue": "oslo"}}})
    write_rows("empty.jsonl")
    assert main.main(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert not pipeline


def test_run_passes_the_config_with_its_words_to_the_pipeline(workplace: Path, pipeline: list[Config]) -> None:
    assert main.main(["run", "config.yaml", "ppo.steps=3", "run.stages=[data, sft]"]) == 0
    assert (pipeline[0].run.name, pipeline[0].ppo.steps, pipeline[0].run.stages) == (
        "mine",
        3,
        ["data", "sft"],
    )


def test_preflight_prints_a_table_and_what_is_missing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["preflight", "config.yaml"]) == 0
    assert "ok  run.root" in capsys.readouterr().out
    assert main.main(["preflight", "config.yaml", "cluster.cpus=4096", "model.path=/no/model"]) == 2
    output = capsys.readouterr()
    assert "MISSING  cluster.cpus" in output.out
    assert "2 things that the run needs are missing" in output.err
    assert "set cluster.cpus=" in output.err


def test_a_run_prints_each_warning_of_the_preflight_once(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from metaalign_rl.pipeline import run
    from metaalign_rl.preflight import run as preflight_run
    from metaalign_rl.preflight.checks import PreflightCheck

    tight = PreflightCheck("memory", "much", "little", True, "free some", is_warning=True)
    there = PreflightCheck("cluster.cpus", "2 free", "1 free", True, "wait", is_warning=True)
    monkeypatch.setattr(preflight_run, "preflight", lambda config: [tight])
    monkeypatch.setattr(run, "cluster_preflight", lambda config: [there])
    monkeypatch.setattr(run.ray_session, "connect", lambda config: nullcontext())
    monkeypatch.setattr(run, "_run_stages", lambda config, claimed: None)
    assert main.main(["run", "config.yaml", "run.stages=[data]"]) == 0
    assert capsys.readouterr().err.count("warning: memory") == 1


def test_plan_prints_settings_that_the_config_accepts(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "config.yaml", "--model", "7B", "--gpus", "64", "model.max_tokens=2048", "--answer-tokens", "20"]
    assert main.main(asked) == 0
    page = capsys.readouterr().out
    assert "A policy of 7.62B parameters in bfloat16" in page
    assert "Layout: 64 x NVIDIA H100 SXM on 8 nodes" in page
    assert "not measured on this kind of device" in page
    words = page.partition("add to `metaalign-rl run CONFIG`:")[2].partition("\n\n")[0].split()
    assert main.main([*asked, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    config = loader.load(Config, Path("config.yaml"), [*words, "model.max_tokens=2048"])
    assert config.cluster.gpus == 64
    assert config.learner.world_size == figures["settings"]["learner.world_size"]
    assert config.learner.zero_stage == figures["settings"]["learner.zero_stage"]
    assert figures["seconds"]["step"] > 0 and figures["memory_gib"]["engine"]["KV cache"] > 0


def test_plan_for_this_machine_has_nothing_to_change(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "config.yaml"]) == 0
    page = capsys.readouterr().out
    assert "Layout: 1 CPU, used by all roles in turns" in page
    assert "The config has all of these settings already." in page
    assert "rates are measured on a CPU" in page


def test_load_reads_back_what_config_prints(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["config", "config.yaml", "sft.learning_rate=1e-4"]) == 0
    Path("resolved.yaml").write_text(capsys.readouterr().out)
    config = loader.load(Config, Path("resolved.yaml"), [])
    assert (config.run.name, config.sft.learning_rate) == ("mine", 1e-4)
    assert main.main(["config", "--describe"]) == 0
    assert "ppo.steps" in capsys.readouterr().out


def test_data_is_built_validated_and_shown(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [f"data.{use}=12" for use in ("demonstrations", "pairs", "prompts", "held_out_prompts", "held_out_pairs")]
    assert main.main(["data", "build", "config.yaml", "--output", "rows", *sizes]) == 0
    capsys.readouterr()
    assert main.main(["data", "validate", "rows/pairs.jsonl", "rows/held_out_prompts.jsonl"]) == 0
    output = capsys.readouterr().out
    assert "rows/pairs.jsonl: 12 rows" in output
    assert "chosen 12  rejected 12" in output
    assert "rows/held_out_prompts.jsonl: 12 rows" in output


def test_show_prints_a_row_for_reading(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows("rows.jsonl", ROW, ROW | {"id": "b"})
    assert main.main(["data", "show", "rows.jsonl", "-n", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a: system_only, helpful, governed by system",
        "  <System Info>   be brief",
        "  user            what is the capital of norway?",
        "  chosen          oslo",
        "  rejected        bergen",
        "  check dialog    world.answers value='oslo'",
        "  tags            split=topic",
    ]


def test_report_prints_a_runs_table(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Path] = []
    replace_module(monkeypatch, "report", show=shown.append)
    Path("runs").mkdir()
    assert main.main(["report", "runs"]) == 0
    assert shown == [Path("runs")]


def fail_inside() -> None:
    raise ZeroDivisionError("no samples\nin the batch")


def fail_with_a_cause() -> None:
    try:
        fail_inside()
    except ZeroDivisionError as error:
        raise RuntimeError("the stage failed") from error


def test_any_other_error_keeps_its_traceback_and_ends_with_the_root_cause(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.guarded(fail_with_a_cause, "again") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "RuntimeError: the stage failed" in error
    last = error.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ZeroDivisionError: no samples in the batch (")
    assert last.endswith("in fail_inside)")


def test_an_interrupt_prints_the_command_that_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert main.guarded(interrupt, "metaalign-rl run config.yaml") == 130
    assert "metaalign-rl run config.yaml" in capsys.readouterr().err


def test_a_user_error_is_the_root_cause_even_if_it_has_a_cause_or_was_wrapped() -> None:
    def wrapped() -> None:
        try:
            try:
                fail_inside()
            except ZeroDivisionError as error:
                raise UserError("value 3, file x: do this") from error
        except UserError as error:
            raise RuntimeError("the stage failed") from error

    with pytest.raises(RuntimeError) as caught:
        wrapped()
    assert root_cause(caught.value).is_user_error
    assert root_cause(caught.value).message == "value 3, file x: do this"


RAY_TEXT = """\x1b[36mray::Learner.step()\x1b[39m (pid=3, ip=10.0.0.1, actor_id=1, repr=<Learner>)
  File "/w/metaalign_rl/learner/worker.py", line 8, in step
    self._update(batch)
  File "/w/lib/torch/nn/functional.py", line 99, in linear
    return mm(a, b)
           ^^^^^^^^
ValueError: shapes (2, 3) and (4,) do not fit"""


@pytest.mark.parametrize("before", ["", "The actor died because of an error raised in its creation task, "])
def test_the_root_cause_is_read_from_rays_text_about_another_process(before: str) -> None:
    root = root_cause(RuntimeError(before + RAY_TEXT))
    assert str(root) == ("ValueError: shapes (2, 3) and (4,) do not fit (/w/metaalign_rl/learner/worker.py:8 in step)")


def run_job(folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Run jobs/reward.py with the checkout on PYTHONPATH, as Ray does for an uploaded working directory."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [
        sys.executable,
        str(ROOT / "jobs" / "reward.py"),
        "--config",
        str(folder / "config.yaml"),
        *words,
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_a_job_imports_the_package_reward_not_its_own_script_and_fails_with_the_error_last(workplace: Path) -> None:
    done = run_job(workplace, "cluster.cpus=4096")
    assert done.returncode == 2
    assert done.stderr.startswith("error: cluster.cpus: needs 4096 CPUs")


def test_a_job_of_one_stage_runs_only_that_stage(
    workplace: Path, pipeline: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/sft.py", "run.name=a", "--config", "config.yaml", "run.seed=3"])
    assert main.job(["sft"]) == 0
    assert pipeline[0].run.stages == ["sft"]
    assert (pipeline[0].run.name, pipeline[0].run.seed) == ("a", 3)


def test_the_examples_in_the_help_use_configs_that_exist() -> None:
    named = {word for word in main.EXAMPLES.split() if word.startswith("configs/")}
    assert named
    assert all((ROOT / name).is_file() for name in named)


@pytest.mark.parametrize(
    "words",
    [
        ["run", "config.yaml", "--force"],
        ["data", "show", "rows.jsonl", "extra"],
        ["data", "show", "rows.jsonl", "-n", "-1"],
        ["data", "show", "rows.jsonl", "-n", "0"],
        [],
    ],
)
def test_arguments_that_a_command_does_not_take_are_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(words)
    assert caught.value.code == 2
