"""The built-in world: text from a seed, preferences that a program can check, and what training never sees held out."""
