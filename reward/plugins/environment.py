"""The scorer and the mode from environment variables, for trainers that pass no settings to a reward function."""

import os
from functools import cache
from typing import TYPE_CHECKING

from metaalign_rl.core.errors import UserError
from reward.score import Mode, check_mode

if TYPE_CHECKING:
    from reward.scorer import Scorer
    from reward.serving.client import RemoteScorer

MODEL, DTYPE = "METAALIGN_REWARD_MODEL", "METAALIGN_REWARD_DTYPE"
URL, MODE = "METAALIGN_REWARD_URL", "METAALIGN_REWARD_MODE"


@cache
def scorer_from_environment() -> "Scorer | RemoteScorer":
    """The scorer, created on the first call.

    METAALIGN_REWARD_URL is the address of a server, and METAALIGN_REWARD_TOKEN its token. Without a server,
    METAALIGN_REWARD_MODEL is the folder of a reward model, and METAALIGN_REWARD_DTYPE the type of its weights. Default
    of the type: see `Scorer.from_pretrained`.

    Raises:
        UserError: neither a server nor a folder is set.
    """
    if url := os.environ.get(URL):
        from reward.serving.client import RemoteScorer

        return RemoteScorer(url)
    if model := os.environ.get(MODEL):
        from reward.scorer import Scorer

        return Scorer.from_pretrained(model, dtype=os.environ.get(DTYPE))
    raise UserError(f"set {MODEL} to a reward model's folder, or {URL} to a server's address")


def mode_from_environment() -> Mode:
    """The mode in METAALIGN_REWARD_MODE, or `overall`; see `combine`.

    Raises:
        UserError: the mode is unknown.
    """
    mode = os.environ.get(MODE, "overall")
    check_mode(mode)
    return mode  # type: ignore[return-value]
