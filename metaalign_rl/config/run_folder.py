"""The files and folders of a run."""

from pathlib import Path

from metaalign_rl.config.schema import Config


class RunFolder:
    """The paths in a run's folder, `RUN_ROOT/NAME`."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.config = self.root / "config.yaml"
        self.stages = self.root / "stages.json"  # each stage's seconds and settings; see pipeline.resume.StageRecords
        self.data = self.root / "data"
        self.base = self.root / "base"  # the model that SFT starts from
        self.sft = self.root / "sft"
        self.reward = self.root / "reward"
        self.reward_evaluation = self.root / "reward_evaluation.json"
        self.controls = self.root / "controls"
        self.policy = self.root / "policy"
        self.checkpoints = self.root / "checkpoints"
        self.best_checkpoint = self.root / "best_checkpoint.json"  # step, result and policy of PPO's best checkpoint
        self.metrics = self.root / "metrics.jsonl"
        self.faults = self.root / "faults.jsonl"  # actors that died or hung; see runtime.faults.FaultLog
        self.rollouts = self.root / "rollouts"  # PPO's rollouts, one Parquet file per step
        self.rollouts_page = self.root / "rollouts_page"  # the same as scripts, which the page loads
        self.evaluation = self.root / "evaluation"
        self.report = self.root / "report.json"
        self.page = self.root / "report.html"

    @classmethod
    def of(cls, config: Config) -> "RunFolder":
        """The folder of the run that a config names."""
        return cls(Path(config.run.root) / config.run.name)

    def rows(self, use: str) -> Path:
        """The data file of one use: demonstrations, pairs, on_policy_pairs, prompts, held_out_prompts, held_out_pairs
        or paraphrases."""
        return self.data / f"{use}.jsonl"
