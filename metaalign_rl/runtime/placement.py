"""Assigns a run's actors to nodes and devices: one Ray placement group per run, whose bundles hold the actors.

- Disaggregated: one bundle per learner, one per engine, and one for all reward workers; on GPUs, a bundle for each
  reward worker that holds a model.
- Colocated, or with one GPU: one bundle per engine. The engine, its learners and some reward workers share its devices.
- Ranks of SFT and reward training use the bundles of the learners and reward workers, which start later.

Ray puts all devices of a bundle on one node. With GPUs, it packs the bundles onto few nodes. Without, it spreads them
over the nodes to use all CPUs.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.units import counted

Role = Literal["training", "rollout", "learner", "reward"]
Bundle = dict[str, float]  # amounts of "CPU" and "GPU"

# These shares only reserve resources with Ray. They limit nothing: roles take turns, and each may use all CPUs of the
# run.
RESERVED_CPU_SHARE = 0.5  # share of the run's CPUs; bundles of equal size then fit nodes with different numbers of CPUs
ENGINE_CPU_SHARE = 0.4  # share of the reserved CPUs, if engines have their own bundles
# Shares of a bundle that roles share. A learner reserves more than half a GPU, so that each learner of an engine gets
# its own. The engine reserves none and uses its learners' devices.
CPU_SHARES = {"training": 0.4, "learner": 0.4, "rollout": 0.4, "reward": 0.2}
GPU_SHARES = {"training": 0.6, "learner": 0.6, "rollout": 0.0, "reward": 0.4}


def bundles(config: Config) -> list[Bundle]:
    """The bundles of the run's placement group."""
    cpus, engines = config.cluster.cpus * RESERVED_CPU_SHARE, config.rollout.engines
    has_gpus = int(config.cluster.gpus > 0)
    engine_gpus = config.rollout.tensor_parallel * has_gpus
    if config.shares_devices:
        return [_bundle(cpus / engines, engine_gpus)] * engines
    count = _learner_bundles(config)
    learners = [_bundle(cpus * (1 - ENGINE_CPU_SHARE) / count, has_gpus)] * count
    return learners + [_bundle(cpus * ENGINE_CPU_SHARE / engines, engine_gpus)] * engines


def named_bundles(config: Config) -> list[tuple[str, Bundle]]:
    """The bundles, each with the actors it holds, such as "rollout engine 1"."""
    engines = [f"rollout engine {number}" for number in range(config.rollout.engines)]
    if config.shares_devices:
        names = [f"{engine} and its learners" for engine in engines]
    else:
        names = [f"learner {rank}" for rank in range(config.learner.world_size)]
        workers = reward_bundles(config)
        names += [f"reward worker {number}" for number in range(workers)] if workers > 1 else ["the reward workers"]
        names += [f"training rank {rank}" for rank in range(len(names), _learner_bundles(config))] + engines
    return list(zip(names, bundles(config), strict=True))


def bundle_indices(config: Config, role: Role) -> list[int]:
    """The bundles of a role's actors, in the order of the actors. More actors than entries start again at the first."""
    engines, learners = config.rollout.engines, config.learner.world_size
    if config.shares_devices:
        per_engine = config.rollout.tensor_parallel if role in ("learner", "training") else 1
        return [index for index in range(engines) for _ in range(per_engine)]
    first_engine = _learner_bundles(config)
    return {
        "learner": list(range(learners)),
        "training": list(range(_training_bundles(config))),
        "reward": list(range(learners, learners + reward_bundles(config))),
        "rollout": list(range(first_engine, first_engine + engines)),
    }[role]


def actor_resources(config: Config, role: Role, count: int) -> dict[str, float]:
    """`num_cpus` and `num_gpus` of one of the `count` actors of a role."""
    indices = bundle_indices(config, role)
    per_device = math.ceil(count / len(indices))  # actors that share one bundle, or one device of it
    cpus = bundles(config)[indices[0]]["CPU"] / indices.count(indices[0])
    gpus = float(config.rollout.tensor_parallel if role == "rollout" else 1) if config.cluster.gpus else 0.0
    if config.shares_devices:
        cpus, gpus = cpus * CPU_SHARES[role], GPU_SHARES[role] if config.cluster.gpus else 0.0
    return {"num_cpus": _rounded(cpus / per_device, math.floor), "num_gpus": _rounded(gpus / per_device, math.floor)}


