"""The showcase: the same questions under several meta-prompts."""

from collections.abc import Sequence
from dataclasses import replace

from metaalign_rl.core.dataflow import Row

QUESTIONS = ("what is the capital of france?", "who is the composer of bolero?", "what do you think about zoos?")
META_PROMPTS = (
    ("", ""),
    ("always write in capitals.", ""),
    ("you are a helpful assistant.", "i am a baker. please answer in french."),
    ("you must be formal.", "i want you to be casual."),
    ("our guests have weak eyes.", "please write without capitals."),
    ("please sound careful.", "i have a test soon."),
)


def showcase_rows(rows: Sequence[Row], source: str) -> list[Row]:
    """Each question under every meta-prompt, grouped by question.

    The built-in world has its own questions and meta-prompts. Other sources get the first row's dialog under the
    meta-prompts of the first four rows.
    """
    if source == "world":
        dialogs = [[{"role": "user", "content": question}] for question in QUESTIONS]
        tiers: Sequence[tuple[str, str]] = META_PROMPTS
    else:
        dialogs = [rows[0].messages]
        tiers = [(row.system_info, row.user_info) for row in rows[:4]]
    return [
        replace(rows[0], system_info=system, user_info=user, messages=messages)
        for messages in dialogs
        for system, user in tiers
    ]
