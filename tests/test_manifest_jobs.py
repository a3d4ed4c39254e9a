"""The manifests' entry points, runtime environments and Serve config, run as KubeRay would on a local Ray of two nodes.

The head has the CPUs that its manifest gives it, none, and asks for a token.
"""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import ROOT, free_port
from local_cluster import LocalCluster, is_well, wait_until
from manifests import JOBS, container, needs_kustomize, only, ray_cluster

from reward.serving.client import RemoteScorer

pytestmark = [needs_kustomize, pytest.mark.slow]
REWARD_TOKEN = "secret"
CPU = [  # over the entry point's settings: a laptop's
    "cluster.cpus=2", "cluster.gpus=0", "cluster.memory_gib=1", "cluster.disk_gib=1", "model.dtype=float32",
    "model.max_tokens=160", "rollout.max_new_tokens=16", "evaluate.max_new_tokens=16", "learner.world_size=1",
    "rollout.engines=1", "rollout.tensor_parallel=1", "reward.devices=1", "learner.zero_stage=0", "sft.zero_stage=0",
    "reward.zero_stage=0", "learner.minibatch_size=8", "ppo.steps=1", "ppo.prompts_per_step=8",
    "ppo.samples_per_prompt=2", "rollout.kv_cache_gib=0.1",
]  # fmt: skip
FROM_NOTHING = [
    "model.hidden_size=64", "model.layers=1", "model.heads=2", "data.demonstrations=200", "data.pairs=100",
    "data.prompts=60", "data.held_out_prompts=24", "data.held_out_pairs=24", "data.paraphrased_wishes=4",
    "reward.on_policy_prompts=0", "reward.controls=[]",
]  # fmt: skip
TRAINED = ["run.stages=[data,ppo]", "model.path=/runs/quickstart/sft", "reward.path=/runs/quickstart/reward"]
GPU_JOBS = {  # what stands behind their settings: SFT and the reward model are the quickstart's
    "nodes-disaggregated": TRAINED,
    "nodes-colocated": TRAINED,
    "one-node": TRAINED,
    "one-node-ppo": [],
}


@dataclass(frozen=True)
class Here:
    """The running cluster, and where the manifests' folders are on this machine."""

    cluster: LocalCluster
    folder: Path

    def localize(self, text: str) -> str:
        """A manifest's text with its folders in their places here."""
        text = text.replace("/opt/metaalign-rl", str(ROOT))
        return re.sub(r"(?<![\w.])/(runs|models)\b", rf"{self.folder}/\1", text)

    def shell(self, command: str) -> str:
        """What a command prints, run as KubeRay's submitter does."""
        return self.cluster.run("/bin/bash", "-ce", "--", command)

    def submit(self, name: str, *settings: str) -> str:
        """Send an overlay's job, with more settings behind its own; its log."""
        spec, url = only(name)["spec"], self.cluster.jobs_address
        entrypoint = self.localize(" ".join([spec["entrypoint"], *settings]))
        runtime_env = json.dumps(json.dumps(yaml.safe_load(spec["runtimeEnvYAML"])))
        return self.shell(f"ray job submit --address {url} --runtime-env-json {runtime_env} -- {entrypoint} ;")


def variables(template: dict[str, Any]) -> dict[str, str]:
    """What a container's environment says by itself; secrets are left to the test."""
    return {item["name"]: item["value"] for item in container(template)["env"] if "value" in item}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Here]:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "runs").mkdir()
    cluster = ray_cluster(only("quickstart-cpu"))
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    cpus = int(container(group["template"])["resources"]["limits"]["cpu"])
    own = {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "models"), "METAALIGN_REWARD_TOKEN": REWARD_TOKEN}
    environment = variables(head["template"]) | own
    with LocalCluster(folder, 1, cpus, int(head["rayStartParams"]["num-cpus"]), environment) as cluster:
        yield Here(cluster, folder)


@pytest.fixture(scope="module")
def quickstart(here: Here) -> Path:
    """The quickstart's job has run; its folder."""
    log = here.submit("quickstart-cpu", *CPU, *FROM_NOTHING)
    assert "report: " in log
    return here.folder / "runs" / "quickstart"


def test_without_the_token_nobody_submits(here: Here) -> None:
    url = f"{here.cluster.jobs_address}/api/jobs/"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"Authorization": "Bearer 0123456789abcdef"}).status_code == 403


def test_the_quickstarts_job_runs_all_stages_though_the_head_has_no_cpus(quickstart: Path) -> None:
    report = json.loads((quickstart / "report.json").read_text())
    assert report["ppo.steps"] == 1
    assert (quickstart / "policy" / "model.safetensors").is_file()


def test_a_retry_goes_on_where_the_job_was(here: Here, quickstart: Path) -> None:
    log = here.submit("quickstart-cpu", *CPU, *FROM_NOTHING)
    assert "ppo: finished before, skipped" in log


@pytest.fixture(scope="module")
def gpu_jobs(here: Here, quickstart: Path) -> None:
    """The jobs of GPUs have run on CPUs, two at a time, from what the quickstart trained."""
    link(here.folder / "runs" / "data", quickstart / "data")
    link(here.folder / "runs" / "one-node" / "sft", quickstart / "sft")  # what one-node-ppo starts from
    link(here.folder / "runs" / "one-node" / "reward", quickstart / "reward")
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(here.submit, name, *CPU, *settings) for name, settings in GPU_JOBS.items()]
    for job in jobs:
        job.result()


@pytest.mark.usefixtures("gpu_jobs")
def test_every_job_had_the_runtime_environment_of_its_manifest(here: Here) -> None:
    jobs = here.cluster.ask("/api/jobs/")
    wanted = yaml.safe_load(only("one-node")["spec"]["runtimeEnvYAML"])
    assert len(jobs) > len(GPU_JOBS)
    assert all(job["runtime_env"] == wanted for job in jobs)


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(target)


@pytest.mark.usefixtures("gpu_jobs")
@pytest.mark.parametrize("name", [name for name in JOBS if name != "quickstart-cpu"])
def test_a_job_of_gpus_runs_on_cpus(name: str, here: Here) -> None:
    folder = here.folder / "runs" / name
    stages = json.loads((folder / "stages.json").read_text())
    assert all(record["seconds"] is not None for record in stages.values())
    assert "ppo" in stages
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1


def test_the_scorers_config_serves_who_has_the_token(here: Here, quickstart: Path) -> None:
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
