"""Monitoring of PPO: metrics, alarms and saved rollouts."""
