"""The manifests under cluster/: what kustomize builds is valid, and every pod follows the rules."""

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT
from manifests import (
    CLUSTER,
    COMPONENTS,
    JOBS,
    OVERLAYS,
    RAY,
    Object,
    build,
    container,
    needs_kustomize,
    only,
    overlay,
    pods,
    ray_cluster,
)  # fmt: skip

pytestmark = needs_kustomize
KUBERNETES = "1.37"
SCHEMAS = ROOT.parent / "shared" / "kuberay-crds"  # from KubeRay 1.7.0

# The schemas are KubeRay's, so the repository does not copy them. The other tests of the manifests run without them.
needs_schemas = pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"needs KubeRay's schemas in {SCHEMAS}")


# --- schemas ---


@cache
def crd(kind: str) -> Any:
    """A validator for objects of a KubeRay kind. Unknown fields are errors."""
    (path,) = SCHEMAS.glob(f"*_{kind.lower()}s.yaml")
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(schema))


def strict(schema: Any) -> Any:
    """A CRD's schema as JSON Schema, in which unknown fields are errors."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {key: strict(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and schema.get("properties") and not is_open:
        closed["additionalProperties"] = False
    return closed


def check(found: Object) -> None:
    """Raise an error where a strict API server would: for KubeRay's kinds, the pods in them, and Kubernetes' kinds."""
    if not found["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(found, KUBERNETES, strict=True)
        return
    if SCHEMAS.is_dir():
        crd(found["kind"]).validate(found)
    for name, template in pods(found):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_is_valid(name: str) -> None:
    for found in overlay(name):
        check(found)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("name", JOBS)
def test_a_component_can_be_added_to_a_job(name: str, component: str, tmp_path: Path) -> None:
    with_component = {"resources": [f"../overlays/{name}"], "components": [f"../components/{component}"]}
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    (folder := tmp_path / "cluster" / "mine").mkdir()
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(with_component))
    (found,) = build(folder)
    check(found)
    assert found != only(name)


def misspell(spec: Object, right: str, wrong: str) -> None:
    spec[wrong] = spec.pop(right)


MISTAKES: dict[str, Callable[[Object], None]] = {
    "a job's field": lambda job: misspell(job["spec"], "backoffLimit", "backOffLimit"),
    "a cluster's field": lambda job: misspell(ray_cluster(job), "authOptions", "authOption"),
    "a group's field": lambda job: misspell(ray_cluster(job)["workerGroupSpecs"][0], "replicas", "replica"),
    "a mode that does not exist": lambda job: ray_cluster(job)["authOptions"].update(mode="tokens"),
    "a number as text": lambda job: job["spec"].update(activeDeadlineSeconds="100"),
}
POD_MISTAKES: dict[str, Callable[[Object], None]] = {
    "a pod's field": lambda pod: misspell(pod["spec"], "volumes", "volume"),
    "a container's field": lambda pod: misspell(container(pod), "volumeMounts", "volumeMount"),
    "a security context's field": lambda pod: misspell(pod["spec"]["securityContext"], "runAsNonRoot", "runAsNoRoot"),
    "an environment variable without a name": lambda pod: container(pod)["env"][0].pop("name"),
}


@needs_schemas
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_kuberays_schema_rejects(mistake: Callable[[Object], None]) -> None:
    job = only("one-node")
    mistake(job)
    with pytest.raises(jsonschema.ValidationError):
        check(job)


@pytest.mark.parametrize("mistake", POD_MISTAKES.values(), ids=POD_MISTAKES.keys())
def test_kubernetes_schema_rejects_in_a_pod(mistake: Callable[[Object], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_manifests.SCHEMAS", Path("absent"))  # so that KubeRay's schema does not report it first
    job = only("one-node")
    mistake(dict(pods(job))["head"])
    with pytest.raises(kubernetes_validate.ValidationError):
        check(job)


def test_kubernetes_schema_rejects_a_misspelt_claim() -> None:
    (claim, *_) = [found for found in overlay("namespace") if found["kind"] == "PersistentVolumeClaim"]
    misspell(claim["spec"], "accessModes", "accessMode")
    with pytest.raises(kubernetes_validate.ValidationError):
        check(claim)


# --- pods ---


@pytest.mark.parametrize("name", RAY)
def test_every_pod_passes_restricted_pod_security(name: str) -> None:
    for _, template in pods(only(name)):
        pod, main = template["spec"]["securityContext"], container(template)["securityContext"]
        assert pod["runAsNonRoot"] and pod["runAsUser"] == 1000
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert main == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & template["spec"].keys()
        kinds = {kind for volume in template["spec"].get("volumes", []) for kind in volume}
        assert kinds <= {"name", "persistentVolumeClaim", "emptyDir"}


@pytest.mark.parametrize("name", RAY)
def test_the_requests_of_every_pod_equal_its_limits(name: str) -> None:
    for _, template in pods(only(name)):
        resources = container(template)["resources"]
        assert resources["requests"] == resources["limits"]
        assert {"cpu", "memory"} <= resources["limits"].keys()


@pytest.mark.parametrize("name", RAY)
def test_the_volumes_and_mounts_of_every_pod_match(name: str) -> None:
    claims = {one["metadata"]["name"]: one["spec"] for one in overlay("namespace") if "Claim" in one["kind"]}
    for which, template in pods(only(name)):
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        mounts = {mount["name"]: mount["mountPath"] for mount in container(template).get("volumeMounts", [])}
        assert volumes.keys() == mounts.keys()
        if which == "submitter":
            continue
        assert mounts == {"runs": "/runs", "models": "/models", "shared-memory": "/dev/shm", "tmp": "/tmp"}
        assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
        for kept in ("runs", "models"):
            claim = claims[volumes[kept]["persistentVolumeClaim"]["claimName"]]
            assert claim["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("name", RAY)
def test_the_network_policy_selects_every_pod(name: str) -> None:
    (policy, _) = [found["spec"] for found in overlay("namespace") if found["kind"] == "NetworkPolicy"]
    for _, template in pods(only(name)):
        assert policy["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()


def test_only_the_head_that_scales_may_call_kubernetes() -> None:
    (account,) = [found for found in overlay("namespace") if found["kind"] == "ServiceAccount"]
    ours = {"serviceAccountName": account["metadata"]["name"], "automountServiceAccountToken": False}
    every = [(name, which, pod["spec"]) for name in RAY for which, pod in pods(only(name))]
    assert [(name, which) for name, which, spec in every if not ours.items() <= spec.items()] == [("scorer", "head")]
    assert ray_cluster(only("scorer"))["enableInTreeAutoscaling"]


def test_secrets_are_only_referenced() -> None:
    for name in RAY:
        for _, template in pods(only(name)):
            for variable in container(template).get("env", []):
                if re.search("TOKEN|KEY|SECRET|PASSWORD", variable["name"]):
                    assert variable["valueFrom"]["secretKeyRef"]["name"] == "metaalign-secrets"
    texts = "".join(path.read_text() for path in CLUSTER.rglob("*.yaml"))
    assert "kind: Secret" not in texts


def test_a_run_needs_no_secret_and_a_scorer_needs_its_token() -> None:
    def optional(template: Object) -> dict[str, bool]:
        variables = [variable for variable in container(template)["env"] if "valueFrom" in variable]
        return {v["name"]: v["valueFrom"]["secretKeyRef"].get("optional", False) for v in variables}

    for name in (*JOBS, "interactive"):
        assert all(all(optional(pod).values()) for which, pod in pods(only(name)) if which != "submitter")
    assert optional(dict(pods(only("scorer")))["scorers"]) == {"HF_TOKEN": True, "METAALIGN_REWARD_TOKEN": False}
