"""The settings of a scoring server. Imports no heavy packages."""

from dataclasses import dataclass

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.request_bodies import BodyLimits
from reward.score import Mode

BYTES_PER_VALUE = 64  # a body may have a JSON value per so many bytes; rows of text have far fewer


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """The settings of a scoring server.

    Attributes:
        name: the model's name in replies.
        token: clients must send it as `Authorization: Bearer`; no token is needed if it is empty.
        mode: the score that `/get_reward` returns; see `combine`.
        batch_tokens: tokens per forward pass.
        queue_tokens: tokens that may wait; a request beyond them gets status 429.
        max_wait: longest wait of a request for others, in seconds.
        max_rows, max_bytes: limits of one request. `max_bytes` also limits the bodies in memory together; see
            `BodyLimits`.
        max_row_characters, max_row_messages: limits of one row. A row's cost is linear in both.
        body_seconds: a request's body must be complete after this time.
        local_only: only clients that name this machine in the header Host are answered; see `Guard`.
    """

    name: str
    token: str = ""
    mode: Mode = "overall"
    batch_tokens: int = 16_384
    queue_tokens: int = 262_144
    max_wait: float = 0.005
    max_rows: int = 1024
    max_bytes: int = 4 * 2**20
    max_row_characters: int = 100_000
    max_row_messages: int = 512
    body_seconds: float = 20.0
    local_only: bool = False

    def __post_init__(self) -> None:
        least_one = ("batch_tokens", "queue_tokens", "max_rows", "max_bytes", "max_row_characters", "max_row_messages")
        for name in least_one:
            if getattr(self, name) < 1:
                raise UserError(f"{name}: expected 1 or more, found {getattr(self, name)}")
        if self.max_wait < 0:
            raise UserError(f"max_wait: expected 0 seconds or more, found {self.max_wait}")
        if self.body_seconds <= 0:
            raise UserError(f"body_seconds: expected more than 0 seconds, found {self.body_seconds}")

    @property
    def body_limits(self) -> BodyLimits:
        """The limits of the requests' bodies."""
        values = max(1, self.max_bytes // BYTES_PER_VALUE)
        return BodyLimits(max_bytes=self.max_bytes, max_values=values, seconds=self.body_seconds)
