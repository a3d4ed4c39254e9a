"""What a decoder's config says about its attention: whether texts may share one sequence, or one padded batch."""

from typing import Any


def attends_to_all(config: Any) -> bool:
    """Whether every layer attends to all earlier tokens, with positions that depend on the text alone.

    Only then can a mask keep texts of one sequence apart. Sliding windows are lost under a mask of our own, recurrent
    layers read across texts, and longrope depends on the longest text of the batch. Short probe texts cannot show a
    window or longrope, so the config decides.

    Args:
        config: a transformers text config.
    """
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}  # windows, recurrent states
    return window is None and not others and longrope_threshold(config) is None


def longrope_threshold(config: Any) -> int | None:
    """The tokens up to which a model with longrope uses its short factors; None for other models.

    transformers chooses the factors by the longest text of a batch, so a batch must not have texts on both sides.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]  # one, or one by layer type
    found = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(found, default=None)
