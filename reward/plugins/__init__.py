"""The reward model as other trainers' reward function: OpenRLHF, TRL and verl. None of them is imported here."""
