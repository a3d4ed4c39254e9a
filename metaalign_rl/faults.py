"""What can go wrong among a run's actors."""


class EngineLost(RuntimeError):
    """A rollout engine's process is gone.

    Attributes:
        number: the engine's.
    """

    def __init__(self, number: int, cause: BaseException) -> None:
        super().__init__(number, cause)  # both, so that it can be pickled
        self.number, self.cause = number, cause

    def __str__(self) -> str:
        return f"rollout engine {self.number} is lost: {self.cause}"
