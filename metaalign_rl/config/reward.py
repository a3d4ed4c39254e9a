"""The settings of the reward: the reward model's training, and what PPO uses as the reward."""

import re
from dataclasses import dataclass
from typing import Literal

from metaalign_rl.core.net import check_url
from metaalign_rl.core.settings import (
    PLAIN,
    expand_paths,
    inherited,
    require,
    require_at_least,
    require_options,
    setting,
)
from metaalign_rl.core.views import Control, View
from reward.score import Mode
from reward.training.config import CommonTraining

_FUNCTION = re.compile(r".+\.py:\w+")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig(CommonTraining):
    """The reward model's training, and which of its scores PPO uses."""

    # The defaults that differ from those of `reward.RewardTraining`: they suit the quickstart's model.
    learning_rate: float = inherited(CommonTraining, "learning_rate", 1e-3)
    batch_size: int = inherited(CommonTraining, "batch_size", 16)
    token_weight: float = inherited(CommonTraining, "token_weight", 1.0)
    easy_first_fraction: float = inherited(CommonTraining, "easy_first_fraction", 0.08)

    path: str = setting("", "An existing reward model. If empty, the run trains one.")
    url: str = setting(
        "",
        "URL of a server that scores responses for PPO, such as metaalign-reward serve. It replaces the run's reward "
        "model. Its token is read from METAALIGN_REWARD_TOKEN.",
    )
    function: str = setting(
        "",
        "Your own reward function, (rows, responses) -> numbers, as path/to/file.py:name. The file must be on storage "
        "that every node sees.",
    )
    mode: Mode = setting(
        "overall",
        "Which score is the reward: the probability for the governing tier times that for the dialog (`tier`), the "
        "probability of the label overall (`overall`), or the probabilities of all tiers, combined by priority "
        "(`composed`). docs/scorer.md has the formulas.",
        level="core",
    )
    view: View = setting("whole", "What PPO's reward model sees of a row. All values except `whole` are for ablations.")
    devices: int = setting(
        1,
        "Devices that train a model together. With more than one, the reward model and the controls are trained one "
        "after the other.",
        unit="count",
    )
    zero_stage: Literal[0, 1, 2] = setting(
        0,
        "DeepSpeed ZeRO stage on several devices. With stage 3, no rank would have all weights to save.",
        unit=PLAIN,
    )
    on_policy_prompts: int = setting(
        2_000, "Prompts to which the SFT policy responds. The rows' checks label the responses.", unit="rows"
    )
    on_policy_samples: int = setting(4, "Responses of the SFT policy per prompt.", unit="samples")
    controls: list[Control] = setting(
        [],
        "Controls to train in addition, to see what the reward model gains. Each lacks one thing: the meta-prompt "
        "(`preference_blind`), the tier of each text (`tier_blind`) or the labels by tier (`scalar`). Training one "
        "takes as long as training the reward model.",
    )

    def __post_init__(self) -> None:
        expand_paths(self, "reward.", ("path", "function"))
        self._check_common("reward.")
        require_options(self, "reward.")
        require_at_least(self, "reward.", 1, ("devices", "on_policy_samples"))
        require_at_least(self, "reward.", 0, ("on_policy_prompts",))
        shares = self.devices * self.gradient_accumulation
        wanted = f"a multiple of reward.devices * reward.gradient_accumulation = {shares}"
        require("reward.batch_size", self.batch_size % shares == 0, wanted, self.batch_size)
        if self.url:
            check_url("reward.url", self.url, "METAALIGN_REWARD_TOKEN")
        require("reward.url", not (self.url and self.path), f"no URL with reward.path={self.path}", self.url)
        is_function = not self.function or bool(_FUNCTION.fullmatch(self.function))
        require("reward.function", is_function, "path/to/file.py:name", self.function)
        if self.view != "whole":
            require("reward.path", bool(self.path), f"a control's folder with reward.view={self.view}", self.path)
            require("reward.mode", self.mode == "overall", f"overall with reward.view={self.view}", self.mode)
