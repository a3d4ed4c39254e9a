"""Shared by the driver and the actors of a run: Ray, placement, faults, signals, and the setup of vLLM and DeepSpeed."""
