"""PPO with two of each actor, on a cluster of two nodes (raylets of Ray's own test harness on this machine)."""

from pathlib import Path

import pytest
import ray
from conftest import TINY, metaalign_rl
from ray.cluster_utils import Cluster

from metaalign_rl.files import read_jsonl

pytestmark = pytest.mark.slow


@pytest.fixture
def two_nodes():
    ray.shutdown()  # what another test left
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 2**27})
    cluster.add_node(num_cpus=2, object_store_memory=2**27)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


def test_two_of_each_train_together_on_two_nodes(tiny_run: Path, tmp_path: Path, two_nodes: str) -> None:
    words = [
        *(word for word in TINY if not word.startswith("ppo.deterministic")),
        *("run.name=parallel", f"run.root={tmp_path}", "run.stages=[data,ppo]", f"model.path={tiny_run / 'sft'}"),
        *(f"reward.path={tiny_run / 'reward'}", "learners=2", "rollout.engines=2", "ppo.reward_workers=2"),
        *("cluster.cpus=4", "cluster.memory_gib=1", "learner.zero_stage=3", "ppo.steps=2", "ppo.staleness=1"),
        *("learner.correction=token",),
    ]
    done = metaalign_rl("run", "configs/quickstart.yaml", *words, RAY_ADDRESS=two_nodes)
    assert done.returncode == 0, done.stderr
    steps = [step for _, step in read_jsonl(tmp_path / "parallel" / "metrics.jsonl")]
    assert [(step["step"], step["samples"], step["staleness"]) for step in steps] == [(1, 16, 0.0), (2, 16, 1.0)]
    assert steps[0]["mismatch"] < 1e-4
    assert (tmp_path / "parallel" / "policy" / "model.safetensors").is_file()
