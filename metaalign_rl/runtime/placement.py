"""Where a run's actors work: one Ray placement group for the run, whose bundles are the actors' places.

Apart: a place for each learner, one for the reward workers, and one for each engine, whose devices are on one node, as
a bundle's always are. Colocated, or with one GPU: a place for each engine, in which its learners and some reward
workers use the same devices. Ranks that train SFT and reward models take what learners and reward workers have later.
Ray packs the places onto as few nodes as have the GPUs. Without GPUs it is all the same, but that Ray spreads them over
the nodes, for their CPUs.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError

Role = Literal["training", "rollout", "learner", "reward"]
Bundle = dict[str, float]

# The roles work in turns: these are places in Ray's books and no limits. Each actor may use all of the run's threads.
BOOKED_CPUS = 0.5  # of the run's, so that places of equal size find room however many CPUs each node has
ENGINES_CPUS = 0.4  # of the booked ones, where engines have places of their own
# Of a place that is shared. A learner has more than half a GPU in the books, so that an engine's learners have one
# each; the engine itself has none there and is shown its learners' devices.
CPU_SHARES = {"training": 0.4, "learner": 0.4, "rollout": 0.4, "reward": 0.2}
GPU_SHARES = {"training": 0.6, "learner": 0.6, "rollout": 0.0, "reward": 0.4}


def bundles(config: Config) -> list[Bundle]:
    """What the run asks of Ray, place by place."""
    cpus, engines, devices = config.cluster.cpus * BOOKED_CPUS, config.rollout.engines, config.rollout.tensor_parallel
    on_gpus = int(config.cluster.gpus > 0)
    if config.shares_devices:
        return [_bundle(cpus / engines, devices * on_gpus)] * engines
    workers = _workers(config)
    learning = [_bundle(cpus * (1 - ENGINES_CPUS) / workers, on_gpus)] * workers
    return learning + [_bundle(cpus * ENGINES_CPUS / engines, devices * on_gpus)] * engines


def named_bundles(config: Config) -> list[tuple[str, Bundle]]:
    """The same, with what works there."""
    engines = [f"rollout engine {number}" for number in range(config.rollout.engines)]
    if config.shares_devices:
        names = [f"{engine} and its learners" for engine in engines]
    else:
        names = [f"learner {rank}" for rank in range(config.learner.world_size)] + ["the reward workers"]
        names += [f"training rank {rank}" for rank in range(len(names), _workers(config))] + engines
    return list(zip(names, bundles(config), strict=True))


def places(config: Config, role: Role) -> list[int]:
    """The bundles in which a role's actors work, in the order of their numbers; what comes after begins again."""
    engines, learners = config.rollout.engines, config.learner.world_size
    if config.shares_devices:
        crowd = config.rollout.tensor_parallel if role in ("learner", "training") else 1
        return [place for place in range(engines) for _ in range(crowd)]
    workers = _workers(config)
    return {
        "learner": list(range(learners)),
        "training": list(range(_training(config))),
        "reward": [learners],
        "rollout": list(range(workers, workers + engines)),
    }[role]


def shares(config: Config, role: Role, count: int) -> dict[str, float]:
    """`num_cpus` and `num_gpus` of one of `count` actors of a role."""
    where = places(config, role)
    crowd = math.ceil(count / len(where))  # on one place, or one device of it
    cpus = bundles(config)[where[0]]["CPU"] / where.count(where[0])
    gpus = float(config.rollout.tensor_parallel if role == "rollout" else 1) if config.cluster.gpus else 0.0
    if config.shares_devices:
        cpus, gpus = cpus * CPU_SHARES[role], GPU_SHARES[role] if config.cluster.gpus else 0.0
    return {"num_cpus": _rounded(cpus / crowd, math.floor), "num_gpus": _rounded(gpus / crowd, math.floor)}


def _workers(config: Config) -> int:
    return max(_training(config), config.learner.world_size + 1)


def _training(config: Config) -> int:
    """How many ranks train side by side; without GPUs what is more shares the learners' places."""
    return max(config.learner.world_size, config.reward.devices) if config.cluster.gpus else config.learner.world_size


def _bundle(cpus: float, gpus: int) -> Bundle:
    return {"CPU": _rounded(cpus, math.ceil)} | ({"GPU": gpus} if gpus else {})


def _rounded(amount: float, towards: Callable[[float], int]) -> float:
    """To Ray's resolution, so that what shares a place never asks for more than there is."""
    return towards(round(amount * 10_000, 3)) / 10_000


class Placement:
    """A run's placement group, which Ray has made room for."""

    def __init__(self, config: Config) -> None:
        """Wait until the cluster has room.

        Raises:
            UserError: it has none within `cluster.placement_timeout`; says what was asked for and what each node has.
        """
        from ray.util.placement_group import placement_group, remove_placement_group

        self.bundles = bundles(config)
        self._group = placement_group(self.bundles, strategy="PACK" if config.cluster.gpus else "SPREAD")
        if not self._group.wait(config.cluster.placement_timeout):
            remove_placement_group(self._group)
            raise UserError(_no_room(self.bundles, config.cluster.placement_timeout))
        shared = config.shares_devices and config.cluster.gpus
        self._devices = self._ask_devices() if shared else {}

    def options(self, config: Config, role: Role, index: int) -> dict[str, Any]:
        """Ray's options that put an actor in its place, and environment variables that show it the place's devices."""
        where = places(config, role)
        place = where[index % len(where)]
        environment = {}
        if role == "rollout" and self._devices:
            devices = ",".join(map(str, self._devices[place]))
            environment = {"CUDA_VISIBLE_DEVICES": devices, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        return {"scheduling_strategy": self._strategy(place), "runtime_env": {"env_vars": environment}}

    def stands(self) -> bool:
        """Whether Ray still holds the group: it goes with the connection that made it."""
        from ray.util.placement_group import placement_group_table

        return placement_group_table(self._group).get("state") in ("CREATED", "RESCHEDULING")

    def remove(self) -> None:
        """Give the room back; actors that are still in it end."""
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)

    def _strategy(self, place: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place)

    def _ask_devices(self) -> dict[int, list[int]]:
        """The GPUs of each place."""
        import ray

        def ask(place: int, bundle: Bundle) -> Any:
            task = ray.remote(num_cpus=0, num_gpus=bundle["GPU"], scheduling_strategy=self._strategy(place))
            return task(lambda: ray.get_gpu_ids()).remote()

        answers = ray.get([ask(place, bundle) for place, bundle in enumerate(self.bundles)])
        return dict(enumerate(answers))


_current: Placement | None = None


def placement(config: Config) -> Placement:
    """The run's placement, made at the first call. One for another config takes its place.

    Raises:
        UserError: see `Placement`.
    """
    global _current
    if _current is not None and _current.stands():
        if _current.bundles == bundles(config):
            return _current
        _current.remove()
    _current = Placement(config)
    return _current


def _no_room(asked: list[Bundle], seconds: float) -> str:
    import ray
    from ray._private.state import available_resources_per_node

    names = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    free = available_resources_per_node()
    nodes = [f"{name}: {_text(free.get(identity, {}))}" for identity, name in names.items()]
    places = [f"{asked.count(bundle)} x {_text(bundle)}" for bundle in {str(b): b for b in asked}.values()]
    return (
        f"cluster.placement_timeout: after {seconds:g} s the cluster has no room for {', '.join(places)}, each on one "
        f"node; free are {'; '.join(nodes)}. Add nodes, free some, or lower cluster.cpus, learner.world_size or "
        "rollout.engines"
    )


def _text(resources: Bundle) -> str:
    return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
