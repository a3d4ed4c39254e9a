"""A user's reward function: it reads complete rows, counts by its weight, and never fails silently."""

from pathlib import Path

import pytest
from reward_toys import make_row

from metaalign_rl.config.schema import Config, PPOConfig, RewardConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.preflight.checks import check_sources
from metaalign_rl.scoring.terms import RewardSpec
from metaalign_rl.scoring.user_function import UserFunction, absolute
from metaalign_rl.scoring.worker import RewardWorker

ROWS = [make_row(id="first", tags={"goal": "red"}), make_row(id="second", tags={"goal": "blue"})]
BY_TAG = """
def score(rows, answers):
    return [float(row.tags["goal"] in answer) for row, answer in zip(rows, answers)]
"""


def written(folder: Path, text: str) -> str:
    """Write a file with this text; the name of its function `score` for the config."""
    (folder / "rewards.py").write_text(text)
    return f"{folder}/rewards.py:score"


def scored(folder: Path, text: str) -> list[float]:
    return UserFunction(written(folder, text))(ROWS, ["red", "red"])


def test_a_function_reads_the_complete_row(tmp_path: Path) -> None:
    assert scored(tmp_path, BY_TAG) == [1.0, 0.0]


def test_the_function_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, BY_TAG)
    monkeypatch.chdir(tmp_path)
    named = absolute("rewards.py:score")
    monkeypatch.chdir("/")
    assert UserFunction(named)(ROWS, ["red", "blue"]) == [1.0, 1.0]


@pytest.mark.parametrize("given", ["np.float32(0.5)", "True", "3"])
def test_any_finite_number_is_a_reward(tmp_path: Path, given: str) -> None:
    (value, _) = scored(tmp_path, f"import numpy as np\ndef score(rows, answers): return [{given}] * 2")
    assert type(value) is float


def test_function_and_checks_are_averaged_by_weight(tmp_path: Path) -> None:
    row = make_row(checks={"dialog": {"name": "verih.validate_lowercase"}}, tags={"goal": "red"})
    function = written(tmp_path, BY_TAG)
    worker = RewardWorker(RewardSpec(checks_weight=1.0, function=function, function_weight=3.0))
    assert [worker.score([row], [answer])[0].value for answer in ("red", "blue")] == [1.0, 0.25]


@pytest.mark.parametrize("bad", ["None", "float('nan')", "float('inf')", "'0.5'", "[1.0]"])
def test_an_error_names_the_function_row_and_value_of_a_reward_that_is_not_finite(tmp_path: Path, bad: str) -> None:
    with pytest.raises(UserError) as caught:
        scored(tmp_path, f"def score(rows, answers): return [0.5, {bad}]")
    for part in ("rewards.py:score", "row 'second'", repr(eval(bad))):
        assert part in str(caught.value)


@pytest.mark.parametrize(("given", "found"), [("[0.5]", "list of 1"), ("None", "NoneType"), ("'ab'", "str of 2")])
def test_a_wrong_number_of_rewards_is_an_error(tmp_path: Path, given: str, found: str) -> None:
    with pytest.raises(
        UserError, match=f"a list of 2 numbers, one per row, found {found} for rows 'first' to 'second'"
    ):
        scored(tmp_path, f"def score(rows, answers): return {given}")


def test_an_exception_is_an_error_with_its_row_and_line(tmp_path: Path) -> None:
    text = "def score(rows, answers):\n    return [1 / (row.id != 'second') for row in rows]"
    message = r"ZeroDivisionError: division by zero \(line 2 of rewards.py\) on row 'second' with answer 'red'"
    with pytest.raises(UserError, match=message):
        scored(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def scores(rows, answers): return []", "no function 'score'; did you mean 'scores'?"),
        ("import nothing_like_this", r"importing the file failed: ModuleNotFoundError: .* \(line 1 of rewards.py\)"),
    ],
)
def test_a_file_without_the_function_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        scored(tmp_path, text)


def test_preflight_finds_a_missing_file(tmp_path: Path) -> None:
    reward = RewardConfig(function=f"{tmp_path}/none.py:score")
    (check,) = check_sources(Config(reward=reward, ppo=PPOConfig(function_weight=1.0)))
    assert (check.name, check.ok) == ("reward.function", False)
    with pytest.raises(UserError, match="none.py: no such file"):
        UserFunction(reward.function)


def test_a_function_needs_a_weight_and_a_weight_needs_a_function() -> None:
    with pytest.raises(UserError, match="ppo.function_weight: expected 0 without reward.function"):
        Config(ppo=PPOConfig(function_weight=1.0))
    with pytest.raises(UserError, match="ppo.function_weight: expected a number above 0 with reward.function"):
        Config(reward=RewardConfig(function="a.py:score"))
    with pytest.raises(UserError, match="reward.function: expected path/to/file.py:name, found 'a.py'"):
        RewardConfig(function="a.py")
