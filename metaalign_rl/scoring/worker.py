"""The reward worker: a process that computes the rewards of responses."""

from collections.abc import Sequence

from metaalign_rl.core.dataflow import Ending, Reward, Row
from metaalign_rl.data.gold import judge
from metaalign_rl.runtime.gpu_memory import frees_gpu_memory
from metaalign_rl.scoring.terms import Responses, RewardSpec, make_terms


class RewardWorker:
    """Computes rewards from the terms of a `RewardSpec`. A plain class; Ray makes actors of it."""

    def __init__(self, spec: RewardSpec) -> None:
        """Load the reward model and the user's function, if they have a weight.

        Raises:
            UserError: see `make_terms`.
        """
        self._terms, self._shaping = make_terms(spec), spec.shaping
        self._total_weight = sum(term.weight for term in self._terms.values())

    @frees_gpu_memory
    def score(
        self, rows: Sequence[Row], responses: Sequence[str], endings: Sequence[Ending] | None = None
    ) -> list[Reward]:
        """The reward of each response to its row: the weighted mean of the terms, clipped, less the penalty.

        Args:
            endings: how the responses ended; None if this is unknown, and then there is no penalty.

        Raises:
            UserError: a row cannot be scored. A failure is never a number.
        """
        verdicts = [judge(row, response) for row, response in zip(rows, responses, strict=True)]
        given = Responses(rows, responses, verdicts, endings)
        scores = {name: term.score(given) for name, term in self._terms.items()}
        rewards = []
        for index, verdict in enumerate(verdicts):
            parts = {name: values[index].value for name, values in scores.items()}
            total = sum(self._terms[name].weight * value for name, value in parts.items())
            penalty = 0.0 if endings is None else self._shaping.penalty(endings[index])
            rewards.append(
                Reward(
                    value=self._shaping.clipped(total / self._total_weight) - penalty,
                    proxy=parts.get("model"),
                    gold=verdict.following,
                    probabilities=scores["model"][index].probabilities if "model" in scores else {},
                    passes=verdict.passes,
                    terms=parts,
                    penalty=penalty,
                )
            )
        return rewards
