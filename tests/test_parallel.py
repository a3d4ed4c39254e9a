"""Work on many rows is split over processes, and gives what it gives in one."""

import os

import pytest
import torch

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.parallel import FEWEST, map_rows


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_results_are_in_order_and_come_from_several_processes() -> None:
    found = map_rows(lambda number: (number * number, os.getpid()), range(FEWEST + 1))
    assert [square for square, _ in found] == [number * number for number in range(FEWEST + 1)]
    assert os.getpid() not in {process for _, process in found}


def test_few_rows_stay_in_this_process() -> None:
    assert set(map_rows(lambda _: os.getpid(), range(10))) == {os.getpid()}


@pytest.mark.parametrize("count", [10, FEWEST])
def test_all_bad_rows_are_named(count: int) -> None:
    def work(number: int) -> int:
        if number % (count // 2) == 1:
            raise UserError(f"row {number} is bad")
        return number

    with pytest.raises(UserError, match=rf"2 bad rows:\n  row 1 is bad\n  row {count // 2 + 1} is bad"):
        map_rows(work, range(count))
