"""What the stages of one run share: its config, its folder and the rollout engines, which take seconds to start."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.chat_template import require_saved
from metaalign_rl.core.dataflow import Row, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import encode_row, load_tokenizer
from metaalign_rl.core.rows import read_rows
from metaalign_rl.rollout.engine_pool import EnginePool
from metaalign_rl.runtime.faults import FaultLog


class RunContext:
    """One run while its stages go by. Use as a context manager: leaving it stops the engines."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = RunFolder.of(config)
        self.faults = FaultLog(self.folder.faults, config.faults.limit)
        self._engines: EnginePool | None = None

    def __enter__(self) -> "RunContext":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop_engines()

    def engines(self, checkpoint: Path) -> EnginePool:
        """The run's rollout engines, holding the weights of `checkpoint`."""
        if self._engines is None:
            self._engines = EnginePool.start(self.config, checkpoint, self.faults)
        else:
            self._engines.load_checkpoint(checkpoint)
        return self._engines

    def answer(self, checkpoint: Path, rows: Sequence[Row], sampling: Sampling) -> list[str]:
        """One answer of a checkpoint to each row, by the run's rollout engines.

        Raises:
            UserError: a row's meta-prompt leaves no room for its dialog, or the checkpoint lacks the template.
        """
        tokenizer = load_tokenizer(checkpoint)
        room = self.config.model.max_tokens - sampling.max_new_tokens
        prompts = [encode_row(tokenizer, row, max_tokens=room) for row in rows]
        return [sample.text for sample in self.engines(checkpoint).answer(prompts, sampling)]

    def stop_engines(self) -> None:
        """Free what the engines hold."""
        if self._engines is not None:
            self._engines.stop()
            self._engines = None

    def rows(self, use: str) -> list[Row]:
        """The run's rows of one use.

        Raises:
            UserError: the data stage did not write any.
        """
        path = self.folder.rows(use)
        if not path.is_file():
            raise UserError(f"{path}: no such file; the data source {self.config.data.source!r} gives no {use!r}")
        return list(read_rows(path))

    def start_policy(self) -> Path:
        """The checkpoint that PPO starts from: the run's own SFT, else the one that the config names.

        Raises:
            UserError: there is neither, or the config's is no folder or lacks the meta-prompt's template.
        """
        path = self.config.model.path
        if self.folder.sft.is_dir():
            return self.folder.sft
        if not path:
            raise UserError("no policy to start from: run the stage sft, or give a checkpoint as model.path")
        if not Path(path).is_dir():
            raise UserError(f"model.path: without the stage sft it must be a checkpoint folder, found {path!r}")
        _require_template(path)
        return Path(path).absolute()

    def scorer(self) -> Path | str | None:
        """What scores PPO's answers: the config's server, else the reward model, if any."""
        return self.config.reward.url or self.reward_model()

    def reward_model(self) -> Path | None:
        """The reward model: the config's, else the run's own, if any."""
        if self.config.reward.path:
            return Path(self.config.reward.path).absolute()
        return self.folder.reward if self.folder.reward.is_dir() else None


@cache
def _require_template(path: str) -> None:
    try:
        require_saved(Path(path))
    except UserError as error:
        raise UserError(f"model.path: {path!r} cannot be started from as it is; run the stage sft ({error})") from None
