"""The reward model as the reward function of other trainers: OpenRLHF, TRL and verl. Imports none of them."""
