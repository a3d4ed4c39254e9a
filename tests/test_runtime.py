"""Starting and joining Ray, preflight of one machine, and errors and signals that pass through Ray."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from reward_toys import language_model

from metaalign_rl.config.schema import (
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
)
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.units import GIB
from metaalign_rl.preflight import checks, estimates
from metaalign_rl.preflight import run as preflight_run
from metaalign_rl.preflight.checks import PreflightCheck
from metaalign_rl.runtime import actor_options, cpu_affinity, placement, ray_session
from metaalign_rl.runtime.exit_status import guarded
from metaalign_rl.runtime.progress import ProgressBar, ProgressUpdate, stream
from metaalign_rl.runtime.root_cause import root_cause
from metaalign_rl.trainers.callbacks import report_callback, save_on_interrupt, trainer_actor


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "free_memory", lambda: 64 * GIB)  # this machine may have less than a run needs
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)


def small(root: Path) -> Config:
    return Config(run=RunConfig(root=str(root)), cluster=ClusterConfig(cpus=1, memory_gib=1.0, disk_gib=0.0))


def failing(config: Config) -> dict[str, PreflightCheck]:
    return {check.name: check for check in preflight_run.preflight(config) if not check.ok}


def test_a_small_config_passes_preflight(tmp_path: Path) -> None:
    checks = preflight_run.preflight(small(tmp_path / "not" / "there" / "yet"))
    preflight_run.require(checks)
    assert [check.name for check in checks] == [
        "cluster.cpus", "cluster.memory_gib", "run.root", "cluster.disk_gib",
        "memory", "cluster.memory_gib", "run.root",  # by estimate
    ]  # fmt: skip


def test_everything_that_is_missing_is_listed_with_its_remedy(tmp_path: Path) -> None:
    cluster = ClusterConfig(cpus=4096, memory_gib=1e6, disk_gib=1e6)
    config = replace(small(tmp_path), cluster=cluster)
    assert list(failing(config)) == ["cluster.cpus", "cluster.memory_gib", "cluster.disk_gib"]
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(UserError, match=rf"needs 4096 CPUs, found {cores}; set cluster.cpus={cores}"):
        preflight_run.require(preflight_run.preflight(config))


def test_run_root_must_be_writable_and_absolute_in_a_submitted_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert "not writable" in failing(small(tmp_path / "file"))["run.root"].found
    assert "run.root" in failing(small(tmp_path / "file" / "below"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert not failing(small(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert failing(small(Path("runs")))["run.root"].needed == "an absolute folder"


@pytest.mark.parametrize(
    ("devices", "gpus", "engines", "room"),
    [(1, 0, 1, None), (2, 0, 1, None), (3, 0, 1, 2), (1, 1, 1, None), (2, 1, 1, 1), (6, 8, 2, None), (7, 8, 2, 6)],
)
def test_reward_devices_are_counted_in_addition_to_the_engines(
    tmp_path: Path, devices: int, gpus: int, engines: int, room: int | None
) -> None:
    config = replace(
        small(tmp_path),
        cluster=ClusterConfig(cpus=2, gpus=gpus, memory_gib=1.0, disk_gib=0.0),
        reward=RewardConfig(devices=devices, batch_size=devices),
        rollout=RolloutConfig(engines=engines),
    )
    found = failing(config).get("reward.devices")
    assert (found and found.remedy) == (room and f"set reward.devices={room} or less")


def test_ranks_of_reward_training_have_a_gpu_each() -> None:
    config = replace(Config(), cluster=ClusterConfig(gpus=8), reward=RewardConfig(devices=4))
    assert placement.actor_resources(config, "training", 4)["num_gpus"] == 1
    assert placement.actor_resources(config, "learner", 1)["num_gpus"] == 1


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("", True),
        ("checkpoint", True),
        ("empty", False),
        ("empty/typo", False),
        ("/no/where", False),
        ("./no", False),
        ("runs/mine/policy", False),
        ("Qwen/Qwen3-0.6B", True),  # a hub id: only the hub knows whether it exists
    ],
)
def test_a_model_is_a_checkpoint_folder_or_a_hub_id(
    path: str, good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("checkpoint").symlink_to(language_model())
    assert ("model.path" not in failing(replace(small(tmp_path), model=ModelConfig(path=path, max_tokens=40)))) is good


def test_a_data_source_must_be_readable(tmp_path: Path) -> None:
    file = tmp_path / "verih.json"
    assert "data.path" in failing(replace(small(tmp_path), data=DataConfig(source="verih", path=str(file))))
    file.touch()
    assert not failing(replace(small(tmp_path), data=DataConfig(source="verih", path=str(file))))
    assert "data.path" in failing(replace(small(tmp_path), data=DataConfig(source="jsonl", path=str(file))))


def test_the_environment_limits_an_actor_to_its_threads() -> None:
    environment = actor_options.actor_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert all(isinstance(value, str) for value in environment.values())


def test_ppo_needs_the_losses_of_openrlhf(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not list(checks.check_openrlhf(Config()))
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert [check.remedy for check in checks.check_openrlhf(Config())] == [
        "install it with `pip install --no-deps openrlhf`"
    ]
    assert not list(checks.check_openrlhf(Config(run=RunConfig(stages=["data", "sft"]))))


def test_a_private_ray_gets_a_token_also_when_ray_is_imported_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    ray_session._require_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64, "else Ray would write a token to the home folder"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    ray_session._require_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_pinned_actors_have_separate_cpus() -> None:
    """All threads of a process are pinned, for two actors with one CPU each. Without the variable nothing changes."""
    code = """
