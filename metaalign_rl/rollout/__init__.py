"""Rollout: what asks for samples (`types`, light) and the vLLM actor that draws them (`engine`)."""
