"""Long inputs: scored in windows, with prefetched tokenising, on several processes."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from reward_toys import make_row, reward_model

from metaalign_rl.core.errors import UserError
from reward import Scorer, ScorerPool
from reward.inference.windows import prefetch, windows
from reward.scorer import WINDOW

ROWS = [make_row(id=str(index), response="red " * (1 + index % 7)) for index in range(WINDOW + 5)]


def test_windows_contain_all_items_in_order() -> None:
    assert list(windows(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(windows([], 2)) == []


def test_the_next_result_is_computed_while_one_is_in_use() -> None:
    started = [threading.Event() for _ in range(3)]

    def start(index: int) -> int:
        started[index].set()
        return index

    found = []
    for index in prefetch(start, range(3)):
        assert started[min(index + 1, 2)].wait(timeout=10)
        found.append(index)
    assert found == [0, 1, 2]


def test_a_stream_reads_at_most_two_windows_ahead() -> None:
    taken = 0

    def rows() -> Iterator[object]:
        nonlocal taken
        for row in ROWS * 3:
            taken += 1
            yield row

    scorer = Scorer.from_pretrained(reward_model(), device="cpu")
    next(scorer.stream(rows()))
    assert taken <= 2 * WINDOW


def test_an_error_names_the_place_of_the_row() -> None:
    scorer = Scorer.from_pretrained(reward_model(), device="cpu")
    rows = [ROWS[0], {"messages": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(UserError, match=r"^rows\[1\]: field 'response'"):
        scorer.score(rows)
    with pytest.raises(UserError, match="^mine.jsonl:9: field 'response'"):
        scorer.score(rows, ["mine.jsonl:8", "mine.jsonl:9"])


def test_a_pool_gives_the_scores_and_errors_of_a_scorer() -> None:
    expected = Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32").score(ROWS)
    with ScorerPool(reward_model(), ["cpu", "cpu"], dtype="float32") as pool:
        found = pool.score(ROWS)
        with pytest.raises(UserError, match=rf"^rows\[{WINDOW}\]: field 'response'"):
            pool.score([*ROWS[:WINDOW], {"messages": [{"role": "user", "content": "hi"}]}])
    assert [score.overall for score in found] == pytest.approx([score.overall for score in expected], abs=1e-5)


def test_a_pool_raises_the_error_of_loading_the_model(tmp_path: Path) -> None:
    with (
        ScorerPool(tmp_path / "nothing", ["cpu", "cpu"]) as pool,
        pytest.raises(UserError, match="nothing: no such folder"),
    ):
        pool.score(ROWS[:1])


def test_fewer_places_than_rows_are_an_error() -> None:
    scorer = Scorer.from_pretrained(reward_model(), device="cpu")
    with pytest.raises(ValueError, match="shorter"):
        scorer.score(ROWS[:2], ["only.jsonl:1"])
