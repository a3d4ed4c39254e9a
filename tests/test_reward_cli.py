"""`metaalign-reward`: reads and writes files, and prints one line for an error that the user can fix."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from reward_toys import color_pairs, language_model, reward_model
from safetensors.torch import load_file

from metaalign_rl.core.files import write_jsonl
from reward.cli import main

ROW = {
    "messages": [{"role": "user", "content": "what color is it"}],
    "response": "red",
    "system_info": "say red",
}


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": "one", "family": "helpful", **ROW}, {**ROW, "response": "blue"}])
    return path


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [row.to_json() for row in color_pairs(60)])
    return path


def run(*arguments):
    return main([str(argument) for argument in arguments])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_score_writes_one_line_per_row_in_order(rows, tmp_path):
    from reward import Scorer

    output = tmp_path / "scores.jsonl"
    assert run("score", "--model", reward_model(), "--input", rows, "--output", output, "--dtype", "float32") == 0
    first, second = read_lines(output)
    assert first["id"] == "one"
    assert "id" not in second
    expected = Scorer.from_pretrained(reward_model(), dtype="float32").score([ROW])[0]
    assert first["overall"] == pytest.approx(expected.overall, abs=1e-5)
    assert first["tiers"] == pytest.approx(expected.tiers, abs=1e-5)
    assert first["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    assert first["truncated"] is False


def test_max_tokens_limits_what_is_read_and_the_output_says_so(rows, tmp_path):
    output = tmp_path / "scores.jsonl"
    long = {**ROW, "messages": [{"role": "user", "content": "what color is it now " * 12}]}
    write_jsonl(rows, [ROW, long])
    for flags, truncated in (((), False), (("--max-tokens", 40), True)):
        assert run("score", "--model", reward_model(), "--input", rows, "--output", output, *flags) == 0
        assert [line["truncated"] for line in read_lines(output)] == [False, truncated]


@pytest.mark.parametrize("way", ["same", "relative", "link"])
@pytest.mark.parametrize("command", ["score", "explain", "evaluate"])
def test_the_input_is_never_overwritten(command, way, pairs, tmp_path, capsys, monkeypatch):
    output = pairs
    if way == "relative":
        monkeypatch.chdir(tmp_path)
        output = pairs.relative_to(tmp_path)
    if way == "link":
        output = tmp_path / "link.jsonl"
        output.hardlink_to(pairs)
    before = pairs.read_bytes()
    given = "--data" if command == "evaluate" else "--input"
    assert run(command, "--model", reward_model(), given, pairs, "--output", output) == 2
    assert "expected another file than the input" in capsys.readouterr().err
    assert pairs.read_bytes() == before


def test_evaluate_writes_or_prints_a_report(pairs, tmp_path, capsys):
    output = tmp_path / "report.json"
    command = ("evaluate", "--model", reward_model(), "--data", pairs, "--mode", "composed")
    assert run(*command, "--output", output) == 0
    assert run(*command) == 0
    report = json.loads(output.read_text())
    assert report["pairs"] == 60
    assert json.loads(capsys.readouterr().out) == report


def test_a_trained_model_can_score_and_be_exported(rows, pairs, tmp_path, capsys):
    model = tmp_path / "model"
    flags = ("--epochs", 1, "--learning-rate", 1e-3, "--max-tokens", 128, "--schedule", "linear")
    assert run("train", "--base", language_model(), "--data", pairs, "--output", model, *flags) == 0
    assert "1 updates" in capsys.readouterr().out
    assert run("score", "--model", model, "--input", rows, "--output", tmp_path / "scores.jsonl") == 0
    assert run("export", "--scalar", "--model", model, "--output", tmp_path / "scalar") == 0
    assert json.loads((tmp_path / "scalar" / "config.json").read_text())["id2label"] == {"0": "overall"}


@pytest.mark.parametrize("control", ["preference-blind", "tier-blind", "scalar"])
def test_train_and_evaluate_give_a_control_the_same_view(control, pairs, tmp_path):
    flags = ("--epochs", 1, "--max-tokens", 128, "--eval-data", pairs, "--control", control)
    model, output = tmp_path / control, tmp_path / "report.json"
    assert run("train", "--base", language_model(), "--data", pairs, "--output", model, *flags) == 0
    command = ("evaluate", "--model", model, "--data", pairs, "--output", output, "--control", control)
    assert run(*command) == 0
    report = json.loads(output.read_text())
    assert report["mode"] == "overall"
    if control != "scalar":  # the two rows of a tier flip look the same to a blind control
        assert report["tier_flip"]["accuracy"] == 0
    assert json.loads((model / "training.json").read_text())["config"]["labels"] == (
        "overall" if control == "scalar" else "all"
    )


def test_the_same_command_resumes_a_killed_training_and_gives_the_same_weights(pairs, tmp_path):
    """SIGKILL, as from the out-of-memory killer, leaves no chance to clean up."""
    flags = ("--epochs", 12, "--learning-rate", 1e-3, "--max-tokens", 128, "--batch-size", 16, "--checkpoint-steps", 5)
    command = ("train", "--base", language_model(), "--data", pairs, *flags)
    assert run(*command, "--output", tmp_path / "whole") == 0
    words = [str(word) for word in (*command, "--output", tmp_path / "cut")]
    with subprocess.Popen([sys.executable, "-c", "from reward.cli import main; main()", *words], cwd=ROOT) as process:
        second = tmp_path / "cut.checkpoints" / "checkpoint-10" / "trainer_state.json"
        while process.poll() is None and not second.exists():
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()
    assert run(*words) == 0
    cut, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=0)
    assert not (tmp_path / "cut.checkpoints").exists()


def write(path, text):
    path.write_text(text)
    return path


def score_line(folder, text):
    return ("score", "--model", reward_model(), "--input", write(folder / "bad.jsonl", text))


ERRORS = {
    "none.jsonl: no such file": lambda folder: (
        *("score", "--model", reward_model(), "--input", folder / "none.jsonl"),
    ),
    "none: no such folder": lambda folder: (
        *("score", "--model", folder / "none", "--input", write(folder / "rows.jsonl", json.dumps(ROW))),
    ),
    "bad.jsonl: it begins like a JSON array but is not valid JSON (maximum": lambda folder: score_line(
        folder, "[" * 200_000
    ),
    "not valid JSON (Exceeds": lambda folder: score_line(folder, "[" + "1" * 5000 + "]"),
    "bad.jsonl:1: not valid JSON (maximum": lambda folder: score_line(folder, '{"id": ' + "[" * 200_000),
    "bad.jsonl:1: not valid JSON (Exceeds": lambda folder: score_line(folder, '{"id": ' + "1" * 5000 + "}"),
    "bad.jsonl:2: not valid JSON": lambda folder: score_line(folder, json.dumps(ROW) + "\n{broken\n"),
    "bad.jsonl:1: field 'response'": lambda folder: score_line(folder, json.dumps({**ROW, "response": 1})),
    "bad.jsonl:1: field 'response': expected complete characters": lambda folder: score_line(
        folder, json.dumps({**ROW, "response": "half \ud83d"})
    ),
    "bad.jsonl:1: ": lambda folder: score_line(folder, json.dumps({**ROW, "system_info": "stone " * 200})),
    "batch_tokens: expected": lambda folder: (*score_line(folder, json.dumps(ROW)), "--batch-tokens", 0),
    "expected 1 to 128": lambda folder: (
        *("train", "--base", language_model(), "--max-tokens", 999),
        *("--data", write(folder / "pairs.jsonl", json.dumps(color_pairs(2)[0].to_json()))),
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_a_user_error_is_one_line_and_status_2(message, tmp_path, capsys):
    command = ERRORS[message](tmp_path)
    output = tmp_path / "output"
    assert run(*command, "--output", output) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("command", [(), ("score",), ("train",), ("evaluate",), ("export",)])
def test_help_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as end:
        run(*command, "--help")
    assert end.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_the_help_of_train_shows_settings_and_defaults(capsys):
    with pytest.raises(SystemExit):
        run("train", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--learning-rate LEARNING_RATE Peak learning rate" in text
    assert "(default: 1e-05)" in text
