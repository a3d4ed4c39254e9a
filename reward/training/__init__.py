"""Training of the reward model and of its controls."""
