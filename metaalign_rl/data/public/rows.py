"""Turns a pair of answers and the wishes that rank it into rows. All adapters use this module.

The data rank two answers but do not rate either on its own, so the rows have no absolute labels.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from metaalign_rl.core.dataflow import Row, Tier

Messages = list[dict[str, str]]

# The two objectives of the safety data, as the text of a tier.
HELPFUL = "Put helpfulness first: give the person all that was asked for."
HARMLESS = "Put safety first: say nothing that could do harm or help to do it."

_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Wish:
    """The text of a tier, and the answer that satisfies it better.

    Attributes:
        text: the tier's text.
        kind: the subject of the wish, for reports.
        chosen, rejected: the answer that satisfies the wish better, and the other one.
        strength: how much better, from 0 to 1, if the data state it.
    """

    text: str
    kind: str
    chosen: str
    rejected: str
    strength: float | None = None


def ask(question: str) -> Messages:
    """A dialog with one message, the user's question."""
    return [{"role": "user", "content": question.strip()}]


def split_turns(text: str, turn: re.Pattern[str]) -> Messages:
    """The messages of a dialog that is one text. Text before the first turn belongs to the user.

    Args:
        turn: matches the beginning of a turn; its one group is the speaker's name.
    """
    start, *turns = turn.split(text)
    messages = ask(start) if start.strip() else []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        messages.append({"role": _ROLES[speaker], "content": content.strip()})
    return messages


def flaw(messages: Messages, answers: Sequence[str]) -> str | None:
    """Why a dialog and its two answers make no pair, as a name to count such rows by; None if they make one."""
    turns = [message["role"] for message in messages]
    if not turns or turns[-1] != "user" or turns != [("user", "assistant")[at % 2] for at in range(len(turns))]:
        return "rows whose dialog does not alternate user and assistant"
    if not all(message["content"].strip() for message in messages):
        return "rows with an empty message"
    if not all(answer.strip() for answer in answers):
        return "rows with an empty answer"
    if len({answer.strip() for answer in answers}) == 1:
        return "rows whose two answers are equal"
    return None


def alone(identity: str, family: str, messages: Messages, wish: Wish, tier: Tier) -> Row:
    """The pair with the wish in one tier and no text in the other."""
    return Row(
        id=identity,
        family=family,
        relation=f"{tier}_only",
        tier=tier,
        system_info=wish.text if tier == "system" else "",
        user_info=wish.text if tier == "user" else "",
        messages=messages,
        chosen=wish.chosen,
        rejected=wish.rejected,
        strength=wish.strength,
        tags={"kind": wish.kind},
    )


def agreeing(identity: str, family: str, messages: Messages, system: Wish, user: Wish) -> Row:
    """The pair with two wishes that prefer the same answer."""
    row = alone(identity, family, messages, system, "system")
    return replace(row, relation="agree", user_info=user.text)


def opposed(identity: str, family: str, messages: Messages, x: Wish, y: Wish) -> Iterator[Row]:
    """Six rows from two wishes that prefer opposite answers.

    - Four rows have one wish in one tier and no text in the other.
    - Two rows are conflicts, with the wishes in either order. The system tier wins.

    They form three flip pairs, each with the same answers and opposite labels: one for each tier, in which the text
    differs, and the two conflicts, in which the order differs.
    """
    tiers: tuple[Tier, Tier] = ("system", "user")
    for tier in tiers:
        for name, wish in (("x", x), ("y", y)):
            row = alone(f"{identity}-{tier}-{name}", family, messages, wish, tier)
            yield _flip(row, f"{identity}-{tier}", "value")
    for name, wish, loser in (("x", x, y), ("y", y, x)):
        row = alone(f"{identity}-conflict-{name}", "priority", messages, wish, "system")
        yield _flip(replace(row, relation="conflict", user_info=loser.text), f"{identity}-conflict", "tier")


def _flip(row: Row, flip: str, kind: str) -> Row:
    return replace(row, tags=row.tags | {"flip": flip, "flip_kind": kind})
