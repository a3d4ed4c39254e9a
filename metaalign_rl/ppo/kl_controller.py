"""The coefficient of the KL penalty, fixed or steered towards a target."""

from dataclasses import dataclass

from metaalign_rl.config.schema import PPOConfig

GAIN_LIMIT = 0.2  # the relative error counts at most this much, so one odd step changes little


@dataclass
class KLController:
    """The coefficient of the KL penalty, as `value`.

    With a `target` it follows Ziegler et al. 2019 (arXiv:1909.08593), section 2.2: after a step of n samples,
    value *= 1 + clip(KL / target - 1, -0.2, 0.2) * n / horizon. The paper's gain of 0.1 is a horizon of ten batches.

    Attributes:
        target: nats per response; None keeps the value fixed.
        horizon: samples.
    """

    value: float
    target: float | None = None
    horizon: int = 10_000

    @classmethod
    def of(cls, config: PPOConfig) -> "KLController":
        """The controller that the settings ask for."""
        return cls(config.kl_coef, config.kl_target if config.kl == "adaptive" else None, config.kl_horizon)

    def update(self, kl: float, samples: int) -> None:
        """Take in one PPO step.

        Args:
            kl: KL summed over a response, mean over the step's samples, in nats.
            samples: number of samples of the step.
        """
        if self.target is not None:
            error = min(max(kl / self.target - 1, -GAIN_LIMIT), GAIN_LIMIT)
            self.value *= 1 + error * samples / self.horizon
