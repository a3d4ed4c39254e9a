"""Types of command-line arguments for `argparse`. Each raises `argparse.ArgumentTypeError` for a wrong value."""

import argparse
import math
from pathlib import Path

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import expand_path


def path(text: str) -> Path:
    """A file or folder; a leading `~` is the home folder."""
    return Path(model(text))


def model(text: str) -> str:
    """A folder, a hub id or a URL; see `path`."""
    try:
        return text if "://" in text else expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least_one(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, found {text!r}")
    return int(text)


def port(text: str) -> int:
    """A TCP port."""
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, found {text!r}")
    return int(text)


def temperature(text: str) -> float:
    """A sampling temperature; 0 is greedy."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 10:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 10, found {text!r}")
    return value


def name_and_folder(text: str) -> tuple[str, Path]:
    """`NAME=DIR`."""
    name, equals, folder = text.partition("=")
    if not (name and equals and folder):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, found {text!r}")
    return name, path(folder)
