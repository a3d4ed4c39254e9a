"""The world's preferences in invented words. No policy can know these, so it follows them only by chance."""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.world.preferences import CARRIERS, PEOPLE, WORDINGS

FUNCTION_WORDS = frozenset(
    re.findall(r"\w+", "a about all as at each for from have in is no of on the to too v with you")
)
SYLLABLES = ("ba", "do", "fe", "gu", "ki", "lo", "ma", "nu", "pe", "ri", "so", "tu", "va", "wo", "ze")


def rename(row: Row) -> Row:
    """The row with every content word of the world's preferences replaced by an invented word, in both tiers."""
    return replace(row, system_info=_rename(row.system_info), user_info=_rename(row.user_info))


def _rename(text: str) -> str:
    return re.sub(r"[a-z]+", lambda word: _invented().get(word[0], word[0]), text)


@cache
def _invented() -> dict[str, str]:
    """The invented word, always the same, for each content word of the preferences' wordings."""
    spoken = {word for phrase in _phrases() for word in re.findall(r"[a-z]+", phrase)}
    carriers = {word for carrier in (*CARRIERS, *PEOPLE) for word in re.findall(r"[a-z]+", carrier)}
    words = sorted(spoken - carriers - FUNCTION_WORDS)
    count = len(SYLLABLES)
    return {word: SYLLABLES[i % count] + SYLLABLES[i // count % count] for i, word in enumerate(words)}


def _phrases() -> Iterator[str]:
    for wording in WORDINGS.values():
        yield from (*wording.actions, *wording.situations, wording.thing)
