"""Weight sync from learners to several engines, through Ray's object store and vLLM's own transfer engines."""

import time
from collections.abc import Callable, Iterator

import pytest
import ray
import torch
from ray.exceptions import RayActorError

from metaalign_rl.config.schema import ClusterConfig, Config, RolloutConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.ppo.weight_sync import WeightSync
from metaalign_rl.runtime.faults import EngineLost
from metaalign_rl.weights import StaleEngine, ipc, nccl
from metaalign_rl.weights.engine_client import EnginesClient
from metaalign_rl.weights.sync_plan import SyncPlan, backend_of
from metaalign_rl.weights.weight_stream import WeightStream

WEIGHTS = [(f"layers.{layer}.weight", torch.full((100,), float(layer))) for layer in range(5)]


def toy_engine() -> ray.actor.ActorHandle:
    """An engine whose weights are a dictionary."""

    class ToyEngine:
        def reset(self, fault: str) -> None:
            self.calls, self.fault = [], fault

        def start_weight_update(self) -> None:
            self.calls.append("start")
            self.tensors = {}

        def update_weights(self, bucket: dict) -> None:
            from metaalign_rl.weights.buckets import Bucket, unpack

            self.calls.append("update")
            if self.fault == "hangs":
                time.sleep(60)
            if self.fault == "dies":
                ray.actor.exit_actor()
            self.tensors |= {name: tensor.clone() for name, tensor in unpack(Bucket(**bucket))}

        def finish_weight_update(self, version: int) -> tuple[int, str]:
            from metaalign_rl.weights import StaleEngine
            from metaalign_rl.weights.checksum import Digest

            self.calls.append("finish")
            if self.fault == "refuses":
                raise StaleEngine("weight update 1 lacks a tensor")
            digest = Digest()
            for name, tensor in self.tensors.items():
                digest.add(name, tensor + 1 if self.fault == "damages" else tensor)
            return version, digest.hexdigest()

        def seen(self) -> list[str]:
            return self.calls

    return ray.remote(num_cpus=0)(ToyEngine).remote()


@pytest.fixture(scope="module")
def idle_engines() -> list[ray.actor.ActorHandle]:
    """Engines that earlier tests started: each takes seconds to import torch."""
    return []


@pytest.fixture
def start_engine(idle_engines: list[ray.actor.ActorHandle]) -> Iterator[Callable[[str], ray.actor.ActorHandle]]:
    """Get an engine that has taken no weights yet, with a fault if one is named."""
    healthy = []

    def start(fault: str = "") -> ray.actor.ActorHandle:
        engine = idle_engines.pop() if idle_engines else toy_engine()
        ray.get(engine.reset.remote(fault))
        if fault not in ("dies", "hangs"):
            healthy.append(engine)
        return engine

    yield start
    idle_engines.extend(healthy)


def start_learner(rank: int) -> ray.actor.ActorHandle:
    class ToyLearner:
        def connect_weights(self, plan: SyncPlan) -> None:
            from metaalign_rl.weights.sender import Sender

            self._sender = Sender(plan, rank, lambda: iter(WEIGHTS))

        def send_weights(self, version: int) -> object:
            return self._sender.send(version)

    return ray.remote(num_cpus=0)(ToyLearner).remote()


class ToyGroup:
    """The part of `LearnerGroup` that a send uses."""

    def __init__(self, ranks: int) -> None:
        self.ranks = [start_learner(rank) for rank in range(ranks)]

    def call(self, method: str, *arguments: object) -> object:
        return ray.get([getattr(rank, method).remote(*arguments) for rank in self.ranks])[0]


@pytest.fixture(scope="module")
def learners(local_ray: Config) -> ToyGroup:
    return ToyGroup(ranks=2)


class Sync:
    """Weight sync to engines without a pool, in buckets of two of the five tensors."""

    def __init__(self, learners: ToyGroup, timeout_s: float = 60.0) -> None:
        self._sync = WeightSync(learners, None, "store", devices=1, bucket_bytes=1000, timeout_s=timeout_s)

    def send(self, engines: dict, version: int) -> None:
        self._sync.version = version
        self._sync.send(engines)


