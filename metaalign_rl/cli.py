"""`metaalign-rl`: run the pipeline, look at what it needs, its settings, its data and its results.

Light: what is heavy is imported by the command that needs it.
"""

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import metaalign_rl
from metaalign_rl import settings
from metaalign_rl.cli_parts import Commands, add_command, at_least_one
from metaalign_rl.cli_plan import add_plan_commands
from metaalign_rl.cli_policy import add_policy_commands
from metaalign_rl.config import Config
from metaalign_rl.errors import UserError
from metaalign_rl.failures import root_cause
from metaalign_rl.stopping import Stop

EXAMPLES = """examples:
  metaalign-rl run configs/quickstart.yaml                               # into runs/quickstart
  metaalign-rl run configs/quickstart.yaml run.name=mine ppo.steps=100   # any setting, by its dotted key
  metaalign-rl preflight configs/verih.yaml data.path=verih.jsonl        # is there all that the run needs?
  metaalign-rl plan configs/quickstart.yaml --model 7B --gpus 64         # which layout, how much memory, how fast?
  metaalign-rl config --describe                                         # every setting and its meaning
  metaalign-rl data validate rows.jsonl                                  # is my data file sound?
  metaalign-rl report runs/quickstart                                    # the results again
  metaalign-rl evaluate runs/quickstart --data rows.jsonl --output out   # any policy, on any rows
  metaalign-rl chat runs/quickstart --web                                # talk to it under two meta-prompts
  metaalign-rl serve runs/quickstart                                     # the policy over OpenAI's API

The same command again resumes a run: one of the same run.name under the same run.root goes on where it was.
With RAY_ADDRESS=host:port set, a run goes to that Ray cluster; else it starts Ray on this machine.
`metaalign-rl COMMAND --help` says more."""

PATH_ERRORS = (PermissionError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
WORDS = "settings over the file's, such as ppo.steps=100; `metaalign-rl config --describe` lists all"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parse(_parser(), argv)
    return guarded(lambda: args.command(args), resume=shlex.join(["metaalign-rl", *argv]) if argv[0] == "run" else "")


def job(stages: list[str] | None = None) -> int:
    """The whole of a script under `jobs/`: the pipeline, or only `stages` of it; the exit status."""
    parser = argparse.ArgumentParser(
        description=f"Run {', '.join(stages) if stages else 'the pipeline'} as a Ray job.",
        epilog="example: ray job submit --working-dir . -- "
        "python %(prog)s --config configs/quickstart.yaml run.name=submitted run.root=DIR",
        prog=sys.argv[0],
    )
    parser.add_argument("--config", required=True, type=Path, help="a YAML file with the run's settings")
    parser.add_argument("words", nargs="*", metavar="key=value", help=WORDS)
    args = _parse(parser, sys.argv[1:])
    words = [*args.words, f"run.stages=[{', '.join(stages)}]"] if stages else args.words
    resume = shlex.join(["python", *sys.argv])
    return guarded(lambda: _start(settings.load(Config, args.config, words)), resume)


def guarded(action: Callable[[], int | None], resume: str) -> int:
    """Run `action`; the exit status: its own, 2 after a user's error, 130 after Ctrl-C, 143 after SIGTERM, else 1.

    A user's error, or a path that cannot be read or written, is one line. Any other keeps its traceback, and the
    last line says what failed first.
    """
    try:
        return action() or 0
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{'; to go on from the last checkpoint: ' if resume else ''}{resume}", file=sys.stderr)
        return 128 + (interrupt.number if isinstance(interrupt, Stop) else signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, `head` say, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, PATH_ERRORS) and error.filename:
            print(f"error: {error.filename}: {error.strerror}; give another path", file=sys.stderr, flush=True)
            return 2
        root = root_cause(error)
        sys.stdout.flush()
        if not root.is_user_error:
            traceback.print_exc()
        print(f"error: {root.message if root.is_user_error else root}", file=sys.stderr, flush=True)
        return 2 if root.is_user_error else 1


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parsed arguments, with the `key=value` words behind options too, on which argparse gives up, and what stands
    behind `--` as `options` where a command passes those on."""
    given, passed = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args, rest = parser.parse_known_args(given)
    if passed and not hasattr(args, "options"):
        parser.error(f"this command passes nothing on: {' '.join(passed)}")
    args.options = passed
    if rest and (not hasattr(args, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words = [*args.words, *rest]
    return args


def _start(config: Config) -> None:
    from metaalign_rl import runtime

    runtime.require(runtime.preflight(config))  # before the seconds that the heavy imports take
    from metaalign_rl import pipeline

    pipeline.run(config)


def _load(args: argparse.Namespace) -> Config:
    return settings.load(Config, args.config, args.words)


def _run(args: argparse.Namespace) -> None:
    _start(_load(args))


def _config(args: argparse.Namespace) -> None:
    if args.describe:
        print(settings.describe(Config))
    elif args.config is None:
        raise UserError("give a config file, such as configs/quickstart.yaml, or --describe for every setting")
    else:
        print(settings.dump(_load(args)), end="")


def _data_build(args: argparse.Namespace) -> None:
    from metaalign_rl.stages import data

    data.build(_load(args), args.output)


def _data_validate(args: argparse.Namespace) -> None:
    from metaalign_rl.data.summary import validate

    for path in args.files:
        print(validate(path))


def _data_show(args: argparse.Namespace) -> None:
    from metaalign_rl.data.summary import show

    print(show(args.file, args.count))


def _report(args: argparse.Namespace) -> None:
    if not args.run.is_dir():
        raise UserError(f"{args.run}: no such folder; give a run's, such as runs/quickstart")
    from metaalign_rl import report

    report.show(args.run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metaalign-rl",
        description="Train one language model that follows tiered preferences given at inference time.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {metaalign_rl.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run_commands(commands)
    data = commands.add_parser("data", help="build, validate and show data files")
    _add_data_commands(data.add_subparsers(required=True, metavar="COMMAND"))
    report = add_command(commands, "report", "print a run's results again", _report, "runs/quickstart")
    report.add_argument("run", type=Path, metavar="RUN_DIR", help="a run's folder")
    add_policy_commands(commands)
    return parser


def _add_run_commands(commands: Commands) -> None:
    run = add_command(commands, "run", "run the pipeline, or resume it", _run, "configs/quickstart.yaml run.name=mine")
    add_plan_commands(commands, _add_settings, _load)
    config = add_command(commands, "config", "print a run's settings", _config, "configs/quickstart.yaml ppo.steps=100")
    config.add_argument("--describe", action="store_true", help="list every setting: type, default, meaning")
    _add_settings(run)
    _add_settings(config, nargs="?")


def _add_data_commands(commands: Commands) -> None:
    build = add_command(
        commands, "build", "write a config's rows", _data_build, "configs/quickstart.yaml --output rows"
    )
    _add_settings(build)
    build.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write to")
    validate = add_command(commands, "validate", "check rows and count them", _data_validate, "rows/pairs.jsonl")
    validate.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSONL in the project's schema")
    show = add_command(commands, "show", "print rows for reading", _data_show, "rows/pairs.jsonl -n 3")
    show.add_argument("file", type=Path, metavar="FILE", help="JSONL in the project's schema")
    show.add_argument("-n", dest="count", type=at_least_one, default=5, help="how many rows (default: 5)")


def _add_settings(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    text = "a YAML file with the run's settings"
    parser.add_argument("config", nargs=nargs, type=Path, metavar="CONFIG", help=text)
    parser.add_argument("words", nargs="*", metavar="key=value", help=WORDS)
