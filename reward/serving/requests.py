"""What clients send and get, and how it becomes rows."""

from collections.abc import Sequence
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from metaalign_rl.schema import Row
from reward.data import answer_row
from reward.plugins.openrlhf import rows_of
from reward.score import Score


class Problem(BaseModel):
    """What is wrong with a request: one line, or a line for each field."""

    detail: str | list[dict[str, Any]]


class Message(BaseModel):
    """One message of the dialog."""

    model_config = ConfigDict(extra="forbid")
    role: str = Field(pattern="^(user|assistant)$")
    content: str


class AnswerRow(BaseModel):
    """An answer with the meta-prompt and the dialog that it answers; a row's other fields are allowed."""

    model_config = ConfigDict(extra="allow")
    messages: list[Message] = Field(min_length=1)
    response: str
    system_info: str = ""
    user_info: str = ""


class ScoreRequest(BaseModel):
    """Rows to be scored, one or many."""

    model_config = ConfigDict(extra="forbid")
    rows: AnswerRow | list[AnswerRow]

    def parsed(self) -> list[Row]:
        """The rows.

        Raises:
            UserError: names the row and the field.
        """
        rows = self.rows if isinstance(self.rows, list) else [self.rows]
        return [answer_row(row.model_dump(), f"rows[{index}]") for index, row in enumerate(rows)]


class ScoredRow(BaseModel):
    """What the reward model says of a row, in the order in which rows were sent."""

    id: str | None = None
    overall: float
    tiers: dict[str, float]
    probabilities: dict[str, float]

    @classmethod
    def of(cls, row: Row, score: Score) -> "ScoredRow":
        """A score as it is sent."""
        return cls(id=row.id or None, overall=score.overall, tiers=score.tiers, probabilities=score.probabilities)


class ScoreReply(BaseModel):
    """The scores: logits (`overall`, `tiers`) and their sigmoids."""

    model: str
    scores: list[ScoredRow]


class RewardRequest(BaseModel):
    """OpenRLHF's remote reward contract. Each label is the row as JSON; the answer is what follows the prompt."""

    query: list[str]
    prompts: list[str]
    labels: list[str]

    def parsed(self, special_tokens: Sequence[str]) -> list[Row]:
        """The rows, each with its answer.

        Raises:
            UserError: names the list, the place and the remedy.
        """
        return rows_of(self.query, self.prompts, self.labels, special_tokens)


class RewardReply(BaseModel):
    """`rewards` and `scores` are the probabilities that the answers are good; `extra_logs` those of each label."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


class ClassifyRequest(BaseModel):
    """As vLLM's /classify: texts that the meta-prompt's template rendered, or their token ids."""

    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None

    def texts(self) -> list[str | list[int]]:
        """Each text or list of ids."""
        one = isinstance(self.input, str) or (bool(self.input) and isinstance(self.input[0], int))
        return cast("list[str | list[int]]", [self.input] if one else self.input)


class Classified(BaseModel):
    """One text's labels."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(BaseModel):
    """As vLLM's; `probs` are independent probabilities, so they need not sum to 1."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classified]
    usage: dict[str, int]
