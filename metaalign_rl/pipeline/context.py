"""Shared by the stages of one run: the config, the folder and the rollout engines.

The engines take seconds to start, so they are started once for all stages.
"""

from collections.abc import Sequence
from pathlib import Path

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.chat_template import is_installed
from metaalign_rl.core.checkpoints import require_loadable
from metaalign_rl.core.dataflow import Row, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.loading import require_complete
from metaalign_rl.core.meta_prompt import encode_row
from metaalign_rl.core.prepare import prepare_checkpoint
from metaalign_rl.core.rows import read_rows
from metaalign_rl.core.tokenizers import load_tokenizer
from metaalign_rl.pipeline.fitting_rows import require_fitting_rows
from metaalign_rl.rollout.engine_pool import EnginePool
from metaalign_rl.runtime.faults import FaultLog


class RunContext:
    """One run, while its stages are executed. Use it as a context manager: leaving it stops the engines."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = RunFolder.of(config)
        self.faults = FaultLog(self.folder.faults, config.faults.limit)
        self._engines: EnginePool | None = None
        self._is_checked = False  # model.path and the rows, if no stage sft does it

    def __enter__(self) -> "RunContext":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_engines()

    def engines(self, checkpoint: Path) -> EnginePool:
        """The run's rollout engines, with the weights of `checkpoint`."""
        if self._engines is None:
            self._engines = EnginePool.start(self.config, checkpoint, self.faults)
        else:
            self._engines.load_checkpoint(checkpoint)
        return self._engines

    def answer(self, checkpoint: Path, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """Generate one response to each row with a checkpoint, on the run's rollout engines.

        Raises:
            UserError: a row's meta-prompt leaves no room for its dialog, or the checkpoint has no meta-prompt template.
        """
        tokenizer = load_tokenizer(checkpoint)
        room = self.config.model.max_tokens - sampling.max_new_tokens
        different = {id(row): row for row in rows}  # a row may be given several times, for several responses
        prompts = {key: encode_row(tokenizer, row, max_tokens=room) for key, row in different.items()}
        engines = self.engines(checkpoint)
        samples = engines.answer([prompts[id(row)] for row in rows], sampling)
        if self.config.shares_gpus:  # what works next needs the memory
            engines.sleep()
        return [sample.text for sample in samples]

    def stop_engines(self) -> None:
        """Stop the engines and free their devices."""
        if self._engines is not None:
            self._engines.stop()
            self._engines = None

    def rows(self, use: str) -> list[Row]:
        """The run's rows for one use; see `RunFolder.rows`.

        Raises:
            UserError: the data stage wrote none.
        """
        path = self.folder.rows(use)
        if not path.is_file():
            source = self.config.data.source
            raise UserError(f"{path}: no such file; the data source {source!r} has no {use.replace('_', ' ')}")
        return list(read_rows(path))

    def start_policy(self) -> Path:
        """The checkpoint that PPO starts from: the run's SFT model, or else `model.path`, prepared if it is not.

        Raises:
            UserError: there is neither, or `model.path` cannot be loaded or prepared, or cannot read a row.
        """
        path = self.config.model.path
        if self.folder.sft.is_dir():
            return self.folder.sft
        if not path:
            raise UserError("model.path: there is no policy to start from; run the stage sft, or give a checkpoint")
        prepared = self._prepared(path)
        if not self._is_checked:
            require_fitting_rows(self.config, self.folder, prepared)
            self._is_checked = True
        return prepared

    def _prepared(self, path: str) -> Path:
        if Path(path).is_dir() and is_installed(Path(path)):
            require_loadable(Path(path))
            require_complete(Path(path))
            return Path(path).absolute()
        if not self.folder.base.is_dir():
            prepare_checkpoint(path, self.folder.base)
        return self.folder.base

    def scorer(self) -> Path | str | None:
        """The scorer of PPO's responses: `reward.url`, or else the reward model, if there is one."""
        return self.config.reward.url or self.reward_model()

    def reward_model(self) -> Path | None:
        """The reward model: `reward.path`, or else the run's own, if there is one."""
        if self.config.reward.path:
            return Path(self.config.reward.path).absolute()
        return self.folder.reward if self.folder.reward.is_dir() else None
