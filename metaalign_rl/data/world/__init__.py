"""The built-in world: text generated from a seed, with preferences that a program can check.

Some wordings, combinations, topics and personas are held out from training.
"""
