"""How the coefficient of the KL penalty moves over a run."""

from typing import Protocol

from metaalign_rl.learner.openrlhf_modules import openrlhf_module

_controllers = openrlhf_module("trainer.ppo_utils.kl_controller")


class KLController(Protocol):
    """The coefficient of the KL penalty, as `value`."""

    value: float

    def update(self, current: float, n_steps: int) -> None:
        """Take in a PPO step: `current` is its mean KL of a whole response, `n_steps` its samples."""


class FixedKL(_controllers.FixedKLController):  # type: ignore[name-defined]
    """A coefficient that stays as it is."""


class AdaptiveKL(_controllers.AdaptiveKLController):  # type: ignore[name-defined]
    """A coefficient that steers the KL towards a target (Ziegler et al. 2019, section 2.2).

    After a step of n samples: value *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon, where KL is summed
    over a response, in nats, and averaged over the batch. The paper's gain of 0.1 is a horizon of ten
    batches.
    """

    value: float

    def __init__(self, initial: float, target: float, horizon: int) -> None:
        super().__init__(init_kl_coef=initial, target=target, horizon=horizon)

    def update(self, current: float, n_steps: int) -> None:
        super().update(current, n_steps)
        self.value = float(self.value)  # the parent leaves a numpy scalar, which JSON does not take