@pytest.fixture
def sync(learners: ToyGroup) -> Sync:
    return Sync(learners)


def test_every_engine_gets_an_update_in_buckets_between_a_start_and_a_finish(sync, start_engine):
    engines = {number: start_engine() for number in (0, 3)}
    sync.send(engines, version=1)
    sync.send(engines, version=2)
    for engine in engines.values():
        assert ray.get(engine.seen.remote()) == ["start", "update", "update", "update", "finish"] * 2


def test_a_lost_engine_is_named_and_the_others_get_the_weights(sync, start_engine):
    engines = {number: start_engine("dies" if number == 1 else "") for number in range(3)}
    with pytest.raises(EngineLost, match="rollout engine 1 is lost") as caught:
        sync.send(engines, version=1)
    assert caught.value.number == 1
    assert isinstance(caught.value.cause, RayActorError)
    assert ray.get(engines[2].seen.remote())[-1] == "finish"

    engines[1] = start_engine()
    sync.send({1: engines[1]}, version=1)
    sync.send(engines, version=2)
    assert [len(ray.get(engine.seen.remote())) for engine in engines.values()] == [10, 10, 10]


def test_an_engine_with_a_wrong_checksum_is_named(sync, start_engine):
    engines = {4: start_engine(), 5: start_engine("damages")}
    with pytest.raises(StaleEngine, match="rollout engine 5 did not apply weight update 7: expected checksum"):
        sync.send(engines, version=7)


def test_an_engine_s_own_error_is_passed_on(sync, start_engine):
    with pytest.raises(StaleEngine, match="lacks a tensor"):
        sync.send({0: start_engine("refuses")}, version=1)


def test_an_engine_that_hangs_counts_as_lost(learners, start_engine):
    sync = Sync(learners, timeout_s=3.0)
    engines = {1: start_engine(), 2: start_engine("hangs")}
    with pytest.raises(EngineLost, match="rollout engine 2 is lost: did not accept weights for 3 s") as caught:
        sync.send(engines, version=1)
    assert isinstance(caught.value.cause, TimeoutError)


WAYS = {
    "store": [(0, "disaggregated"), (0, "colocated")],
    "ipc": [(1, "disaggregated"), (8, "colocated")],
    "nccl": [(8, "disaggregated")],
}


@pytest.mark.parametrize(
    ("gpus", "layout", "backend"), [(*devices, backend) for backend in WAYS for devices in WAYS[backend]]
)
def test_the_devices_determine_the_backend(gpus, layout, backend):
    assert backend_of(Config(cluster=ClusterConfig(gpus=gpus, layout=layout))) == backend


def test_colocated_learners_must_match_the_engines_devices():
    with pytest.raises(UserError, match=r"learner.world_size: expected rollout.engines \* rollout.tensor_parallel = 4"):
        Config(cluster=ClusterConfig(layout="colocated"), rollout=RolloutConfig(engines=2, tensor_parallel=2))


# vLLM's transfer engines for GPUs: the parts that run without a GPU


