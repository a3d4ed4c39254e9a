"""Jobs on local Ray clusters: the manifests' jobs, submitted as KubeRay does it, and a run that survives every loss.

As in the manifests, the head has no CPUs, and every request needs a token.
"""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import ROOT, free_port, python_path
from local_cluster import LocalCluster, is_well, wait_until
from manifests import HAS_KUSTOMIZE, JOBS, container, needs_kustomize, only, ray_cluster

from metaalign_rl.core.files import read_log
from reward.serving.client import RemoteScorer

pytestmark = pytest.mark.slow
REWARD_TOKEN = "secret"
# These settings follow those of a job and make it fit a laptop.
CPU = [
    "cluster.cpus=2", "cluster.gpus=0", "cluster.memory_gib=1", "cluster.disk_gib=1", "model.dtype=float32",
    "model.max_tokens=160", "rollout.max_new_tokens=16", "evaluate.max_new_tokens=16", "learner.world_size=1",
    "rollout.engines=1", "rollout.tensor_parallel=1", "reward.devices=1", "learner.zero_stage=0", "sft.zero_stage=0",
    "reward.zero_stage=0", "learner.minibatch_size=8", "learner.micro_batch_tokens=8192", "ppo.steps=1",
    "ppo.prompts_per_step=8", "ppo.samples_per_prompt=2", "rollout.kv_cache_gib=0.1",
    "rollout.gpu_memory_utilization=0.3",
]  # fmt: skip
FROM_SCRATCH = [
    "model.hidden_size=64", "model.layers=1", "model.heads=2", "data.demonstrations=200", "data.pairs=100",
    "data.prompts=60", "data.held_out_prompts=24", "data.held_out_pairs=24", "data.paraphrased_wishes=4",
    "reward.on_policy_prompts=0",
]  # fmt: skip
# What the job one-node-ppo runs. The other jobs for GPUs run SFT and train a reward model first.
ONLY_PPO = ["run.stages=[data,ppo]", "model.path=/runs/one-node/sft", "reward.path=/runs/one-node/reward"]
STEPS = 12
TWO_RANKS = [
    "learner.world_size=2",
    "learner.zero_stage=3",
    f"ppo.steps={STEPS}",
    "ppo.save_steps=2",
    "faults.limit=10",
]
TWO_NODES = ["cluster.cpus=4", "rollout.engines=2", "ppo.reward_workers=2"]  # these may change when a run is resumed


@dataclass(frozen=True)
class Here:
    """The running cluster, and where the manifests' folders are on this machine."""

    cluster: LocalCluster
    folder: Path

    def localize(self, text: str) -> str:
        """The text with the manifests' folders replaced by those on this machine."""
        text = text.replace("/opt/metaalign-rl", str(ROOT))
        return re.sub(r"(?<![\w.])/(runs|models)\b", rf"{self.folder}/\1", text)

    def shell(self, command: str) -> str:
        """Run a command as KubeRay's submitter does; its output."""
        return self.cluster.run("/bin/bash", "-ce", "--", command)

    def entrypoint(self, name: str, *settings: str) -> str:
        """The entry point of a manifest's job, with more settings after its own."""
        return self.localize(" ".join([only(name)["spec"]["entrypoint"], *settings]))

    def submit(self, name: str, *settings: str) -> str:
        """Submit a manifest's job and wait for its end; its log."""
        url, runtime_env = self.cluster.jobs_address, json.dumps(json.dumps(runtime_env_of(name)))
        entrypoint = self.entrypoint(name, *settings)
        return self.shell(f"ray job submit --address {url} --runtime-env-json {runtime_env} -- {entrypoint} ;")

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / "runs" / name


def runtime_env_of(name: str) -> Any:
    """The runtime environment of a manifest's job."""
    return yaml.safe_load(only(name)["spec"]["runtimeEnvYAML"])


