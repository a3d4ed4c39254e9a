"""The workloads of `benchmarks.ppo`, one module each."""
