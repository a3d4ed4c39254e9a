"""Evaluation: a policy's responses to held-out rows, and reward models on held-out pairs."""
