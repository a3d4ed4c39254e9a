"""What `benchmarks/ppo.py` measures, one module a workload."""