import os, threading
from metaalign_rl.runtime.cpu_affinity import pin
waiting = threading.Event()
threading.Thread(target=waiting.wait).start()
pin()
print(*sorted({cpu for thread in os.listdir("/proc/self/task") for cpu in os.sched_getaffinity(int(thread))}))
waiting.set()
"""
    cpus = sorted(os.sched_getaffinity(0))

    def pinned_cpus(environment: dict[str, str]) -> list[int]:
        output = subprocess.check_output([sys.executable, "-c", code], env=os.environ | environment, text=True)
        return [int(cpu) for cpu in output.split()]

    assert pinned_cpus({}) == cpus
    assert [pinned_cpus(cpu_affinity.pin_environment(index, 1)) for index in (0, 1)] == [
        [cpus[0]],
        [cpus[1 % len(cpus)]],
    ]


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://head:10001"])
def test_an_address_for_job_submission_is_an_error(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match="RAY_ADDRESS: expected host:port"), ray_session.connect(small(tmp_path)):
        pass


def test_an_address_where_nothing_answers_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # the port is taken, but nobody listens
        address = "{}:{}".format(*closed.getsockname())
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"no Ray cluster answers at '{address}'"):
            ray_session.connect(small(tmp_path)).__enter__()


# The tests below share one local Ray, which takes seconds to start.


def test_a_local_ray_has_the_configs_cpus_and_listens_on_the_loopback_only(local_ray: Config) -> None:
    import ray

    assert ray.cluster_resources()["CPU"] == local_ray.cluster.cpus
    (node,) = ray.nodes()
    assert node["NodeManagerAddress"] == "127.0.0.1"


def test_an_open_connection_is_used_and_stays_open(local_ray: Config) -> None:
    import ray

    with ray_session.connect(local_ray):
        assert ray.is_initialized()
    assert ray.is_initialized()


def test_the_actors_of_a_run_on_cpus_do_not_see_gpus(local_ray: Config) -> None:
    options = actor_options.actor_options(local_ray, "learner")
    assert options["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""


def test_preflight_checks_gpus_if_ray_is_connected(local_ray: Config) -> None:
    config = replace(local_ray, cluster=replace(local_ray.cluster, gpus=99))
    assert list(failing(config)) == ["cluster.gpus"]
    assert "cluster.gpus" not in failing(local_ray)


def test_a_driver_joins_the_cluster_at_ray_address_and_does_not_stop_it(local_ray: Config) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from test_runtime import preflight_run, ray_session, small\n"
        f"config = small(Path({local_ray.run.root!r}))\n"
        "with ray_session.connect(config):\n"
        "    preflight_run.require(preflight_run.preflight(config))\n"
        "    import ray\n    print(len(ray.nodes()))\n"
    )
    environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert ray.cluster_resources()["CPU"] == local_ray.cluster.cpus


def test_an_actors_error_ends_with_its_root_cause(local_ray: Config, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Learner:
        def __init__(self, good: bool) -> None:
            if not good:
                raise UserError("model.path: no weights in 'x'; give a folder with some")

        def step(self) -> None:
            try:
                raise ValueError("shapes do not fit")
            except ValueError as error:
                raise RuntimeError("the update failed") from error

    learner = Learner.remote(True)
    assert guarded(lambda: ray.get(learner.step.remote()), "") == 1
    error = capsys.readouterr().err
    assert "RuntimeError: the update failed" in error
    assert error.rstrip("\n").splitlines()[-1].startswith("error: ValueError: shapes do not fit (")

    assert guarded(lambda: ray.get(Learner.remote(False).step.remote()), "") == 2
    assert capsys.readouterr().err == "error: model.path: no weights in 'x'; give a folder with some\n"


def test_the_root_cause_of_nested_tasks_is_the_inner_error(local_ray: Config) -> None:
    import ray

    @ray.remote(num_cpus=0)
    def inner() -> None:
        raise LookupError("no row")

    @ray.remote(num_cpus=0)
    def outer() -> None:
        ray.get(inner.remote())

    with pytest.raises(LookupError) as caught:
        ray.get(outer.remote())
    root = root_cause(caught.value)
    assert (root.kind, root.message) == ("LookupError", "no row")
    assert root.where.endswith("in inner")


def test_an_interrupted_driver_waits_until_every_rank_has_saved(local_ray: Config, tmp_path: Path) -> None:
    class Counter:
        """A toy rank of a training: it counts until it is stopped, and then writes the count."""

        def __init__(self) -> None:
            self._stop = threading.Event()

        def train(self, output: Path) -> Iterator[ProgressUpdate]:
            def work(report: Callable[[ProgressUpdate], None]) -> None:
                count = 0
                while not self._stop.wait(0.01):
                    count += 1
                    report(ProgressUpdate(count, 10**6))
                output.write_text(str(count))
                raise RuntimeError("stopped")

            yield from stream(work)

        def stop(self) -> None:
            self._stop.set()

    ranks = [trainer_actor(Counter).options(num_cpus=0).remote() for _ in range(2)]
    outputs = [tmp_path / "0", tmp_path / "1"]
    train = [rank.train.options(num_returns="streaming") for rank in ranks]
    streams = [method.remote(output) for method, output in zip(train, outputs, strict=True)]

    def drive() -> None:
        with save_on_interrupt(ranks, streams):
            assert [next(stream) for stream in streams]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive()
    assert all(int(output.read_text()) >= 1 for output in outputs)


def test_only_the_driver_of_a_ray_job_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not checks.is_submitted()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert checks.is_submitted()


# Progress


def test_the_time_left_does_not_count_the_start_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Actors start for 100 s, then each of 10 steps takes 1 s."""
    clock = iter([0.0, 100.0, 101.0, 102.0])
    monkeypatch.setattr("metaalign_rl.runtime.progress.time.monotonic", lambda: next(clock))
    bar = ProgressBar("reward")
    for done in (1, 2, 3):
        bar(ProgressUpdate(done, 10))
    first, second, third = capsys.readouterr().out.splitlines()
    assert "left" not in first
    assert second.endswith(" 8 s left")
    assert third.endswith(" 7 s left")


def test_a_training_reports_slow_steps_that_it_does_not_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer logs step 20; each step takes 3 s until then, and steps 21 to 23 take 60 s each."""
    seconds, updates = [0.0], list[ProgressUpdate]()
    monkeypatch.setattr("metaalign_rl.trainers.callbacks.time.monotonic", lambda: seconds[0])
    callback = report_callback(updates.append)
    for step in range(1, 24):
        state = SimpleNamespace(global_step=step, max_steps=100)
        seconds[0] += 3 if step <= 20 else 60
        callback.on_step_end(None, state, None)
        if step == 20:
            callback.on_log(None, state, None, logs={"loss": 0.5, "learning_rate": 1e-3})
    assert [(update.done, update.metrics) for update in updates] == [
        *((step, {}) for step in range(2, 21, 2)), *((step, {"loss": 0.5}) for step in (20, 21, 22, 23)),
    ]  # fmt: skip
