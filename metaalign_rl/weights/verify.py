"""Check that an engine holds the weights that it should."""

from collections.abc import Sequence

import torch


class StaleEngine(RuntimeError):
    """A rollout engine holds other weights than it should."""


def confirm(expected: tuple[int, str], found: tuple[int, str], *, engine: str = "the engine") -> None:
    """Compare the (version, checksum) that an engine confirmed with the expected one.

    Raises:
        StaleEngine: they differ; names the engine, the expected and the found value.
    """
    for what, wanted, taken in zip(("version", "checksum"), expected, found, strict=True):
        if taken != wanted:
            raise StaleEngine(
                f"{engine} did not apply weight update {expected[0]}: expected {what} {wanted}, found {taken}"
            )


def mismatch(
    engine: torch.Tensor | Sequence[Sequence[float]],
    learner: torch.Tensor | Sequence[Sequence[float]],
    mask: torch.Tensor | None = None,
) -> float:
    """Mean |engine - learner| per token, in nats, of log-probabilities of the same tokens.

    Args:
        engine, learner: ragged lists, one per sample; or tensors of one shape with a `mask`.
        mask: True at response tokens; it has the shape of the tensors.

    Returns: NaN if either side has a NaN.
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
    """Check the `mismatch`, in nats per token, of samples from weight version `version`.

    Raises:
        StaleEngine: it is above `limit`, or NaN.
    """
    if not mismatch <= limit:  # NaN must fail too
        raise StaleEngine(
            f"{engine} reports weight version {version}, but its log-probabilities differ from the learner's by "
            f"{mismatch:.4g} nats per token (limit {limit:.4g}): its weights are stale or wrong"
        )
