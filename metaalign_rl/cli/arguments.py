"""Helpers shared by the commands' parsers. Imports no heavy packages."""

import argparse
from collections.abc import Callable
from typing import TypeAlias

from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.arguments import path

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

CONFIG = "YAML file with the run's settings"
WORDS = "settings that override the file, such as ppo.steps=100; `metaalign-rl config --describe` lists all"


def add_command(
    commands: Commands, name: str, text: str, command: Callable[..., object], example: str
) -> argparse.ArgumentParser:
    """Add a parser for `name` that runs `command`, with an example under its help."""
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.epilog = f"example: {parser.prog} {example}"
    parser.set_defaults(command=command)
    return parser


def add_settings(parser: argparse.ArgumentParser, *, config_is_optional: bool = False) -> None:
    """Add the arguments CONFIG and `key=value`, which `load_config` reads."""
    nargs = "?" if config_is_optional else None
    parser.add_argument("config", nargs=nargs, type=path, metavar="CONFIG", help=CONFIG)
    add_words(parser)


def add_words(parser: argparse.ArgumentParser, text: str = WORDS) -> None:
    """Add the `key=value` arguments."""
    parser.add_argument("words", nargs="*", metavar="key=value", help=text)


def load_config(args: argparse.Namespace) -> Config:
    """The settings of the file CONFIG, with the `key=value` words over them.

    Raises:
        UserError: see `loader.load`.
    """
    return loader.load(Config, args.config, args.words)
