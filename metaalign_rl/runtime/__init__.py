"""What the driver and the actors of a run share: Ray, placement, faults, signals, setup of vLLM and DeepSpeed."""
