"""Learner ranks: their rendezvous, and updates that are the same on two ranks as on one."""

import json
import multiprocessing
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from learner_toys import CONFIG, evaluated, make_learner, make_samples, tiny_model
from safetensors.torch import load_file

from metaalign_rl.config.schema import Config, RunConfig
from metaalign_rl.core.dataflow import Batch
from metaalign_rl.runtime.rendezvous import rendezvous

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "policy", seed=1)
    tiny_model(folder / "reference", seed=2)
    return folder


@pytest.fixture(scope="module", autouse=True)
def process_group():
    """A learner makes its process a rank; the tests after these must not find themselves in one."""
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_each_group_gets_a_new_rendezvous_file_and_old_ones_are_removed(tmp_path):
    config = Config(run=RunConfig(root=str(tmp_path)))
    first, second = (Path(rendezvous(config).removeprefix("file://")) for _ in range(2))
    assert first != second
    second.touch()
    assert Path(rendezvous(config).removeprefix("file://")).parent == second.parent
    assert second.is_relative_to(tmp_path)
    assert not second.exists()


PLAIN: tuple[dict[str, object], float] = ({}, 0.0)  # settings, and the coefficient of the KL in the loss
EVERYTHING: tuple[dict[str, object], float] = ({"loss_aggregation": "samples", "correction": "sequence"}, 0.1)
VARIANTS = {0: PLAIN, 1: EVERYTHING, 2: EVERYTHING, 3: PLAIN}  # by ZeRO stage


def run_rank(folder: Path, batch: Batch, rank: int) -> None:
    """Two updates at each ZeRO stage on one of two ranks; rank 0 leaves policy and metrics in `folder`."""
    from metaalign_rl.learner.deepspeed_engine import stream_weights

    torch.set_num_threads(1)
    for stage, (changes, kl_coef) in VARIANTS.items():
        config = replace(CONFIG, zero_stage=stage, micro_batch_tokens=30, **changes)
        learner = make_learner(folder, config, rank, world_size=2)
        again = learner.evaluate(batch)
        metrics = [learner.train(batch, kl_coef) for _ in range(2)]
        learner.save_state(folder / f"state{stage}")
        learner.save_policy(folder / f"updated{stage}")
        expected = learner.train(batch, kl_coef)
        learner.load_state(folder / f"state{stage}")
        assert learner.train(batch, kl_coef) == expected
        streamed = {name: t.clone() for name, t in stream_weights(learner.policy.module.model, 5_000)}
        learner.save_policy(folder / f"streamed{stage}")
        for name, tensor in load_file(folder / f"streamed{stage}" / "model.safetensors").items():
            torch.testing.assert_close(streamed[name], tensor, rtol=0, atol=0)
        if rank == 0:
            torch.testing.assert_close(again.logprobs, batch.logprobs)
            torch.testing.assert_close(again.values, batch.values)
            (folder / f"metrics{stage}.json").write_text(json.dumps(metrics))


@pytest.mark.slow
def test_two_ranks_compute_the_same_update_as_one_at_every_zero_stage(folder):
    draw = random.Random(1)
    rollout = [[draw.uniform(-5, -3) for _ in response] for _, response in make_samples()]
    batch, start = evaluated(make_learner(folder), rollout_logprobs=rollout), load_file(folder / "policy" / FILE)
    expected = {}
    for name, (changes, kl_coef) in (("plain", PLAIN), ("everything", EVERYTHING)):
        alone = make_learner(folder, replace(CONFIG, **changes))
        expected[name] = [alone.train(batch, kl_coef) for _ in range(2)]
        alone.save_policy(folder / name)
    processes = multiprocessing.get_context("spawn")
    ranks = [processes.Process(target=partial(run_rank, folder, batch, rank)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0, 0]
    for stage, variant in VARIANTS.items():
        name = "plain" if variant is PLAIN else "everything"
        metrics = json.loads((folder / f"metrics{stage}.json").read_text())
        for found, wanted in zip(metrics, expected[name], strict=True):
            assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        updated, one = (load_file(folder / made / FILE) for made in (f"updated{stage}", name))
        moved = sum((one[key] - start[key]).norm() for key in start)
        assert sum((one[key] - updated[key]).norm() for key in start) < 0.01 * moved