def variables(template: dict[str, Any]) -> dict[str, str]:
    """A container's environment variables, except those that come from secrets."""
    return {item["name"]: item["value"] for item in container(template)["env"] if "value" in item}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    """A head and a node, with the CPUs and variables of the quickstart's manifest."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "runs").mkdir()
    own = {"PYTHONPATH": python_path(ROOT), "HF_HOME": str(folder / "models"), "METAALIGN_REWARD_TOKEN": REWARD_TOKEN}
    cpus, head_cpus = 2, 0
    if HAS_KUSTOMIZE:
        cluster = ray_cluster(only("quickstart-cpu"))
        head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
        cpus = int(container(group["template"])["resources"]["limits"]["cpu"])
        head_cpus = int(head["rayStartParams"]["num-cpus"])
        own = variables(head["template"]) | own
    with LocalCluster(folder, 1, cpus, head_cpus, own) as cluster:
        yield Here(cluster, folder)


# The quickstart's job.


@pytest.fixture(scope="module")
def quickstart(here: Here) -> Path:
    """The folder of the quickstart's job, which has run."""
    log = here.submit("quickstart-cpu", *CPU, *FROM_SCRATCH)
    assert "report: " in log
    return here.run("quickstart")


def test_without_the_token_nobody_submits(here: Here) -> None:
    url = f"{here.cluster.jobs_address}/api/jobs/"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer 0123456789abcdef"}).status_code == 403


@needs_kustomize
def test_the_quickstarts_job_runs_all_stages_though_the_head_has_no_cpus(quickstart: Path) -> None:
    report = json.loads((quickstart / "report.json").read_text())
    assert report["ppo.steps"] == 1
    assert (quickstart / "policy" / "model.safetensors").is_file()


@needs_kustomize
def test_a_retry_of_a_finished_job_skips_its_stages(here: Here, quickstart: Path) -> None:
    log = here.submit("quickstart-cpu", *CPU, *FROM_SCRATCH)
    assert "ppo: finished before, skipped" in log


@needs_kustomize
def test_the_scorers_config_serves_clients_with_the_token(here: Here, quickstart: Path) -> None:
    config = yaml.safe_load(here.localize(only("scorer")["spec"]["serveConfigV2"]))
    port = free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    (application,) = config["applications"]
    application["args"] |= {"model": str(quickstart / "reward"), "gpus": 0, "cpus": 0.5, "dtype": "float32"}
    (here.folder / "serve.yaml").write_text(yaml.safe_dump(config))
    here.shell(f"serve deploy {here.folder}/serve.yaml --address {here.cluster.jobs_address}")
    url = f"http://127.0.0.1:{port}"
    wait_until(lambda: is_well(f"{url}/ready"), lambda: "the scorer is not ready")
    row = {"messages": [{"role": "user", "content": "what color is it"}], "response": "red"}
    assert httpx.post(f"{url}/score", json={"rows": [row]}).status_code == 401
    (score,) = RemoteScorer(url, REWARD_TOKEN).score([row])
    assert 0 < score.probabilities["overall"] < 1
    here.shell(f"serve shutdown --yes --address {here.cluster.jobs_address}")


# Jobs for GPUs. Two of them run, on CPUs; the others are shown to have the same settings.


@pytest.fixture(scope="module")
def trained(here: Here, tiny_run: Path) -> None:
    """The data, the SFT policy and the reward model are where the jobs look for them."""
    here.run("one-node").mkdir()
    for name in ("data", "one-node/sft", "one-node/reward"):
        here.run(name).symlink_to(tiny_run / Path(name).name)


@pytest.fixture(scope="module")
def one_node_ppo(here: Here, trained: None) -> Path:
    """The folder of the job one-node-ppo, which has run."""
    here.submit("one-node-ppo", *CPU)
    return here.run("one-node-ppo")