def _learner_bundles(config: Config) -> int:
    """Bundles of learners, reward workers and training ranks: all but the engines', if disaggregated."""
    return max(_training_bundles(config), config.learner.world_size + reward_bundles(config))


def reward_bundles(config: Config) -> int:
    """Bundles of the reward workers, if disaggregated. A GPU for each that holds a reward model."""
    holds_model = config.ppo.model_weight > 0 and not config.reward.url
    return config.ppo.reward_workers if config.cluster.gpus and holds_model else 1


def _training_bundles(config: Config) -> int:
    """Bundles of training ranks. Without GPUs, extra ranks share the learners' bundles."""
    return max(config.learner.world_size, config.reward.devices) if config.cluster.gpus else config.learner.world_size


def _bundle(cpus: float, gpus: int) -> Bundle:
    return {"CPU": _rounded(cpus, math.ceil)} | ({"GPU": gpus} if gpus else {})


def _rounded(amount: float, towards: Callable[[float], int]) -> float:
    """Round to Ray's resolution of 0.0001: bundles up, actors down, so that the actors always fit their bundle."""
    return towards(round(amount * 10_000, 3)) / 10_000


class Placement:
    """A run's placement group, for which Ray has reserved the resources."""

    def __init__(self, config: Config) -> None:
        """Create the group and wait for the resources.

        Raises:
            UserError: the resources are not free within `cluster.placement_timeout` seconds; lists the bundles and
                each node's free resources.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        self.bundles = bundles(config)
        self._group = placement_group(self.bundles, strategy="PACK" if config.cluster.gpus else "SPREAD")
        if not self._group.wait(config.cluster.placement_timeout):
            remove_placement_group(self._group)
            raise UserError(_timeout_message(self.bundles, config.cluster.placement_timeout))
        shared = config.shares_devices and config.cluster.gpus
        self._devices = self._ask_devices() if shared else {}

    def options(self, config: Config, role: Role, index: int) -> dict[str, Any]:
        """Ray's options that put actor `index` of a role into its bundle and, for an engine, show it the devices."""
        indices = bundle_indices(config, role)
        bundle = indices[index % len(indices)]
        environment = {}
        if role == "rollout" and self._devices:
            devices = ",".join(map(str, self._devices[bundle]))
            environment = {"CUDA_VISIBLE_DEVICES": devices, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        return {"scheduling_strategy": self._strategy(bundle), "runtime_env": {"env_vars": environment}}

    def is_alive(self) -> bool:
        """Whether Ray still has the group. It ends with the connection that created it."""
        from ray.util.placement_group import placement_group_table

        return placement_group_table(self._group).get("state") in ("CREATED", "RESCHEDULING")

    def remove(self) -> None:
        """Free the resources. Ray kills the actors that still use them."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)

    def _strategy(self, bundle: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)

    def _ask_devices(self) -> dict[int, list[int]]:
        """The GPU ids of each bundle."""
        import ray

        def ask(index: int, bundle: Bundle) -> Any:
            task = ray.remote(num_cpus=0, num_gpus=bundle["GPU"], scheduling_strategy=self._strategy(index))
            return task(lambda: ray.get_gpu_ids()).remote()

        return dict(enumerate(ray.get([ask(index, bundle) for index, bundle in enumerate(self.bundles)])))


_current: Placement | None = None


def get_placement(config: Config) -> Placement:
    """The run's placement, created at the first call. If the config needs other bundles, a new one replaces it.

    Raises:
        UserError: see `Placement`.
    """
    global _current
    if _current is not None and _current.is_alive():
        if _current.bundles == bundles(config):
            return _current
        _current.remove()
    _current = Placement(config)
    return _current


def _timeout_message(needed: list[Bundle], seconds: float) -> str:
    import ray
    from ray._private.state import available_resources_per_node

    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    free = available_resources_per_node()
    nodes = [f"{name}: {_text(free.get(identity, {}))}" for identity, name in names.items()]
    counts = [f"{needed.count(bundle)} x {_text(bundle)}" for bundle in {str(b): b for b in needed}.values()]
    return (
        f"cluster.placement_timeout: after {seconds:g} s the cluster has no room for {', '.join(counts)}, each on one "
        f"node; free: {'; '.join(nodes)}; add nodes, stop other jobs, or lower cluster.cpus, "
        "learner.world_size or rollout.engines"
    )


def _text(resources: Bundle) -> str:
    return f"{counted(resources.get('CPU', 0), 'CPU')} and {counted(resources.get('GPU', 0), 'GPU')}"
