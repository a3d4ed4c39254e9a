"""Where a run keeps its things."""

from pathlib import Path

from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json


class RunFolder:
    """The paths under `RUN_ROOT/NAME`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.config = self.root / "config.yaml"
        self.progress = self.root / "stages.json"  # each stage's seconds and settings, see pipeline.Progress
        self.data = self.root / "data"
        self.base = self.root / "base"  # the model that SFT starts from
        self.sft = self.root / "sft"
        self.reward = self.root / "reward"
        self.reward_evaluation = self.root / "reward_evaluation.json"
        self.controls = self.root / "controls"
        self.policy = self.root / "policy"
        self.checkpoints = self.root / "checkpoints"
        self.metrics = self.root / "metrics.jsonl"
        self.faults = self.root / "faults.jsonl"  # actors that died or hung, see faults.FaultLog
        self.rollouts = self.root / "rollouts"  # what PPO rolled out, a parquet file a step
        self.rollouts_page = self.root / "rollouts_page"  # the same for the page's browser, as scripts
        self.evaluation = self.root / "evaluation"
        self.report = self.root / "report.json"
        self.page = self.root / "report.html"

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """The folder of the run that a config names."""
        return cls(Path(config.run.root) / config.run.name)

    def rows(self, use: str) -> Path:
        """The data file of one use: demonstrations, pairs, prompts, held_out_prompts, held_out_pairs or paraphrases."""
        return self.data / f"{use}.jsonl"


def is_reward_model(checkpoint: Path) -> bool:
    """Whether a checkpoint's folder holds a classifier, which scores, and no language model."""
    architectures = read_json(checkpoint / "config.json").get("architectures") or []
    return any("SequenceClassification" in name for name in architectures)


def refuse_own_code(checkpoint: Path) -> None:
    """Refuse a checkpoint whose config asks to run code that comes with it.

    Raises:
        UserError: it does; names the file.
    """
    config = checkpoint / "config.json"
    if "auto_map" in read_json(config):
        raise UserError(
            f"{config}: 'auto_map' asks to run code from the checkpoint; only models that transformers knows are loaded"
        )


def find_policy(path: Path) -> Path:
    """As `find_checkpoint`, for a language model.

    Raises:
        UserError: there is none, or only a reward model.
    """
    found = find_checkpoint(path)
    if is_reward_model(found):
        raise UserError(
            f"{path}: a reward model, which scores and does not answer; give its run's folder, or a policy's"
        )
    return found


def find_checkpoint(path: Path) -> Path:
    """The checkpoint in a folder: the policy of a run, or the folder itself.

    Raises:
        UserError: there is none.
    """
    for found in (path / "policy", path):
        if (found / "config.json").is_file():
            return found.absolute()
    raise UserError(f"{path}: expected a run's folder that holds a policy, or a checkpoint's folder")