@pytest.fixture(scope="module")
def survivor(here: Here, trained: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run that was stopped, and that lost a node and its cluster."""
    run = here.run("nodes-disaggregated")
    words = [f"run.name={run.name}", "run.root=/runs", "data.path=/runs/data", *CPU, *ONLY_PPO, *TWO_RANKS]
    words = ["--config", "configs/nodes_disaggregated.yaml", *(here.localize(word) for word in words)]
    own = {"PYTHONPATH": python_path(ROOT), "HF_HOME": str(here.folder / "models")}
    with LocalCluster(tmp_path_factory.mktemp("lost"), nodes=2, variables=own) as cluster:
        cluster.submit("first", "python", "jobs/pipeline.py", *words, *TWO_NODES)
        until_step(run, 3, cluster, "first")
        assert all({"Learner", "RolloutEngine"} <= node.titles() for node in cluster.nodes)
        cluster.nodes[1].kill()
        cluster.nodes[1] = cluster.add_node()  # as KubeRay does
        until_step(run, 5, cluster, "first")
        assert "learner rank" in cluster.logs("first")
        assert cluster.status("first") == "RUNNING"

        cluster.run("ray", "job", "stop", "first")
        cluster.wait_for_job("first", "STOPPED")
        stopped = last_step(run)
        assert f"ppo: stopped; the newest checkpoint is of step {stopped}\n" in cluster.logs("first")
        assert (run / "checkpoints" / "ppo" / f"step-{stopped}").is_dir(), "a stop loses no finished step"
        cluster.submit("second", "python", "jobs/pipeline.py", *words)
        until_step(run, stopped + 3, cluster, "second")
    here.cluster.submit("third", "python", "jobs/ppo.py", *words)  # the same run, but only this stage
    here.cluster.wait_for_job("third", "SUCCEEDED")
    return run


def last_step(run: Path) -> int:
    return max((int(line["step"]) for line in read_log(run / "metrics.jsonl")), default=0)


def until_step(run: Path, step: int, cluster: LocalCluster, job: str) -> None:
    """Wait until a running job has finished a step."""

    def is_there() -> bool:
        assert cluster.status(job) in ("PENDING", "RUNNING"), cluster.logs(job)
        return last_step(run) >= step

    wait_until(is_there, lambda: cluster.logs(job), poll=0.3)


@needs_kustomize
def test_a_job_for_gpus_runs_on_cpus(one_node_ppo: Path) -> None:
    stages = json.loads((one_node_ppo / "stages.json").read_text())
    assert all(record["seconds"] is not None for record in stages.values())
    assert "ppo" in stages
    (line,) = (one_node_ppo / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1


@needs_kustomize
@pytest.mark.parametrize("name", ["one-node", "nodes-colocated"])
def test_the_other_colocated_jobs_have_the_settings_of_the_one_that_ran(
    name: str, here: Here, one_node_ppo: Path
) -> None:
    # Each config has one sample per pass, so the number of passes depends on the number of its learners.
    words = ["run.name=one-node-ppo", *map(shlex.quote, ONLY_PPO), "sft.gradient_accumulation=8"]
    assert resolved(here, name, *CPU, *words) == settings_of(one_node_ppo)


@needs_kustomize
def test_the_disaggregated_job_has_the_settings_of_the_run_that_survived(here: Here, survivor: Path) -> None:
    words = [*CPU, *map(shlex.quote, ONLY_PPO), *TWO_RANKS, "run.stages=[ppo]"]
    assert resolved(here, "nodes-disaggregated", *words) == settings_of(survivor)


def test_every_job_is_one_of_these() -> None:
    assert {*JOBS} == {"quickstart-cpu", "one-node", "one-node-ppo", "nodes-colocated", "nodes-disaggregated"}


def resolved(here: Here, name: str, *settings: str) -> Any:
    """The settings of a manifest's job: the entry point with `config`, which prints them, in place of `run`."""
    program = "metaalign-rl run "
    entrypoint = here.entrypoint(name, *settings)
    assert entrypoint.startswith(program)
    return yaml.safe_load(here.shell(entrypoint.replace(program, "metaalign-rl config ", 1)))


def settings_of(run: Path) -> Any:
    """The settings that a run was last started with."""
    return yaml.safe_load((run / "config.yaml").read_text())


@needs_kustomize
def test_every_job_has_the_runtime_environment_of_its_manifest(
    here: Here, quickstart: Path, one_node_ppo: Path
) -> None:
    jobs = [job for job in here.cluster.ask("/api/jobs/") if job["entrypoint"].startswith("metaalign-rl run")]
    assert len(jobs) >= 2
    (expected, *others) = [runtime_env_of(name) for name in JOBS]
    assert all(found == expected for found in [*others, *(job["runtime_env"] for job in jobs)])


def test_a_run_survives_a_stop_the_loss_of_a_node_and_the_loss_of_its_cluster(survivor: Path) -> None:
    steps = list(read_log(survivor / "metrics.jsonl"))
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert steps[0]["mismatch"] < 1e-4
    assert {step["staleness"] for step in steps} == {0.0, 1.0}, "one step stale, except after a start"
    assert (survivor / "policy" / "model.safetensors").is_file()
