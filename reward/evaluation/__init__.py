"""Evaluation of a reward model: accuracy on pairs, calibration, and explanations of single scores."""
