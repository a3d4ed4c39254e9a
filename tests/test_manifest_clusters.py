"""The Ray clusters of the manifests: their sizes, how they end, and which connections they allow."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from manifests import CLUSTER, JOBS, RAY, container, needs_kustomize, only, overlay, pods, quantity, ray_cluster

from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.plan import layout
from metaalign_rl.plan.rates import find_device
from metaalign_rl.plan.shape import find_shape
from metaalign_rl.plan.work import Case, work_of

pytestmark = needs_kustomize
SIZES = {
    "one_gpu": ("0.5B", "l40s"),
    "one_node": ("7B", "h100"),
    "nodes_colocated": ("7B", "h100"),
    "nodes_disaggregated": ("7B", "h100"),
}


@pytest.mark.parametrize("name", RAY)
def test_the_head_gets_no_work_and_every_request_needs_a_token(name: str) -> None:
    spec = ray_cluster(only(name))
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert spec["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
    assert spec["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("name", RAY)
def test_the_version_of_ray_is_that_of_the_image(name: str) -> None:
    for kind in ("cpu", "cuda"):
        (version,) = re.findall(r"^ray==(.*)$", (ROOT / f"requirements/{kind}.txt").read_text(), re.M)
        assert ray_cluster(only(name))["rayVersion"] == version


@pytest.mark.parametrize("name", RAY)
def test_the_object_store_fits_into_shared_memory_which_fits_into_the_container(name: str) -> None:
    spec = ray_cluster(only(name))
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        shared = quantity(volumes["shared-memory"]["emptyDir"]["sizeLimit"])
        memory = quantity(container(group["template"])["resources"]["limits"]["memory"])
        assert float(group["rayStartParams"]["object-store-memory"]) < shared < memory


@pytest.mark.parametrize("name", JOBS)
def test_a_jobs_cluster_has_a_fixed_size(name: str) -> None:
    spec = ray_cluster(only(name))
    assert "enableInTreeAutoscaling" not in spec
    for group in spec["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_retries_ends_and_cleans_up(name: str) -> None:
    spec = only(name)["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    words = shlex.split(spec["entrypoint"])
    assert {"run.root=/runs"} <= {*words}  # the same folder for each retry
    assert len([word for word in words if word.startswith("run.name=")]) == 1


def config_of(name: str) -> Config:
    """The settings of a job's entry point."""
    program, command, path, *words = shlex.split(only(name)["spec"]["entrypoint"])
    assert (program, command) == ("metaalign-rl", "run")
    return loader.load(Config, ROOT / Path(path).relative_to("/opt/metaalign-rl"), words)


@pytest.mark.parametrize("name", JOBS)
def test_the_config_uses_the_resources_of_the_manifest(name: str) -> None:
    (group,) = ray_cluster(only(name))["workerGroupSpecs"]
    limits, nodes = container(group["template"])["resources"]["limits"], group["replicas"]
    config = config_of(name)
    gpus = int(limits.get("nvidia.com/gpu", 0))
    assert config.cluster.gpus == nodes * gpus
    assert config.cluster.cpus == nodes * int(limits["cpu"])
    used = config.rollout.engines * config.rollout.tensor_parallel
    if gpus and config.cluster.layout == "disaggregated":
        used += config.learner.world_size + 1  # for the reward workers
    assert used == (nodes * gpus or 1)
    if gpus:
        assert gpus % config.rollout.tensor_parallel == 0  # an engine's GPUs are on one node


@pytest.mark.parametrize("name", JOBS)
def test_the_head_has_the_memory_that_the_config_needs(name: str) -> None:
    head = quantity(container(dict(pods(only(name)))["head"])["resources"]["limits"]["memory"])
    assert config_of(name).cluster.memory_gib * 2**30 <= head * 0.75  # Ray's own processes use the rest


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_agrees_that_a_config_fits(name: str) -> None:
    config = loader.load(Config, ROOT / f"configs/{name}.yaml", [])
    model, gpu = SIZES[name]
    shape, device, nodes = find_shape(model), find_device(gpu), -(-config.cluster.gpus // 8)
    case = Case(config=config, policy=shape, reward=shape, device=device, work=work_of(config), nodes=nodes)
    assert layout.fits(case)
    planned = layout.propose(case, layout.Devices(config.cluster.gpus, nodes))
    assert planned["cluster.layout"] == config.cluster.layout
    assert (planned["learner.world_size"], planned["rollout.engines"]) == (
        config.learner.world_size,
        config.rollout.engines,
    )


def test_the_scorer_has_exactly_one_pod_for_each_replica() -> None:
    service = only("scorer")
    (group,) = ray_cluster(service)["workerGroupSpecs"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (deployment,) = application["deployments"]
    scaling = deployment["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (group["minReplicas"], group["maxReplicas"])
    limits = container(group["template"])["resources"]["limits"]
    assert application["args"]["gpus"] == int(limits["nvidia.com/gpu"])
    assert application["args"]["cpus"] <= int(limits["cpu"])


def test_the_budget_and_the_policy_select_the_scorers_pods() -> None:
    labels = dict(pods(only("scorer")))["scorers"]["metadata"]["labels"]
    named = {found["kind"]: found for found in overlay("namespace") if found["metadata"]["name"] == "metaalign-scorer"}
    assert named["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    budget = named["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    assert budget.items() <= (labels | {"ray.io/node-type": "worker"}).items()  # KubeRay adds that one


def test_only_the_projects_pods_may_connect_to_ports_that_run_code() -> None:
    for policy in (found for found in overlay("namespace") if found["kind"] == "NetworkPolicy"):
        for rule in policy["spec"]["ingress"]:
            ours = rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "metaalign-rl"}}}]
            assert ours or not {6379, 10001} & {port["port"] for port in rule["ports"]}
            assert ours or rule["ports"]


def test_only_one_file_names_the_registry() -> None:
    named = [path for path in CLUSTER.rglob("*.yaml") if "registry.example.com" in path.read_text()]
    assert named == [CLUSTER / "components/image/kustomization.yaml"]
    images = {container(pod)["image"] for name in RAY for _, pod in pods(only(name))}
    assert images == {f"registry.example.com/metaalign-rl:0.1.0-{kind}" for kind in ("cpu", "cuda")}
