"""Trainers of SFT and the reward model: one rank of transformers' Trainer per Ray actor."""
