"""Before a training: every row that the run will read is rendered and measured, so that none ends the run later."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.checkpoints import require_context
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import BadRows, UserError
from metaalign_rl.core.meta_prompt import MetaPrompt, encode
from metaalign_rl.core.rows import read_rows
from metaalign_rl.core.tokenizers import load_tokenizer

PAIRS = ("pairs", "held_out_pairs")


def require_fitting_rows(config: Config, folder: RunFolder, checkpoint: Path) -> None:
    """Check that the checkpoint can read every row of the run's stages.

    Raises:
        UserError: `model.max_tokens` is above the model's context; or the template refuses a dialog, tiers and response
            do not fit, or the answers of a pair have the same tokens. Names all such rows, see `BadRows`.
    """
    require_context(checkpoint, config.model.max_tokens)
    ruler, bad = Ruler(load_tokenizer(checkpoint)), BadRows()
    for use, room in _rooms(config).items():
        if (path := folder.rows(use)).is_file():
            ruler.check_all(list(read_rows(path)), use, room, path, bad)
    bad.require_none()


class Ruler:
    """Finds rows that a model cannot read. Most are short enough to know without the tokenizer.

    A text has at most as many tokens as bytes in UTF-8. Where that is not enough room, and once for each pattern of a
    dialog, the row is rendered and encoded as training does it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._frames: dict[tuple[object, ...], int] = {}

    def check_all(self, rows: Sequence[Row], use: str, room: int, path: Path, bad: BadRows) -> None:
        """Check the rows of one use with the answers that are read of it.

        Args:
            room: tokens for a row with one answer.
            path: the rows' file, for errors.
        """
        for row in rows:
            for answer in _answers(row, use):
                with bad.collect():
                    self.check(row, answer, room, f"{path}: row {row.id!r}")
        for row in self._without_difference(rows) if use in PAIRS else ():
            with bad.collect():
                raise UserError(
                    f"{path}: row {row.id!r}: 'chosen' and 'rejected' are the same tokens for this model; remove the "
                    "row or make the answers differ"
                )

    def check(self, row: Row, answer: str | None, room: int, place: str) -> None:
        """Check one row with one of its answers, or without one.

        Raises:
            UserError: see `encode`.
        """
        roles = (message["role"] for message in row.messages)
        pattern = (*roles, bool(row.system_info), bool(row.user_info), answer is None)
        if pattern not in self._frames:
            self._encode(row, answer, 10**9, place)
            self._frames[pattern] = self._frame(row, answer)
        texts = (row.system_info, row.user_info, answer or "")
        if self._frames[pattern] + sum(len(text.encode()) for text in texts) > room:
            self._encode(row, answer, room, place)

    def _frame(self, row: Row, answer: str | None) -> int:
        """Tokens of the template's own text, with the least of a dialog."""
        least = Row(
            id=row.id, family=row.family, relation=row.relation, tier=row.tier,
            system_info="x" if row.system_info else "", user_info="x" if row.user_info else "",
            messages=[{"role": "user", "content": "x"}],
        )  # fmt: skip
        return len(self._encode(least, None if answer is None else "x", 10**9, row.id))

    def _encode(self, row: Row, answer: str | None, room: int, place: str) -> list[int]:
        meta = MetaPrompt(row.system_info, row.user_info)
        return encode(self._tokenizer, meta, row.messages, max_tokens=room, response=answer, place=place)

    def _without_difference(self, rows: Sequence[Row]) -> Iterator[Row]:
        """The pairs whose answers differ in text but not in tokens, for example in words that the vocabulary lacks."""
        pairs = [row for row in rows if row.chosen is not None and row.rejected is not None]
        if pairs:
            chosen = self._tokenizer([str(row.chosen).strip() for row in pairs], add_special_tokens=False)
            rejected = self._tokenizer([str(row.rejected).strip() for row in pairs], add_special_tokens=False)
            both = zip(pairs, chosen["input_ids"], rejected["input_ids"], strict=True)
            yield from (row for row, one, other in both if one == other)


def _rooms(config: Config) -> dict[str, int]:
    """The tokens for a row of each use that the run's stages read."""
    longest, stages = config.model.max_tokens, config.run.stages
    rooms: dict[str, int] = {}
    if "sft" in stages:
        rooms["demonstrations"] = longest
    if "reward" in stages:
        rooms |= dict.fromkeys(PAIRS[1:] if config.reward.path else PAIRS, longest)
    if "ppo" in stages or ("reward" in stages and config.reward.on_policy_prompts):
        rooms["prompts"] = longest - config.rollout.max_new_tokens
    if "evaluate" in stages:
        rooms |= dict.fromkeys(("held_out_prompts", "paraphrases"), longest - config.evaluate.max_new_tokens)
    if "ppo" in stages and config.ppo.evaluate_steps:
        room = longest - config.rollout.max_new_tokens
        rooms["held_out_prompts"] = min(room, rooms.get("held_out_prompts", room))
    return rooms


def _answers(row: Row, use: str) -> Iterator[str | None]:
    """The answers that are read after the row's prompt; None: the prompt alone."""
    if use == "demonstrations":
        yield row.response
    elif use in PAIRS:
        yield from (answer for answer in (row.chosen, row.rejected) if answer is not None)
        if row.labels.get("response"):
            yield row.response
    else:
        yield None
