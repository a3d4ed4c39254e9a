"""Estimates the memory and time of a run, and proposes a layout for given devices. Imports no heavy packages."""
