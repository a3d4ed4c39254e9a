"""The reward model: it scores a response against the preference tiers of a meta-prompt.

    scorer = Scorer.from_pretrained("runs/quickstart/reward")
    scores = scorer.score([{"system_info": "...", "user_info": "...", "messages": [...], "response": "..."}])
    scores[0].overall, scores[0].tiers["user"], scores[0].probabilities["system"]

Names are loaded on first use, so importing this package does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaalign_rl.core.views import preference_blind, tier_blind
    from reward.evaluation.calibration import calibration_error, fit_temperature
    from reward.evaluation.evaluate import evaluate, evaluate_modes
    from reward.evaluation.explanation import Explanation, explain
    from reward.model import export_scalar
    from reward.score import MODES, Score, combine
    from reward.scorer import Scorer
    from reward.scorer_pool import ScorerPool
    from reward.training.config import RewardTraining
    from reward.training.train import train

__all__ = [
    "MODES",
    "Explanation",
    "RewardTraining",
    "Score",
    "Scorer",
    "ScorerPool",
    "calibration_error",
    "combine",
    "evaluate",
    "evaluate_modes",
    "explain",
    "export_scalar",
    "fit_temperature",
    "preference_blind",
    "tier_blind",
    "train",
]

_MODULES = {
    "MODES": "reward.score",
    "Explanation": "reward.evaluation.explanation",
    "RewardTraining": "reward.training.config",
    "Score": "reward.score",
    "Scorer": "reward.scorer",
    "ScorerPool": "reward.scorer_pool",
    "calibration_error": "reward.evaluation.calibration",
    "combine": "reward.score",
    "evaluate": "reward.evaluation.evaluate",
    "evaluate_modes": "reward.evaluation.evaluate",
    "explain": "reward.evaluation.explanation",
    "export_scalar": "reward.model",
    "fit_temperature": "reward.evaluation.calibration",
    "preference_blind": "metaalign_rl.core.views",
    "tier_blind": "metaalign_rl.core.views",
    "train": "reward.training.train",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'reward' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
