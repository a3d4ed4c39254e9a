"""The order in which rows are trained on: the rows of a flip are kept together."""

from collections.abc import Iterator, Sequence
from itertools import islice
from random import Random

from torch.utils.data import Sampler

from metaalign_rl.core.dataflow import LABELS, Row
from reward.training.config import RewardTraining
from reward.training.examples import Example

SORTED_BATCHES = 12  # batches per window; rows are sorted by length inside a window
FILLER = -1  # the index of an example without labels


class FlipSampler(Sampler[int]):
    """All indices in random order, with similar lengths close together and the rows of a flip adjacent.

    The two rows of a flip have the same answers with opposite labels. In one batch, whatever the answers alone would
    teach cancels out, and the preference remains. A batch boundary may still separate a flip.

    The order of an epoch depends only on the seed and the epoch, so a resumed training gets the remaining rows.

    Args:
        lengths: tokens of each row.
        groups: name of each row's flip, or a unique name.
        batch_size: rows per batch, over all devices.
        seed: seed of the order.
        first: indices that come before all others, up to the end of a window.
        multiple: an epoch is extended with `FILLER` to a multiple of this, so that all devices get the same number.
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
        """Choose the epoch, from 0, whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths) + self._fillers

    def __iter__(self) -> Iterator[int]:
        rng = Random(f"{self._seed} {self._epoch}")
        groups = rng.sample(self._groups, len(self._groups))
        groups.sort(key=lambda group: group[0] not in self._first)
        window = SORTED_BATCHES * self._batch_size
        for start in range(0, len(groups), window):
            by_length = sorted(groups[start : start + window], key=lambda group: -self._lengths[group[0]])
            rows = [index for group in by_length for index in group]
            batches = [rows[at : at + self._batch_size] for at in range(0, len(rows), self._batch_size)]
            yield from (index for batch in rng.sample(batches, len(batches)) for index in batch)
        yield from [FILLER] * self._fillers


def make_sampler(rows: Sequence[Row], examples: Sequence[Example], config: RewardTraining, devices: int) -> FlipSampler:
    """The sampler of a training; `examples` are the tokenised rows."""
    return FlipSampler(
        [example.length for example in examples],
        [row.tags.get("flip", row.id) for row in rows],
        config.batch_size,
        config.seed,
        first=_right_or_wrong(examples, int(config.easy_first_fraction * len(rows))),
        multiple=config.batch_size // config.gradient_accumulation if devices > 1 else 1,
    )


def _right_or_wrong(examples: Sequence[Example], count: int) -> list[int]:
    """The first `count` pairs of a right and a wrong answer: pairs whose answers differ in the label `dialog`."""
    ranks = (example.ranked[LABELS.index("dialog")] for example in examples)
    return list(islice((index for index, rank in enumerate(ranks) if rank == 1), count))
