"""Checks the requirements of a run before it starts: this machine, the cluster, and estimates of memory."""
