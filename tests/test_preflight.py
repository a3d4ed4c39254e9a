"""Preflight on a cluster of two nodes, and its estimates without a cluster."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from metaalign_rl.cli import main
from metaalign_rl.config.schema import ClusterConfig, Config, LearnerConfig, ModelConfig, RolloutConfig, RunConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.units import GIB
from metaalign_rl.plan.shape import KNOWN
from metaalign_rl.preflight import estimates
from metaalign_rl.preflight import run as preflight_run
from metaalign_rl.preflight.checks import PreflightCheck, check_dtype
from metaalign_rl.runtime import placement, ray_session

SMALL = "cluster: {cpus: 4, gpus: 4, memory_gib: 0, disk_gib: 0}\nmodel: {dtype: bfloat16}\n"


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a cluster of two nodes with 4 and 2 CPUs, and 2 GPUs each that Ray takes for H100s."""
    from ray.cluster_utils import Cluster

    store = 2**27
    common = {"num_gpus": 2, "object_store_memory": store, "resources": {"accelerator_type:H100": 1}}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False, **common})
    cluster.add_node(num_cpus=2, **common)
    cluster.wait_for_nodes()
    yield cluster.address
    cluster.shutdown()


@pytest.fixture
def workplace(tmp_path: Path, two_nodes: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config that needs the GPUs of both nodes, and RAY_ADDRESS set to that cluster."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", two_nodes)
    Path("config.yaml").write_text(f"run: {{root: {tmp_path}}}\n{SMALL}")
    return tmp_path


def test_two_nodes_with_everything_pass(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["preflight", "config.yaml", "rollout.tensor_parallel=2"]) == 0
    output = capsys.readouterr().out
    assert "MISSING" not in output
    assert "4 CPUs, 2 GPUs" in output and "2 CPUs, 2 GPUs" in output
    assert "GPUs: learners 1, engines 2, reward 1 (disaggregated)" in output
    assert "optimizer states" in output and "KV cache" in output
    assert "seen by 2 nodes" in output


