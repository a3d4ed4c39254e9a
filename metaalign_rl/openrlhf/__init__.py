"""Runs PPO with OpenRLHF's own trainer, on our prompts and with our reward model."""
