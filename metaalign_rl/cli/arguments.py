"""What the commands' parsers share. Light."""

import argparse
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands, name: str, text: str, command: Callable[..., object], example: str
) -> argparse.ArgumentParser:
    """A parser for `name` that runs `command`, with an example under its help."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.epilog = f"example: {parser.prog} {example}"
    parser.set_defaults(command=command)
    return parser
