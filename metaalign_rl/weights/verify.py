"""Check that an engine holds the weights that it should."""


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
