"""Placement of actors, on Ray's test cluster, whose nodes and GPUs exist only in Ray's resource counts."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray
from ray.cluster_utils import Cluster

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import ClusterConfig, Config, PPOConfig, RewardConfig, RolloutConfig, SFTConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.runtime import placement
from metaalign_rl.runtime.actor_options import actor_options


def config(learners: int, engines: int, tensor_parallel: int = 1, devices: int = 1, **cluster: object) -> Config:
    return Config(
        learner=LearnerConfig(world_size=learners),
        sft=SFTConfig(batch_size=learners),
        rollout=RolloutConfig(engines=engines, tensor_parallel=tensor_parallel),
        reward=RewardConfig(devices=devices, batch_size=devices),
        cluster=ClusterConfig(**{"cpus": 4, "placement_timeout": 20.0} | cluster),
    )


def test_disaggregated_learners_and_engines_have_a_bundle_each_and_the_reward_workers_share_one():
    disaggregated = config(2, 2, tensor_parallel=2, gpus=8)
    assert [bundle["GPU"] for bundle in placement.bundles(disaggregated)] == [1, 1, 1, 2, 2]
    roles = {
        role: placement.bundle_indices(disaggregated, role) for role in ("learner", "training", "reward", "rollout")
    }
    assert roles == {"learner": [0, 1], "training": [0, 1], "reward": [2], "rollout": [3, 4]}


def test_each_reward_worker_with_a_model_has_a_gpu_and_those_of_a_server_share_one():
    workers = PPOConfig(reward_workers=3)
    own = replace(config(1, 1, gpus=5), ppo=workers)
    assert placement.bundle_indices(own, "reward") == [1, 2, 3]
    assert placement.bundle_indices(own, "rollout") == [4]
    assert placement.actor_resources(own, "reward", 3)["num_gpus"] == 1
    assert [name for name, _ in placement.named_bundles(own)][1:4] == [f"reward worker {n}" for n in range(3)]
    served = replace(own, reward=RewardConfig(url="http://scorer:8000"))
    assert placement.bundle_indices(served, "reward") == [1]
    assert placement.bundle_indices(replace(config(1, 1), ppo=workers), "reward") == [1]


def test_training_ranks_use_the_bundles_of_learners_and_reward_workers():
    training = config(1, 2, devices=6, gpus=8)
    assert len(placement.bundles(training)) == 8
    assert placement.bundle_indices(training, "training") == [0, 1, 2, 3, 4, 5]


def test_colocated_learners_use_the_bundle_of_their_engine():
    colocated = config(4, 2, tensor_parallel=2, gpus=4, layout="colocated")
    assert [bundle["GPU"] for bundle in placement.bundles(colocated)] == [2, 2]
    assert placement.bundle_indices(colocated, "learner") == [0, 0, 1, 1]
    assert placement.bundle_indices(colocated, "rollout") == [0, 1]


CONFIGS = {
    "a laptop": config(1, 1, cpus=2),
    "many on CPUs": config(3, 2, tensor_parallel=2, cpus=5),
    "colocated on CPUs": config(3, 3, cpus=4, layout="colocated"),
    "one GPU": config(1, 1, gpus=1),
    "colocated": config(4, 2, tensor_parallel=2, gpus=4, layout="colocated"),
    "disaggregated": config(2, 3, tensor_parallel=2, devices=3, gpus=9),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("per_bundle", [1, 2, 3])
def test_actors_fit_their_bundles_and_bundles_fit_the_run(name, per_bundle):
    run = CONFIGS[name]
    bundles = placement.bundles(run)
    for amount, most in (("CPU", run.cluster.cpus + 0.001), ("GPU", run.cluster.gpus)):
        assert sum(bundle.get(amount, 0) for bundle in bundles) <= most, amount
    in_training = {"training": per_bundle * run.reward.devices, "rollout": run.rollout.engines}
    in_ppo = {"learner": run.learner.world_size, "rollout": run.rollout.engines, "reward": per_bundle}
    for together in (in_training, in_ppo):
        left = [dict(bundle) for bundle in bundles]
        for role, count in together.items():
            indices, asked = placement.bundle_indices(run, role), placement.actor_resources(run, role, count)
            for index in range(count):
                bundle = left[indices[index % len(indices)]]
                bundle["CPU"] -= asked["num_cpus"]
                bundle["GPU"] = bundle.get("GPU", 0) - asked["num_gpus"]
        assert all(amount >= -1e-9 for bundle in left for amount in bundle.values())


def test_two_learners_of_an_engine_never_share_a_device():
    colocated = config(4, 2, tensor_parallel=2, gpus=4, layout="colocated")
    assert placement.actor_resources(colocated, "learner", 4)["num_gpus"] > 0.5


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    head = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=2, num_gpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


def start(run: Config, role: placement.Role, count: int) -> list[ray.actor.ActorHandle]:
    class Tenant:  # here, so that Ray ships its code
        def where(self) -> tuple[str, str | None]:
            import os

            return ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES")

    return [ray.remote(Tenant).options(**actor_options(run, role, count, index)).remote() for index in range(count)]


def test_colocated_engines_see_the_devices_of_their_learners_on_two_nodes(two_nodes):
    run = config(4, 2, tensor_parallel=2, gpus=4, layout="colocated")
    engines, learners = start(run, "rollout", 2), start(run, "learner", 4)
    homes, devices = zip(*ray.get([tenant.where.remote() for tenant in engines + learners]), strict=True)
    assert homes[0] != homes[1], "two devices per engine: one engine per node"
    assert homes[2:] == (homes[0], homes[0], homes[1], homes[1])
    assert devices[:2] == ("0,1", "0,1")
    assert sorted(devices[2:4]) == sorted(devices[4:6]) == ["0", "1"]


def test_disaggregated_actors_spread_over_two_nodes_without_gpus(two_nodes):
    run = config(2, 2, cpus=4)
    everyone = start(run, "learner", 2) + start(run, "rollout", 2) + start(run, "reward", 1)
    homes = [home for home, _ in ray.get([tenant.where.remote() for tenant in everyone])]
    assert len(set(homes)) == 2


def test_a_run_keeps_its_placement_and_another_run_replaces_it(two_nodes):
    first = placement.get_placement(config(2, 2, cpus=4))
    assert placement.get_placement(config(2, 2, cpus=4)) is first
    second = placement.get_placement(config(1, 1, cpus=4))
    assert not first.is_alive()
    assert second.is_alive()


def test_an_error_describes_a_cluster_without_room(two_nodes):
    crowded = replace(config(1, 1, tensor_parallel=3, gpus=5), cluster=ClusterConfig(gpus=5, placement_timeout=1.0))
    message = r"no room for 2 x 0.3 CPUs and 1 GPU, 1 x 0.4 CPUs and 3 GPUs, each on one node; free: .*2 GPUs; .*2"
    with pytest.raises(UserError, match=message):
        placement.get_placement(crowded)
