"""Rollout: vLLM engines as Ray actors, and the pool that splits requests over them."""