def test_an_engine_that_fits_no_node_is_an_error_with_what_each_node_lacks(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cluster.cpus=2", "learner.world_size=4", "rollout.tensor_parallel=4", "cluster.layout=colocated"]
    assert main.main(["preflight", "config.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: rollout.tensor_parallel: needs 4 GPUs and ")
    assert "on one node for rollout engine 0 and its learners, found none: node " in error
    assert error.count(") lacks 2 GPUs") == 2
    assert "set it to at most the GPUs of a node" in error


def test_a_run_with_too_few_cpus_starts_nothing(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["run", "config.yaml", "cluster.cpus=7"]) == 2
    assert (
        "cluster.cpus: needs 7 CPUs, found 6; set cluster.cpus=6, or run on a larger cluster" in capsys.readouterr().err
    )
    assert not list(workplace.glob("*/"))


def test_too_few_gpus_for_the_roles_are_an_error(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["preflight", "config.yaml", "learner.world_size=3", "sft.batch_size=33"]) == 2
    error = capsys.readouterr().err
    assert "cluster.gpus: needs 5 GPUs (disaggregated: learners 3, engines 1, reward 1), found 4" in error
    assert "cluster.layout=colocated" in error
    colocated = ["learner.world_size=4", "rollout.engines=4", "cluster.layout=colocated"]
    assert main.main(["preflight", "config.yaml", *colocated]) == 0


def test_too_few_gpus_are_one_error(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not one more for each actor that has no room."""
    assert main.main(["preflight", "config.yaml", "cluster.gpus=8", "learner.world_size=6", "sft.batch_size=36"]) == 2
    error = capsys.readouterr().err
    assert "cluster.gpus: needs 8 GPUs, found 4" in error and "on one node" not in error


def test_a_model_too_large_for_the_gpus_is_an_error(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = KNOWN["7B"]
    Path("model").mkdir()
    described = {
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "intermediate_size": shape.intermediate, "vocab_size": shape.vocabulary,
    }  # fmt: skip
    Path("model/config.json").write_text(json.dumps(described))
    assert main.main(["preflight", "config.yaml", "model.path=model"]) == 2
    error = capsys.readouterr().err
    assert "learner: needs a GPU for a learner, by estimate" in error and "found 79 GiB" in error
    assert "learner.zero_stage=3" in error


def test_gpus_that_another_job_uses_are_a_warning(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    with ray_session.connect(Config()):

        @ray.remote(num_gpus=1, num_cpus=0)
        class Other:
            def ready(self) -> None:
                pass

        other = Other.remote()
        ray.get(other.ready.remote())
        assert main.main(["preflight", "config.yaml", "rollout.tensor_parallel=2"]) == 0
        output = capsys.readouterr()
        assert "WARNING  cluster.gpus" in output.out
        assert "needs 4 GPUs that no other job uses, found 3 free" in output.err
        assert "wait for the other jobs" in output.err


# Estimates without a cluster


def cpu_config(root: Path) -> Config:
    cluster = ClusterConfig(cpus=1, memory_gib=1.0, disk_gib=0.0)
    return Config(run=RunConfig(root=str(root)), cluster=cluster)


def estimated(config: Config) -> dict[str, PreflightCheck]:
    return {check.needed.partition(",")[0]: check for check in estimates.check_estimates(config)}


def test_an_estimate_near_the_limit_is_a_warning_and_one_far_above_it_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = cpu_config(tmp_path)
    config = replace(config, run=replace(config.run, stages=["ppo"]))
    monkeypatch.setattr(estimates, "free_memory", lambda: int(100 * GIB))
    check = estimated(config)["memory for all processes of the stage ppo"]
    assert check.verdict == "ok"
    needed = float(check.needed.split("estimate ")[1].split()[0])
    monkeypatch.setattr(estimates, "free_memory", lambda: int(0.9 * needed * GIB))
    check = estimated(config)["memory for all processes of the stage ppo"]
    assert check.verdict == "WARNING"
    preflight_run.require([check])
    assert "warning: memory: needs memory for all processes" in capsys.readouterr().err
    monkeypatch.setattr(estimates, "free_memory", lambda: int(0.5 * needed * GIB))
    with pytest.raises(UserError, match="lower learner.micro_batch_tokens"):
        preflight_run.require(list(estimates.check_estimates(config)))


@pytest.mark.parametrize(
    ("flags", "warns"),
    [("flags\t\t: fpu avx2 avx512f", True), ("flags\t\t: fpu avx512_bf16", False), ("Features\t: fp bf16", False)],
)
def test_bfloat16_on_a_cpu_without_instructions_for_it_is_a_warning(tmp_path: Path, flags: str, warns: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n\nprocessor\t: 1\n{flags}\n")
    config = replace(cpu_config(tmp_path), model=ModelConfig(dtype="bfloat16"))
    assert [check.verdict for check in check_dtype(config, tmp_path / "cpuinfo")] == (["WARNING"] if warns else [])
    assert not list(check_dtype(cpu_config(tmp_path), tmp_path / "cpuinfo"))  # float32
    assert not list(check_dtype(replace(config, cluster=ClusterConfig(gpus=1)), tmp_path / "cpuinfo"))


def test_the_object_store_must_hold_two_buckets_of_weights(tmp_path: Path) -> None:
    wide = ModelConfig(hidden_size=1024, layers=12, heads=16)
    config = replace(cpu_config(tmp_path), model=wide, rollout=RolloutConfig(bucket_mib=512))
    check = estimated(config)["Ray's object store for weights"]
    assert check.verdict == "MISSING"
    assert "lower rollout.bucket_mib, or set cluster.memory_gib=" in check.remedy


def test_nothing_is_estimated_without_a_training_or_for_a_hub_id(tmp_path: Path) -> None:
    config = cpu_config(tmp_path)
    assert not estimated(replace(config, run=replace(config.run, stages=["data", "evaluate"])))
    assert not estimated(replace(config, model=ModelConfig(path="Qwen/Qwen3-0.6B")))
    said = estimates.describe(replace(config, model=ModelConfig(path="a/b")), None)
    assert "Memory is not estimated" in said


def test_sft_and_the_reward_models_training_are_estimated_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the stage that needs the most memory is named, with what lowers it."""
    config = cpu_config(tmp_path)
    monkeypatch.setattr(estimates, "free_memory", lambda: int(100 * GIB))
    for stage, section, remedy in (
        (
            "sft",
            {"sft": replace(config.sft, batch_size=4096)},
            "set sft.gradient_checkpointing=true",
        ),
        ("reward", {"reward": replace(config.reward, batch_size=4096)}, "raise reward.gradient_accumulation"),
    ):
        check = estimated(replace(config, **section))[f"memory for all processes of the stage {stage}"]
        assert remedy in check.remedy
        alone = replace(config, run=replace(config.run, stages=[stage]), **section)
        assert list(estimated(alone)) == [f"memory for all processes of the stage {stage}"]


def test_bundles_reserve_gpus_by_layout() -> None:
    """Disaggregated, every learner and engine adds its GPUs; colocated, only the engines do."""
    config = Config(
        cluster=ClusterConfig(cpus=8, gpus=9),
        learner=LearnerConfig(zero_stage=3, world_size=4),
        rollout=RolloutConfig(engines=2, tensor_parallel=2),
    )
    disaggregated = {who: bundle["GPU"] for who, bundle in placement.named_bundles(config)}
    assert disaggregated["rollout engine 0"] == 2
    assert sum(disaggregated.values()) == 4 + 4 + 1
    colocated = replace(config, cluster=replace(config.cluster, layout="colocated"))
    assert sum(bundle["GPU"] for _, bundle in placement.named_bundles(colocated)) == 4
