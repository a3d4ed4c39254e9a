"""The JSON of requests and replies, and how requests become rows."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictInt, model_validator

from metaalign_rl.core.dataflow import FAMILIES, RELATIONS, Row, Tier
from metaalign_rl.core.errors import nearest
from reward.answers import answer_row, parse_openrlhf_answer, require_same_length
from reward.score import Mode, Score

# Only the first error of a list is reported, so that a body with a million errors does not become a million messages.
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
    """The problem with a request: one line, or for each wrong field its location, a message and a type."""

    detail: str | list[dict[str, Any]]


class Closed(BaseModel):
    """An object without unknown fields. The error names the first one."""

    model_config = ConfigDict(json_schema_extra=CLOSED)

    @model_validator(mode="before")
    @classmethod
    def _has_known_fields_only(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(f"unknown field {name!r}; {nearest(name, cls.model_fields)}")
        return value


class Message(Closed):
    """One message of the dialog."""

    role: str = Field(pattern="^(user|assistant)$")
    content: str


class AnswerRow(BaseModel):
    """An answer with its meta-prompt and dialog. A row's other fields are allowed; of these the reply repeats `id`.

    A null counts as left out.
    """

    model_config = ConfigDict(extra="allow", json_schema_extra=CLOSED)  # `answer_row` refuses unknown fields by name
    messages: Annotated[
        list[Message], Field(min_length=1, fail_fast=True, description="the dialog; the last message is the user's")
    ]
    response: str
    system_info: str | None = None
    user_info: str | None = None
    id: str | None = None
    family: str | None = Field(None, json_schema_extra={"enum": [*FAMILIES, None]})
    relation: str | None = Field(None, json_schema_extra={"enum": [*RELATIONS, None]})
    tier: Tier | None = None
    chosen: str | None = None
    rejected: str | None = None
    strength: Annotated[float, Field(strict=True, ge=0, le=1)] | None = None
    checks: dict[str, Any] | None = None
    labels: dict[str, Any] | None = None
    tags: dict[str, Any] | None = None
    finished: bool | None = Field(
        None, strict=True, description="whether the model ended the response; for other servers, ignored"
    )
    tokens: int | None = Field(
        None, strict=True, description="the response's number of tokens; for other servers, ignored"
    )

    @property
    def characters(self) -> int:
        """The characters that are scored."""
        texts = (self.system_info, self.user_info, self.response, *(message.content for message in self.messages))
        return sum(len(text) for text in texts if text is not None)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class ScoreRequest(Closed):
    """One row or a list of rows to score."""

    model_config = ConfigDict(json_schema_extra={**CLOSED, "examples": [{"rows": [_EXAMPLE]}]})
    rows: Annotated[
        list[AnswerRow],
        Field(fail_fast=True),
        BeforeValidator(_as_list, json_schema_input_type=AnswerRow | list[AnswerRow]),
    ]

    def row(self, index: int) -> Row:
        """The checked row at an index.

        Raises:
            UserError: the row is malformed; the message names the row and the field.
        """
        record = self.rows[index].model_dump(exclude_unset=True, exclude={"finished", "tokens"})
        return answer_row(record, f"rows[{index}]")


class ScoredRow(BaseModel):
    """The score of one row."""

    id: str | None = None
    overall: float
    tiers: dict[str, float]
    probabilities: dict[str, float]
    truncated: bool

    @classmethod
    def of(cls, row: Row, score: Score) -> "ScoredRow":
        """The reply for one row."""
        return cls(
            id=row.id or None,
            overall=score.overall,
            tiers=score.tiers,
            probabilities=score.probabilities,
            truncated=score.truncated,
        )


class ScoreReply(BaseModel):
    """The scores in the order of the rows: logits (`overall`, `tiers`) and their sigmoids (`probabilities`).

    `truncated`: the dialog was too long, and its beginning was not read. `untrained`: the labels that the model was not
    trained on, whose numbers have no meaning.
    """

    model: str
    scores: list[ScoredRow]
    untrained: list[str]


class RewardRequest(BaseModel):
    """OpenRLHF's remote reward request. Each label is the row as JSON; a query is its prompt followed by the answer."""

    model_config = ConfigDict(json_schema_extra={"examples": [_LABELLED]})
    query: Strings
    prompts: Strings
    labels: Strings

    def check(self) -> None:
        """Raise a `UserError` if the lists differ in length."""
        require_same_length(self.query, self.prompts, self.labels)

    def row(self, index: int, special_tokens: Sequence[str], mode: Mode) -> Row:
        """The checked row at an index, with its answer; see `parse_openrlhf_batch`."""
        return parse_openrlhf_answer(
            self.query[index], self.prompts[index], self.labels[index], special_tokens, index, mode
        )

    def characters(self, index: int) -> int:
        """The characters that are read for the row at an index."""
        return len(self.query[index]) + len(self.prompts[index]) + len(self.labels[index])


class RewardReply(BaseModel):
    """`rewards` and `scores`: the probability that each answer is good. `extra_logs`: the probabilities by label.

    `truncated`: the dialog was too long, and its beginning was not read.
    """

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
    truncated: list[bool]


class ClassifyRequest(Closed):
    """The request of vLLM's /classify: texts rendered with the meta-prompt's template, or their token ids.

    Attributes:
        use_activation: reply with probabilities; false: with logits.
        add_special_tokens: add the tokenizer's special tokens to texts. Unlike in vLLM, the default is false, because
            the template has added those that the model was trained with.
        model, user, request_id: ignored; clients of vLLM send them.
    """

    model_config = ConfigDict(json_schema_extra={**CLOSED, "examples": [{"input": ["hi"]}]})
    input: Text | Texts | TokenIds | TokenLists
    use_activation: StrictBool = True
    add_special_tokens: StrictBool = False
    model: str | None = None
    user: str | None = None
    request_id: str | None = None

    def texts(self) -> list[str | list[int]]:
        """The texts or lists of token ids; a single one becomes a list of one."""
        single = isinstance(self.input, str) or (bool(self.input) and isinstance(self.input[0], int))
        return cast("list[str | list[int]]", [self.input] if single else self.input)


class Classified(BaseModel):
    """The labels of one text."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(BaseModel):
    """The reply of vLLM's /classify. `probs` are logits or independent probabilities, which may not sum to 1."""

    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Classified]
    usage: dict[str, int]
