"""Whether an engine holds the weights that it should."""

from collections.abc import Sequence

import torch


class StaleEngine(RuntimeError):
    """A rollout engine does not hold the weights that it should."""


def confirm(expected: tuple[int, str], found: tuple[int, str], *, engine: str = "the engine") -> None:
    """Check an engine's answer to an update; both sides are a version and a checksum.

    Raises:
        StaleEngine: names the engine, and the version or checksum that was expected and found.
    """
    for what, wanted, taken in zip(("version", "checksum"), expected, found, strict=True):
        if taken != wanted:
            raise StaleEngine(
                f"{engine} did not take weight update {expected[0]}: expected {what} {wanted}, found {taken}"
            )


def mismatch(
    engine: torch.Tensor | Sequence[Sequence[float]],
    learner: torch.Tensor | Sequence[Sequence[float]],
    mask: torch.Tensor | None = None,
) -> float:
    """Mean |engine - learner| a token, in nats, of the two sides' log-probabilities of the same tokens.

    Either ragged lists, one a sample, or tensors of one shape with a `mask` of that shape, true at response
    tokens. NaN on either side gives NaN.
    """
    if mask is None:
        assert len(engine) == len(learner), f"{len(engine)} samples against {len(learner)}"
        engine = torch.cat([torch.as_tensor(sample, dtype=torch.float64) for sample in engine])
        learner = torch.cat([torch.as_tensor(sample, dtype=torch.float64) for sample in learner])
    else:
        engine, learner = torch.as_tensor(engine)[mask.bool()], torch.as_tensor(learner)[mask.bool()]
    assert engine.shape == learner.shape, f"{engine.numel()} tokens against {learner.numel()}"
    assert engine.numel() > 0, "no tokens to compare"
    return (engine.double() - learner.double()).abs().mean().item()


def assert_fresh(mismatch: float, limit: float, version: int, engine: str = "the engine") -> None:
    """Check a measured `mismatch`, in nats a token, of samples that claim weight version `version`.

    Raises:
        StaleEngine: it is above `limit`, or NaN.
    """
    if not mismatch <= limit:  # so that NaN fails too
        raise StaleEngine(
            f"{engine} says that it holds weight version {version}, but its log-probabilities differ from "
            f"the learner's by {mismatch:.4g} nats a token (limit {limit:.4g}): they are stale or wrong"
        )
