"""A user's reward function: it reads complete rows, counts by its weight, and never fails silently."""

from pathlib import Path

import pytest
from reward_toys import make_row

from metaalign_rl.config.schema import Config, PPOConfig, RewardConfig
from metaalign_rl.core.dataflow import Ending
from metaalign_rl.core.errors import UserError
from metaalign_rl.pipeline.stages.ppo import shaping
from metaalign_rl.preflight.checks import check_sources
from metaalign_rl.scoring.shaping import Shaping
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


ENDINGS = [Ending(finished=True, tokens=3), Ending(finished=False, tokens=32)]


@pytest.mark.parametrize(
    ("parameters", "value", "expected"),
    [
        ("*, finished, tokens", "[n * f for n, f in zip(tokens, finished)]", [3.0, 0.0]),
        ("tokens", "tokens", [3.0, 32.0]),
        ("finished=None", "finished", [1.0, 0.0]),
    ],
)
def test_a_function_may_read_how_a_response_ended(
    tmp_path: Path, parameters: str, value: str, expected: list[float]
) -> None:
    function = UserFunction(written(tmp_path, f"def score(rows, answers, {parameters}): return {value}"))
    assert function(ROWS, ["red", "red"], ENDINGS) == expected


def test_an_exception_about_an_ending_names_its_row(tmp_path: Path) -> None:
    function = UserFunction(
        written(tmp_path, "def score(rows, answers, tokens): return [1 / (n - 32) for n in tokens]")
    )
    with pytest.raises(UserError, match="division by zero .* on row 'second'"):
        function(ROWS, ["red", "red"], ENDINGS)


def test_a_function_without_these_parameters_is_called_as_before(tmp_path: Path) -> None:
    assert UserFunction(written(tmp_path, BY_TAG))(ROWS, ["red", "red"], ENDINGS) == [1.0, 0.0]


def test_a_truncated_response_is_penalized_after_the_clip(tmp_path: Path) -> None:
    function = written(tmp_path, "def score(rows, answers): return [5.0, 5.0]")
    shaped = Shaping(clip=(-1.0, 1.0), unfinished=0.4)
    worker = RewardWorker(RewardSpec(function=function, function_weight=1.0, shaping=shaped))
    rewards = worker.score(ROWS, ["red", "red"], ENDINGS)
    assert [(reward.value, reward.penalty) for reward in rewards] == [(1.0, 0.0), (pytest.approx(0.6), 0.4)]
    assert [reward.terms for reward in rewards] == [{"function": 5.0}] * 2


def test_without_settings_a_truncated_response_is_scored_like_a_finished_one(tmp_path: Path) -> None:
    worker = RewardWorker(RewardSpec(function=written(tmp_path, BY_TAG), function_weight=1.0))
    assert worker.score(ROWS, ["red", "blue"], ENDINGS) == worker.score(ROWS, ["red", "blue"])


@pytest.mark.parametrize(("tokens", "expected"), [(1, 0.0), (24, 0.0), (25, 0.25), (28, 1.0), (32, 2.0)])
def test_the_overlong_penalty_grows_over_the_last_tokens(tokens: int, expected: float) -> None:
    """DAPO, equation 13, times 2: with a limit of 32 and a buffer of 8 tokens."""
    penalty = Shaping(overlong=2.0, overlong_tokens=8, max_new_tokens=32).penalty(Ending(tokens < 32, tokens))
    assert penalty == expected


def test_the_settings_choose_the_penalties() -> None:
    assert shaping(Config()).penalty(Ending(False, 32)) == 0.0
    penalized = PPOConfig(unfinished="penalty", unfinished_penalty=0.5, overlong_tokens=4, overlong_penalty=0.25)
    assert shaping(Config(ppo=penalized)).penalty(Ending(False, 32)) == 0.75
    assert shaping(Config(ppo=PPOConfig(unfinished="mask"))).penalty(Ending(False, 32)) == 0.0


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
