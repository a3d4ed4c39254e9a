"""Shared by driver and actors of a run: Ray, placement, faults, signals, and the setup of vLLM and DeepSpeed."""
