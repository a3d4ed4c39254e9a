"""The preflight: everything that a run needs, checked before anything starts."""

import os
import sys

from metaalign_rl.config.schema import Config
from metaalign_rl.core.errors import UserError
from metaalign_rl.preflight import checks as preflight_checks
from metaalign_rl.preflight import cluster, estimates
from metaalign_rl.preflight.bin_packing import NamedBundle
from metaalign_rl.preflight.checks import PreflightCheck
from metaalign_rl.runtime import placement
from metaalign_rl.runtime.ray_session import is_connected


def preflight(config: Config) -> list[PreflightCheck]:
    """What the config needs beside what this machine has, and once Ray is connected, what its cluster has."""
    counts, devices = list(cluster.check_counts(config)), list(cluster.check_devices(config))
    checks = [*counts, preflight_checks.check_memory(config), preflight_checks.check_root(config), *devices]
    if is_connected() and not devices and all(check.ok for check in counts):
        asked = [NamedBundle(who, part["CPU"], part.get("GPU", 0.0)) for who, part in placement.named_bundles(config)]
        checks += list(cluster.check_places(asked, cluster.nodes())) or cluster.check_free(asked)
    if is_connected() and os.environ.get("RAY_ADDRESS"):
        checks += cluster.check_storage(config)
    checks += [
        preflight_checks.check_disk(config),
        *preflight_checks.check_sources(config),
        *preflight_checks.check_wandb(config),
    ]
    return [*checks, *estimates.check_estimates(config)]


def require(checks: list[PreflightCheck]) -> None:
    """Raise a `UserError` that lists what is missing, with the remedies; warn of what is tight."""
    for check in checks:
        if check.tight:
            needed = f"{check.name}: needs {check.needed}, found {check.found}"
            print(f"warning: {needed}; if need be, {check.remedy}", file=sys.stderr)
    missing = [f"{c.name}: needs {c.needed}, found {c.found}; {c.remedy}" for c in checks if not c.ok]
    if len(missing) > 1:
        raise UserError("\n  ".join([f"{len(missing)} things that the run needs are missing:", *missing]))
    if missing:
        raise UserError(missing[0])
