"""Makes the case of an estimate from a config."""

from pathlib import Path

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config
from metaalign_rl.core.checkpoints import is_checkpoint
from metaalign_rl.core.errors import UserError
from metaalign_rl.plan.rates import CPU, Device, find_device
from metaalign_rl.plan.shape import Shape, new_shape, read_shape
from metaalign_rl.plan.work import Case, work_of


def policy_shape(config: Config) -> Shape | None:
    """The policy's shape; None for a hub id, whose shape only the hub knows.

    It is read from the run's own checkpoints if there are any, else from `model.path`.

    Raises:
        UserError: the checkpoint is of a kind that is not estimated.
    """
    folder, path = RunFolder.of(config), Path(config.model.path)
    for known in (folder.sft, folder.base, path):
        if is_checkpoint(known) and (known != path or config.model.path):
            return read_shape(known / "config.json")
    return None if config.model.path else new_shape(config.model)


def reward_shape(config: Config, policy: Shape) -> Shape | None:
    """The reward model's shape: of `reward.path`, else of the policy, from which it starts; None: none runs here."""
    if config.reward.url or config.ppo.model_weight == 0:
        return None
    path = Path(config.reward.path)
    return read_shape(path / "config.json") if config.reward.path and is_checkpoint(path) else policy


def case_of(config: Config, device: Device | None = None, nodes: int = 1) -> Case | None:
    """The config's case, with the longest prompts and responses.

    Args:
        device: by default the config's CPUs.

    Returns:
        None if the model's shape is not known before it is downloaded, or is of a kind that is not estimated.
    """
    try:
        policy = policy_shape(config)
        reward = reward_shape(config, policy) if policy else None
    except UserError:
        return None
    if policy is None:
        return None
    device = device or find_device(CPU, config.cluster.cpus)
    return Case(config=config, policy=policy, reward=reward, device=device, work=work_of(config), nodes=nodes)
