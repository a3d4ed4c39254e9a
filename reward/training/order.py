"""The order in which rows are trained on."""

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random

from torch.utils.data import Sampler

from metaalign_rl.core.dataflow import LABELS, Row
from reward.examples import Example
from reward.training.config import RewardTraining

SORTED_BATCHES = 12  # how many batches are sorted by length together
FILLER = -1  # the index of an example without labels


class FlipsTogether(Sampler[int]):
    """All indices in random order, near those of like length, and the rows of a flip side by side.

    A flip's two rows hold the same answers with opposite labels. In one batch, what a model could learn from the
    answers alone cancels out, and what is left is the preference. A batch's end may still part some flips.
    An epoch's order depends on seed and epoch alone: a resumed training goes on with the rows that are left.

    Args:
        groups: of each row, the name of its flip, or one of its own.
        first: rows that come before all others, to within a window of batches.
        multiple: an epoch is filled up with `FILLER` to a multiple of so many, so that devices get equal shares.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        groups: Sequence[str],
        batch_size: int,
        seed: int,
        first: Sequence[int] = (),
        multiple: int = 1,
    ) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0
        self._first = frozenset(first)
        self._fillers = -len(lengths) % multiple
        by_group: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            by_group.setdefault(group, []).append(index)
        self._groups = list(by_group.values())

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths) + self._fillers

    def __iter__(self) -> Iterator[int]:
        rng = Random(f"{self._seed} {self._epoch}")
        groups = rng.sample(self._groups, len(self._groups))
        groups.sort(key=lambda group: group[0] not in self._first)
        window = SORTED_BATCHES * self._batch_size
        for start in range(0, len(groups), window):
            near = sorted(groups[start : start + window], key=lambda group: -self._lengths[group[0]])
            rows = [index for group in near for index in group]
            batches = [rows[at : at + self._batch_size] for at in range(0, len(rows), self._batch_size)]
            yield from (index for batch in rng.sample(batches, len(batches)) for index in batch)
        yield from [FILLER] * self._fillers


def make_order(rows: Sequence[Row], examples: Sequence[Example], config: RewardTraining, devices: int) -> FlipsTogether:
    """The rows' order for a training; `examples` are the rows tokenised."""
    return FlipsTogether(
        [example.length for example in examples],
        [row.tags.get("flip", row.id) for row in rows],
        config.batch_size,
        config.seed,
        first=_right_or_wrong(examples, int(config.easy_first_fraction * len(rows))),
        multiple=config.batch_size // config.gradient_accumulation if devices > 1 else 1,
    )


def _right_or_wrong(examples: Sequence[Example], count: int) -> list[int]:
    """The first `count` pairs of a right and a wrong answer: `dialog` tells them apart."""
    ranks = (example.ranked[LABELS.index("dialog")] for example in examples)
    return list(islice((index for index, rank in enumerate(ranks) if rank == 1), count))
