"""What clients send and get, and how it becomes rows."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, model_validator

from metaalign_rl.core.dataflow import FAMILIES, RELATIONS, Row, Tier
from metaalign_rl.core.errors import nearest
from reward.examples import answer_row
from reward.plugins.openrlhf import rows_of
from reward.score import Score

# A list's first fault alone is reported: a body of a million faults must not become a million errors.
Strings = Annotated[list[str], Field(fail_fast=True)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
TokenIds = Annotated[list[Annotated[StrictInt, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
TokenLists = Annotated[list[TokenIds], Field(fail_fast=True)]
CLOSED: dict[str, Any] = {"additionalProperties": False}

_QUESTION: dict[str, Any] = {"system_info": "Answer in capitals.", "messages": [{"role": "user", "content": "hi"}]}
_EXAMPLE: dict[str, Any] = {**_QUESTION, "response": "HELLO"}
_LABELLED: dict[str, Any] = {"query": ["User: hi HELLO"], "prompts": ["User: hi"], "labels": [json.dumps(_QUESTION)]}


class Problem(BaseModel):
    """What is wrong with a request: one line, or where and what for each field."""

    detail: str | list[dict[str, Any]]


class Closed(BaseModel):
    """An object whose first unknown field is refused by name."""

    model_config = ConfigDict(json_schema_extra=CLOSED)

    @model_validator(mode="before")
    @classmethod
    def _knows_all_fields(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(f"unknown field {name!r}; {nearest(name, cls.model_fields)}")
        return value


class Message(Closed):
    """One message of the dialog."""

    role: str = Field(pattern="^(user|assistant)$")
    content: str


class AnswerRow(BaseModel):
    """An answer with the meta-prompt and the dialog that it answers. Of a row's other fields `id` comes back."""

    model_config = ConfigDict(extra="allow", json_schema_extra=CLOSED)  # `answer_row` names an unknown field
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True, description="the last one is the user's")]
    response: str
    system_info: str = ""
    user_info: str = ""
    id: str = ""
    family: str = Field("helpful", json_schema_extra={"enum": list(FAMILIES)})
    relation: str = Field("neutral", json_schema_extra={"enum": list(RELATIONS)})
    tier: Tier = "dialog"
    chosen: str | None = None
    rejected: str | None = None
    strength: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    checks: dict[str, Any] = {}
    labels: dict[str, Any] = {}
    tags: dict[str, Any] = {}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class ScoreRequest(Closed):
    """Rows to be scored, one or many."""

    model_config = ConfigDict(json_schema_extra={**CLOSED, "examples": [{"rows": [_EXAMPLE]}]})
    rows: Annotated[
        list[AnswerRow],
        Field(fail_fast=True),
        BeforeValidator(_as_list, json_schema_input_type=AnswerRow | list[AnswerRow]),
    ]

    def parsed(self) -> list[Row]:
        """The rows.

        Raises:
            UserError: names the row and the field.
        """
        return [answer_row(row.model_dump(exclude_unset=True), f"rows[{index}]") for index, row in enumerate(self.rows)]


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

    model_config = ConfigDict(json_schema_extra={"examples": [_LABELLED]})
    query: Strings
    prompts: Strings
    labels: Strings

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


class ClassifyRequest(Closed):
    """As vLLM's /classify: texts that the meta-prompt's template rendered, or their token ids.

    Attributes:
        use_activation: answer with probabilities; without it with logits.
        add_special_tokens: add the tokenizer's own to texts. Not by default, other than in vLLM: the template has
            written those that the model was trained on.
        user, request_id, model: read by nobody; clients of vLLM send them.
    """

    model_config = ConfigDict(json_schema_extra={**CLOSED, "examples": [{"input": ["hi"]}]})
    input: Text | Texts | TokenIds | TokenLists
    use_activation: StrictBool = True
    add_special_tokens: StrictBool = False
    model: str | None = None
    user: str | None = None
    request_id: str | None = None

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
    """As vLLM's; `probs` are independent probabilities, so they need not sum to 1, or logits."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classified]
    usage: dict[str, int]
