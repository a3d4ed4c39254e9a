"""Measurements of speed and quality; each writes its JSON under `benchmarks/results/`."""
