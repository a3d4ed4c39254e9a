"""The reward model: scores a response against the preference tiers of a meta-prompt.


    scorer = Scorer.from_pretrained("runs/quickstart/reward")
    scores = scorer.score([{"system_info": "...", "user_info": "...", "messages": [...], "response": "..."}])
    scores[0].overall, scores[0].tiers["user"], scores[0].probabilities["system"]

Names are loaded at first use: importing this package does not import torch.
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
    "MODES": "score",
    "Explanation": "explanation",
    "RewardTraining": "config",
    "Score": "score",
    "Scorer": "scorer",
    "ScorerPool": "pool",
    "calibration_error": "calibration",
    "combine": "score",
    "evaluate": "evaluation",
    "evaluate_modes": "evaluation",
    "explain": "explanation",
    "export_scalar": "model",
    "fit_temperature": "calibration",
    "preference_blind": "controls",
    "tier_blind": "controls",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'reward' has no attribute {name!r}")
    return getattr(import_module(f"reward.{_MODULES[name]}"), name)
