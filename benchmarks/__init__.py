"""Benchmarks of speed and quality. Each writes a JSON file to `benchmarks/results/`."""
