"""A learner's state for resuming: DeepSpeed's engines and all random generators."""

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json, replace_folder, write_json


def save(path: Path, engines: dict[str, Any], generator: torch.Generator, own: dict[str, Any]) -> None:
    """Write all ranks' state to the folder `path`, replacing its contents. Every rank must call it.

    Args:
        own: the learner's own state, equal on all ranks.
    """
    staging = path.with_name(f".{path.name}.staging")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier()
    for name, engine in engines.items():
        frozen = _has_frozen(engine)  # such weights are in the policy's own checkpoint
        engine.save_checkpoint(str(staging), tag=name, save_latest=False, exclude_frozen_parameters=frozen)
    write_json(staging / _random_file(), _random_state(generator))
    if first:
        write_json(staging / "learner.json", {"ranks": dist.get_world_size(), "engines": list(engines), "own": own})
    dist.barrier()
    if first:
        replace_folder(path, lambda folder: _move_content(staging, folder))
        staging.rmdir()
    dist.barrier()


def load(path: Path, engines: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Load what `save` wrote, and return its `own`. Every rank must call it.

    Raises:
        UserError: there is no such folder, or it was written by another number of ranks or with other engines.
    """
    found = read_json(path / "learner.json")
    own: dict[str, Any] = found.pop("own")
    wanted = {"ranks": dist.get_world_size(), "engines": list(engines)}
    if found != wanted:
        raise UserError(f"{path}: expected a state of {wanted}, found {found}; resume with the same config")
    for name, engine in engines.items():
        loaded, _ = engine.load_checkpoint(str(path), tag=name, load_module_strict=not _has_frozen(engine))
        assert loaded is not None, f"{path}/{name} holds no checkpoint"
    _set_random_state(read_json(path / _random_file()), generator)
    return own


def _has_frozen(engine: Any) -> bool:
    return not all(weight.requires_grad for weight in engine.module.parameters())


def _move_content(source: Path, target: Path) -> None:
    for child in source.iterdir():
        child.rename(target / child.name)


def _random_file() -> str:
    return f"random_{dist.get_rank()}.json"


def _random_state(generator: torch.Generator) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
        "minibatches": generator.get_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def _set_random_state(state: dict[str, Any], generator: torch.Generator) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    generator.set_state(torch.tensor(state["minibatches"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():  # a run that began on CPUs has no such state
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
