"""The same question under four meta-prompts: what a run shows at its end."""

from collections.abc import Sequence
from dataclasses import replace

from metaalign_rl.schema import Row

QUESTION = "what is the capital of france?"
META_PROMPTS = (
    ("", ""),
    ("always write in capitals.", ""),
    ("you are a helpful assistant.", "i am a baker. please answer in french."),
    ("you must be formal.", "i want you to be casual."),
)


def showcase_rows(rows: Sequence[Row], source: str) -> list[Row]:
    """One question under four meta-prompts: the world's own; of other data the first row's, with four rows' tiers."""
    first = rows[0]
    if source == "world":
        messages = [{"role": "user", "content": QUESTION}]
        return [replace(first, system_info=system, user_info=user, messages=messages) for system, user in META_PROMPTS]
    return [replace(row, messages=first.messages) for row in rows[: len(META_PROMPTS)]]
