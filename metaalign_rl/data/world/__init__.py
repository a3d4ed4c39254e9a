"""The built-in world: text from a seed, preferences that a program can check, and what training never sees held out."""

from metaalign_rl.data.world import answers  # noqa: F401  (registers the world's checks)
