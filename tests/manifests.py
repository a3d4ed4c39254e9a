"""The manifests under cluster/, as kustomize builds them, and their parts."""

import copy
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[1] / "cluster"
OVERLAYS = sorted(path.name for path in (CLUSTER / "overlays").iterdir())
COMPONENTS = ("kueue", "volcano", "spot")  # a user can add them to an overlay
RAY = [name for name in OVERLAYS if name != "namespace"]
JOBS = [name for name in RAY if name not in ("interactive", "scorer")]
KUSTOMIZE = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
Object = dict[str, Any]

HAS_KUSTOMIZE = shutil.which(KUSTOMIZE[0]) is not None
# Only these programs build the manifests as `kubectl apply -k` does, and no Python package has them.
needs_kustomize = pytest.mark.skipif(not HAS_KUSTOMIZE, reason="needs kustomize or kubectl")


def build(folder: Path) -> list[Object]:
    """The objects that `kubectl apply -k` sends."""
    done = subprocess.run([*KUSTOMIZE, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@cache
def _built(name: str) -> tuple[Object, ...]:
    return tuple(build(CLUSTER / "overlays" / name))


def overlay(name: str) -> list[Object]:
    """A copy of an overlay's objects."""
    return copy.deepcopy(list(_built(name)))


def only(name: str) -> Object:
    """The only object of an overlay."""
    (found,) = overlay(name)
    return found


def ray_cluster(ray: Object) -> Object:
    """The spec of the Ray cluster in a RayCluster, RayJob or RayService."""
    spec: Object = ray["spec"]
    found: Object = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return found


def pods(ray: Object) -> Iterator[tuple[str, Object]]:
    """Names and pod templates: "head", each worker group, and "submitter" of a RayJob."""
    spec = ray_cluster(ray)
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if "submitterPodTemplate" in ray["spec"]:
        yield "submitter", ray["spec"]["submitterPodTemplate"]


def container(template: Object) -> Object:
    """The pod's only container."""
    (found,) = template["spec"]["containers"]
    return found


def quantity(text: str) -> float:
    """A quantity of Kubernetes as a number: "500m" is 0.5, and "2Gi" is 2 * 1024**3."""
    units = {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    for unit, factor in units.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    return float(text)