class Recorder:
    """vLLM's client for one engine."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def __getattr__(self, method: str) -> object:
        return lambda *arguments: self.calls.append((method, *arguments))


def test_with_nccl_each_engine_s_devices_get_their_own_ranks(local_ray):
    class RankEngine:
        def init_weight_transfer_engine(self, info: dict) -> None:
            self.info = info

        def told(self) -> dict:
            return self.info

    engines = {number: ray.remote(num_cpus=0)(RankEngine).remote() for number in (0, 2)}
    client = EnginesClient(engines, devices=2, timeout_s=60.0)
    client.init_weight_transfer_engine({"world_size": 5, "rank_offset": 1})
    assert [ray.get(e.told.remote())["rank_offset"] for e in engines.values()] == [1, 3]


def test_vllm_s_nccl_sender_works_with_our_weight_stream_and_client(local_ray, monkeypatch):
    from vllm.distributed.weight_transfer import nccl_engine

    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: f"group of {info.world_size}")
    broadcast: list[str] = []

    def producer(iterator: object, group: str, buffer_size_bytes: int, **rest: object) -> None:
        assert (group, buffer_size_bytes) == ("group of 5", 1000)
        broadcast.extend(name for name, _ in iterator)

    monkeypatch.setattr(nccl_engine, "packed_nccl_broadcast_producer", producer)
    client, source = Recorder(), WeightStream(lambda: iter(WEIGHTS))
    trainer = nccl.nccl_trainer(SyncPlan("nccl", {0: None, 1: None}, 2, 1000, 60.0), 0, client, source)
    trainer.send_weights()
    steps = ["init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"]
    assert [call[0] for call in client.calls] == steps
    assert client.calls[2][1]["names"] == broadcast == [name for name, _ in WEIGHTS]
    sent = WeightStream(lambda: iter(reversed(WEIGHTS)))
    sent.exhaust()
    assert source.checksum == sent.checksum


def test_an_engine_that_cannot_start_an_update_ends_it_before_an_nccl_broadcast(local_ray, monkeypatch):
    """In the broadcast everyone would wait for that engine for ever. Other ranks still gather what they share."""
    from metaalign_rl.weights import sender

    broadcast, gathered = [], []

    class StartEngine:
        def __init__(self, refuses: bool) -> None:
            self.refuses = refuses

        def start_weight_update(self) -> None:
            if self.refuses:
                raise RuntimeError("the layers cannot be reloaded")

    class Trainer:
        def __init__(self, plan: SyncPlan, rank: int, client: EnginesClient, source: WeightStream) -> None:
            self.client = client

        def send_weights(self) -> None:
            self.client.start_weight_update()
            broadcast.append("begun")

    def passes() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in WEIGHTS:
            gathered.append(name)
            yield name, tensor

    monkeypatch.setattr(sender, "_trainer", Trainer)
    engine = ray.remote(num_cpus=0)(StartEngine)
    healthy, broken = engine.remote(False), engine.remote(True)
    result = sender.Sender(SyncPlan("nccl", {0: healthy, 3: broken}, 1, 1000, 60.0), 0, passes).send(1)
    assert list(result.failed) == [3] and "cannot be reloaded" in str(result.failed[3])
    assert (broadcast, gathered) == ([], [name for name, _ in WEIGHTS])
    assert sender.Sender(SyncPlan("nccl", {0: healthy}, 1, 1000, 60.0), 0, passes).send(1).failed == {}
    assert broadcast == ["begun"]


def test_the_ipc_bucket_holds_the_largest_tensor():
    source = WeightStream(lambda: iter(WEIGHTS))
    infos = [ipc.init_info(SyncPlan("ipc", {}, 1, size, 60.0), 0, source) for size in (10, 1000)]
    assert [(info.packed, info.packed_buffer_size_bytes) for info in infos] == [(True, 400), (True, 1000)]


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_vllm_s_receivers_compute_the_checksum_of_loaded_tensors(backend, monkeypatch):
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
    from vllm.model_executor.model_loader import reload

    from metaalign_rl.weights import vllm_worker

    monkeypatch.setattr(reload, "initialize_layerwise_reload", lambda model: None)
    monkeypatch.setattr(
        nccl_engine, "packed_nccl_broadcast_consumer", lambda post_unpack_func, **rest: post_unpack_func(WEIGHTS)
    )
    monkeypatch.setattr(ipc_engine, "packed_ipc_consumer", lambda **rest: WEIGHTS)

    class Model(torch.nn.Module):
        def load_weights(self, weights: object) -> None:
            self.loaded = dict(weights)

    class Info:
        names, dtype_names, shapes, tensor_sizes, ipc_handles = [], [], [], [], {}

    kind = {"nccl": vllm_worker.NCCLReceiver, "ipc": vllm_worker.IPCReceiver}[backend]
    engine = kind.__new__(kind)
    engine.model, engine.packed, engine.device = Model(), True, torch.device("cpu", 0)
    engine.packed_buffer_size_bytes = engine.packed_num_buffers = 1
    engine.model_update_group = engine._packed_importer = object()
    engine.start_weight_update()
    engine.receive_weights(Info())
    source = WeightStream(lambda: iter(WEIGHTS))
    source.exhaust()
    assert engine.digest.hexdigest() == source.checksum
    assert engine.model.loaded.keys() == dict(WEIGHTS).keys()
