"""Settings that were renamed. An old name is an error that names the new one; the files of old runs stay readable."""

from collections.abc import Mapping
from typing import Any

KEYS = {  # old key: new key
    "learners": "learner.world_size",
    "learner.loss_mean": "learner.loss_aggregation",
    "learner.max_growth": "learner.spike_limit",
    "ppo.parts": "ppo.stream_chunks",
    "reward.right_first": "reward.easy_first_fraction",
}
VALUES = {  # key: old value: new value
    "cluster.layout": {"apart": "disaggregated"},
}


def current(settings: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """Saved settings under their current names and values.

    Args:
        settings: values by key.
        section: the section of the keys, such as "reward"; without it the keys are dotted.
    """
    prefix = f"{section}." if section else ""
    return {
        KEYS.get(prefix + key, prefix + key).removeprefix(prefix): _current_value(prefix + key, value)
        for key, value in settings.items()
    }


def _current_value(key: str, value: Any) -> Any:
    renamed = VALUES.get(key, {})
    return renamed.get(value, value) if isinstance(value, str) else value
