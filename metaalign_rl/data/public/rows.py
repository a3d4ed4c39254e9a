"""What the adapters share: pairs in tiers, as rows.

The data rank two answers and do not say that either is good by itself, so the rows have no absolute labels.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from metaalign_rl.core.dataflow import Row, Tier

Messages = list[dict[str, str]]

# The two objectives of the data on safety, as a tier says them.
HELPFUL = "Put helpfulness first: give the person all that was asked for."
HARMLESS = "Put safety first: say nothing that could do harm or help to do it."

_ROLES = {"Human": "user", "User": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Wish:
    """What a tier says, and which of two answers does it better.

    Attributes:
        kind: what the wish is about, for reports.
        strength: how much better, a share, where the data say it.
    """

    text: str
    kind: str
    chosen: str
    rejected: str
    strength: float | None = None


def ask(question: str) -> Messages:
    """A dialog of one question."""
    return [{"role": "user", "content": question.strip()}]


def split_turns(text: str, turn: re.Pattern[str]) -> Messages:
    """The messages of a dialog in one text; what stands before the first turn's mark is the user's.

    Args:
        turn: the mark that a turn begins with; its one group is who speaks.
    """
    start, *turns = turn.split(text)
    messages = ask(start) if start.strip() else []
    for speaker, content in zip(turns[::2], turns[1::2], strict=True):
        messages.append({"role": _ROLES[speaker], "content": content.strip()})
    return messages


def flaw(messages: Messages, answers: Sequence[str]) -> str | None:
    """Why a dialog and two answers to it make no pair, as a name to count such rows by; None where they do."""
    turns = [message["role"] for message in messages]
    if not turns or turns[-1] != "user" or turns != [("user", "assistant")[at % 2] for at in range(len(turns))]:
        return "rows whose dialog is not user and assistant in turn"
    if not all(message["content"].strip() for message in messages):
        return "rows with an empty message"
    if not all(answer.strip() for answer in answers):
        return "rows with an empty answer"
    if len({answer.strip() for answer in answers}) == 1:
        return "rows whose two answers are alike"
    return None


def alone(identity: str, family: str, messages: Messages, wish: Wish, tier: Tier) -> Row:
    """The pair under the wish in one tier, the other one empty."""
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
    """The pair under two wishes that the same answer does better."""
    row = alone(identity, family, messages, system, "system")
    return replace(row, relation="agree", user_info=user.text)


def opposed(identity: str, family: str, messages: Messages, x: Wish, y: Wish) -> Iterator[Row]:
    """Six rows of two wishes that rank the same answers in opposite ways.

    Each wish in each tier alone, then the two conflicts, which the system wins. They are three flips: the answer to
    prefer turns with the text in one tier, and with the order of the same two texts.
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
