"""`metaalign-rl`: run the pipeline; check prerequisites, settings and data; use the results.

Imports no heavy packages: each command imports what it needs.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import metaalign_rl
from metaalign_rl.cli.arguments import CONFIG, Commands, add_command, add_settings, add_words, load_config
from metaalign_rl.cli.plan import add_plan_commands
from metaalign_rl.cli.policy import add_policy_commands
from metaalign_rl.config import loader, settings_table
from metaalign_rl.config.schema import Config
from metaalign_rl.core.arguments import at_least_one, path
from metaalign_rl.core.errors import UserError
from metaalign_rl.runtime.exit_status import guarded

EXAMPLES = """examples:
  metaalign-rl run configs/quickstart.yaml                               # train in runs/quickstart
  metaalign-rl run configs/quickstart.yaml run.name=mine ppo.steps=100   # change settings by their keys
  metaalign-rl preflight configs/verih.yaml data.path=verih.jsonl        # check prerequisites
  metaalign-rl plan configs/quickstart.yaml --model 7B --gpus 64         # propose a layout, estimate memory and time
  metaalign-rl prepare HuggingFaceTB/SmolLM2-135M-Instruct --output base # make any language model a start
  metaalign-rl config --describe                                         # list every setting
  metaalign-rl data validate rows.jsonl                                  # check a data file
  metaalign-rl report runs/quickstart                                    # print a run's results again
  metaalign-rl evaluate runs/quickstart --data rows.jsonl --output out   # evaluate any policy on any rows
  metaalign-rl chat runs/quickstart --web                                # talk to a policy under two meta-prompts
  metaalign-rl serve runs/quickstart                                     # serve a policy over OpenAI's API

Rerunning with the same run.name and run.root resumes the run.
A run uses the Ray cluster at RAY_ADDRESS (host:port) if that is set. Otherwise it starts Ray on this machine.
`metaalign-rl COMMAND --help` shows the options of a command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _parse(_parser(), argv)
    return guarded(lambda: args.command(args), resume=shlex.join(["metaalign-rl", *argv]) if argv[0] == "run" else "")


def job(stages: list[str] | None = None) -> int:
    """Run the pipeline, or only `stages`, for a script under `jobs/`, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=f"Run {', '.join(stages) if stages else 'the pipeline'} as a Ray job.",
        epilog="example: ray job submit --runtime-env jobs/runtime_env.yaml --working-dir . -- "
        "python %(prog)s --config configs/quickstart.yaml run.name=submitted run.root=DIR",
        prog=sys.argv[0],
    )
    parser.add_argument("--config", required=True, type=path, help=CONFIG)
    add_words(parser)
    args = _parse(parser, sys.argv[1:])
    words = [*args.words, f"run.stages=[{', '.join(stages)}]"] if stages else args.words
    resume = shlex.join(["python", *sys.argv])
    return guarded(lambda: _start(loader.load(Config, args.config, words)), resume)


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments.

    `key=value` words may also follow options, which argparse alone does not allow. The arguments after `--` become
    `options`, if the command passes them on.
    """
    given, passed = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args, rest = parser.parse_known_args(given)
    if passed and not hasattr(args, "options"):
        parser.error(f"expected no arguments after --, found {' '.join(passed)}")
    args.options = passed
    if rest and (not hasattr(args, "words") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.words = [*args.words, *rest]
    return args


# The commands.


def _start(config: Config) -> None:
    from metaalign_rl.preflight.run import preflight, require

    # Checks this machine before the seconds that Ray takes to start. `pipeline.run` checks the cluster.
    require(preflight(config))
    from metaalign_rl.pipeline import run

    run.run(config)


def _run(args: argparse.Namespace) -> None:
    _start(load_config(args))


def _config(args: argparse.Namespace) -> None:
    if args.describe:
        print(settings_table.describe(Config))
    elif args.config is None:
        raise UserError("give a config file, such as configs/quickstart.yaml, or --describe for every setting")
    else:
        print(loader.dump(load_config(args)), end="")


def _data_build(args: argparse.Namespace) -> None:
    from metaalign_rl.pipeline.stages import data

    data.build(load_config(args), args.output)


def _data_validate(args: argparse.Namespace) -> None:
    from metaalign_rl.data.summary import validate

    for file in args.files:
        print(validate(file))


def _data_show(args: argparse.Namespace) -> None:
    from metaalign_rl.data.summary import show

    print(show(args.file, args.count))


def _report(args: argparse.Namespace) -> None:
    if not args.run.is_dir():
        raise UserError(f"{args.run}: no such folder; give a run's folder, such as runs/quickstart")
    from metaalign_rl import report

    report.show(args.run)


# Their parsers.


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
    report.add_argument("run", type=path, metavar="RUN_DIR", help="folder of a run")
    add_policy_commands(commands)
    return parser


def _add_run_commands(commands: Commands) -> None:
    run = add_command(
        commands, "run", "run the pipeline, or resume a run", _run, "configs/quickstart.yaml run.name=mine"
    )
    add_settings(run)
    add_plan_commands(commands)
    config = add_command(commands, "config", "print a run's settings", _config, "configs/quickstart.yaml ppo.steps=100")
    config.add_argument("--describe", action="store_true", help="list every setting: type, default, unit, meaning")
    add_settings(config, config_is_optional=True)


def _add_data_commands(commands: Commands) -> None:
    text, example = "write the rows of a config to files", "configs/quickstart.yaml --output rows"
    build = add_command(commands, "build", text, _data_build, example)
    add_settings(build)
    build.add_argument("--output", type=path, required=True, metavar="DIR", help="folder to write to")
    validate = add_command(commands, "validate", "check rows and count them", _data_validate, "rows/pairs.jsonl")
    rows = "file of rows: JSON lines, a JSON array or Parquet"
    validate.add_argument("files", nargs="+", type=path, metavar="FILE", help=rows)
    show = add_command(commands, "show", "print rows for reading", _data_show, "rows/pairs.jsonl -n 3")
    show.add_argument("file", type=path, metavar="FILE", help=rows)
    show.add_argument("-n", dest="count", type=at_least_one, default=5, help="number of rows (default: 5)")
