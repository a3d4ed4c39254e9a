"""The preflight: checks the requirements of a run before it starts."""

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
    """Compare the requirements of a config with this machine and, if Ray is connected, with its cluster."""
    counts = [] if is_connected() else cluster.check_counts(config)
    checks = [
        *counts,
        preflight_checks.check_memory(config),
        *preflight_checks.check_dtype(config),
        preflight_checks.check_root(config),
        *cluster.check_devices(config),
        preflight_checks.check_disk(config),
        *preflight_checks.check_sources(config),
        *preflight_checks.check_openrlhf(config),
        *preflight_checks.check_wandb(config),
        *([] if config.cluster.gpus else estimates.check_estimates(config)),
    ]
    return [*(cluster_preflight(config) if is_connected() else []), *checks]


def cluster_preflight(config: Config) -> list[PreflightCheck]:
    """Compare the requirements with the connected cluster: what `preflight` cannot know without it."""
    counts, devices = list(cluster.check_counts(config)), list(cluster.check_devices(config))
    checks = list(counts)
    if not devices and all(check.ok for check in counts):
        bundles = [NamedBundle(who, part["CPU"], part.get("GPU", 0.0)) for who, part in placement.named_bundles(config)]
        checks += list(cluster.check_bundles(bundles, cluster.nodes())) or cluster.check_free(bundles)
    if os.environ.get("RAY_ADDRESS"):
        checks += cluster.check_storage(config)
    return [*checks, *(estimates.check_estimates(config) if config.cluster.gpus else [])]


def require(checks: list[PreflightCheck]) -> None:
    """Print the warnings among the checks.

    Raises:
        UserError: checks failed; lists them with their remedies.
    """
    for check in checks:
        if check.is_warning:
            print(f"warning: {_text(check)}", file=sys.stderr)
    missing = [_text(check) for check in checks if not check.ok]
    if len(missing) > 1:
        raise UserError("\n  ".join([f"{len(missing)} things that the run needs are missing:", *missing]))
    if missing:
        raise UserError(missing[0])


def _text(check: PreflightCheck) -> str:
    return f"{check.name}: needs {check.needed}, found {check.found}; {check.remedy}"
