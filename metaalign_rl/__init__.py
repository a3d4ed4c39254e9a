"""Preference-conditioned RLHF: one model that follows preferences given at inference time."""

__version__ = "0.1.0"
