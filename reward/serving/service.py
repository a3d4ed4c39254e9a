"""The scorer with its batcher, for the app's handlers: texts are tokenised in a thread, then scored in batches."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from fastapi import HTTPException

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from reward.score import Score, make_score
from reward.scorer import EncodedText, Scorer
from reward.serving.batcher import Batcher
from reward.serving.config import ServingConfig
from reward.serving.error_replies import user_errors_as_422
from reward.serving.server_metrics import ServerMetrics

CHARACTERS_PER_TOKEN = 4  # an estimate, before a text is tokenised
CHUNK_CHARACTERS = 16_384  # of the texts that are tokenised together; other requests' texts come between two chunks


@dataclass(frozen=True, slots=True)
class Job:
    """One text to score.

    Attributes:
        characters: of the text; decides its cost.
        encode: makes its token ids, and its row if it has one. It may raise `UserError`.
    """

    characters: int
    encode: Callable[[], tuple[Row | None, EncodedText]]


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of one text, with its row if it has one and its number of tokens."""

    row: Row | None
    tokens: int
    score: Score


class ScoringService:
    """Checks, tokenises and scores the texts of requests."""

    def __init__(self, scorer: Scorer, config: ServingConfig, metrics: ServerMetrics) -> None:
        self.scorer, self.config, self.metrics = scorer, config, metrics
        self._tokenizing = ThreadPoolExecutor(1, "tokenize")  # runs while the batcher's thread scores
        self.batcher = Batcher(
            lambda texts: scorer.logits(texts, batch_tokens=config.batch_tokens).tolist(),
            batch_tokens=config.batch_tokens,
            queue_tokens=config.queue_tokens,
            max_wait=config.max_wait,
            metrics=metrics,
        )
        self.special_tokens: list[str] = scorer.tokenizer.all_special_tokens

    async def score(self, jobs: Sequence[Job]) -> list[Scored]:
        """The scores of texts. They count in the queue from before they are tokenised.

        Raises:
            HTTPException: a text cannot be read (422).
            QueueFull: too many tokens are waiting.
            CannotScore: the device does not work.
        """
        with self.batcher.admit(sum(map(self._estimate, jobs))) as logits:
            found = [text for chunk in _chunks(jobs) for text in await self._encode(chunk)]
            rows = await logits([encoded.ids for _, encoded in found])
        return [
            Scored(row, len(encoded.ids), self._score(values, encoded))
            for (row, encoded), values in zip(found, rows, strict=True)
        ]

    def row_job(self, characters: int, messages: int, make_row: Callable[[], Row], place: str) -> Job:
        """A row to score.

        Args:
            characters, messages: of the row; 0 messages if their number is not known before the row is made.
            make_row: makes the checked row; called in another thread.
            place: names the row in errors.

        Raises:
            HTTPException: the row is too large (413).
        """
        self._check_size("characters", characters, self.config.max_row_characters, place)
        self._check_size("messages", messages, self.config.max_row_messages, place)

        def encode() -> tuple[Row, EncodedText]:
            row = make_row()
            self._check_size("messages", len(row.messages), self.config.max_row_messages, place)
            encoded = self.scorer.encode_row(row, place)
            # Only what the reply needs is kept while the row waits.
            return replace(row, messages=[], chosen=None, rejected=None, checks={}, labels={}, tags={}), encoded

        return Job(characters, encode)

    def text_job(self, text: str | list[int], add_special_tokens: bool, place: str) -> Job:
        """A rendered text to score, as a string or as token ids.

        Raises:
            HTTPException: the text is too long (413).
        """
        if isinstance(text, str):
            self._check_size("characters", len(text), self.config.max_row_characters, place)
        characters = len(text) if isinstance(text, str) else CHARACTERS_PER_TOKEN * len(text)
        return Job(characters, lambda: (None, EncodedText(self._ids(text, add_special_tokens, place), False)))

    def check_number(self, number: int, name: str) -> None:
        """Refuse more rows than `max_rows`. `name` names the list of rows in the error.

        Raises:
            HTTPException: there are too many (413).
        """
        if number > self.config.max_rows:
            raise HTTPException(
                413, f"{name}: expected at most {self.config.max_rows}, found {number}; send several requests"
            )

    def _check_size(self, unit: str, size: int, most: int, place: str) -> None:
        if size > most:
            limit = f"the server's limit max_row_{unit}"
            raise HTTPException(413, f"{place}: expected at most {most:,} {unit} ({limit}), found {size:,}")

    def _estimate(self, job: Job) -> int:
        return min(self.scorer.max_tokens, job.characters // CHARACTERS_PER_TOKEN + 1)

    def _score(self, logits: list[float], encoded: EncodedText) -> Score:
        return make_score(logits, truncated=encoded.truncated, untrained=self.scorer.untrained)

    def _ids(self, text: str | list[int], add_special_tokens: bool, place: str) -> list[int]:
        tokenizer, longest = self.scorer.tokenizer, self.scorer.max_tokens
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens) if isinstance(text, str) else text
        if not 0 < len(ids) <= longest:
            raise UserError(f"{place}: expected 1 to {longest} tokens, found {len(ids)}")
        unknown = [token for token in ids if not 0 <= token < len(tokenizer)]
        if unknown:
            raise UserError(f"{place}: expected token ids from 0 to {len(tokenizer) - 1}, found {unknown[0]}")
        return ids

    async def _encode(self, jobs: Sequence[Job]) -> list[tuple[Row | None, EncodedText]]:
        with user_errors_as_422():
            return await asyncio.get_running_loop().run_in_executor(
                self._tokenizing, lambda: [job.encode() for job in jobs]
            )


def _chunks(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Split the jobs into lists of at most `CHUNK_CHARACTERS`, or a single job."""
    chunk: list[Job] = []
    characters = 0
    for job in jobs:
        if chunk and characters + job.characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
        chunk.append(job)
        characters += job.characters
    if chunk:
        yield chunk
