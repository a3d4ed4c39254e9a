"""The commands `preflight` and `plan`. Imports no heavy packages: each command imports what it needs."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from metaalign_rl.cli.arguments import Commands, add_command, add_settings, load_config
from metaalign_rl.core.arguments import at_least_one, model, path
from metaalign_rl.core.errors import UserError

if TYPE_CHECKING:
    from metaalign_rl.plan.layout import Devices
    from metaalign_rl.plan.work import Case


def add_plan_commands(commands: Commands) -> None:
    """Add the two commands to the command line."""
    text = "check the prerequisites of a run"
    preflight = add_command(commands, "preflight", text, _preflight, "configs/quickstart.yaml cluster.cpus=4")
    add_settings(preflight)
    text = "propose a layout for a model on GPUs, and estimate memory and time"
    plan = add_command(commands, "plan", text, _plan, "configs/quickstart.yaml --model 7B --gpus 64 --gpu h100")
    add_settings(plan, config_is_optional=True)
    add = plan.add_argument
    text = "0.5B to 72B, or a checkpoint's folder (default: the config's)"
    add("--model", type=model, default="", metavar="SIZE", help=text)
    add("--gpus", type=at_least_one, default=None, metavar="N", help="number of GPUs (default: the config's)")
    add("--nodes", type=at_least_one, default=None, metavar="N", help="number of nodes (default: one per 8 GPUs)")
    add("--gpu", default="", metavar="KIND", help="h100 (default), h200, b200, a100, …, or cpu")
    add("--prompt-tokens", type=at_least_one, metavar="N", help="mean prompt length (default: what the config allows)")
    add(
        "--answer-tokens", type=at_least_one, metavar="N", help="mean response length (default: rollout.max_new_tokens)"
    )
    add("--json", action="store_true", help="print the estimates as JSON")
    add("--check", type=path, metavar="RUN_DIR", help="compare the estimates with this run's measurements instead")


def _preflight(args: argparse.Namespace) -> int:
    from metaalign_rl.preflight import cluster, estimates
    from metaalign_rl.preflight.run import preflight, require
    from metaalign_rl.runtime import ray_session

    config = load_config(args)
    if os.environ.get("RAY_ADDRESS") or config.cluster.gpus:  # only Ray knows these resources
        with ray_session.connect(config):
            checks, nodes, case = preflight(config), cluster.nodes(), estimates.find_case(config)
    else:
        checks, nodes, case = preflight(config), [], estimates.find_case(config)
    rows = [("", "setting", "needs", "found")]
    rows += [(check.verdict, check.name, check.needed, check.found) for check in checks]
    print(_columns(rows), end="\n\n")
    for node in nodes:
        print(f"{node.name}: {node.cpus:g} CPUs, {node.gpus:g} GPUs, {node.memory_gib:.0f} GiB of memory for actors")
    print(estimates.describe(config, case))
    require(checks)
    return 0


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def _plan(args: argparse.Namespace) -> None:
    from metaalign_rl.plan import check, layout, page

    if args.check is not None:
        found = check.compare(args.check, args.gpu, args.prompt_tokens)
        print(json.dumps(found, indent=2) if args.json else check.render(found))
        return
    if args.config is None:
        raise UserError("give a config file, such as configs/quickstart.yaml, or --check RUN_DIR")
    given, devices = _case(args)
    case = replace(given, config=replace(given.config, cluster=replace(given.config.cluster, gpus=devices.gpus)))
    words = layout.propose(case, devices)
    planned, changes = layout.apply(case, words), layout.changes(given, words)
    print(json.dumps(page.to_json(planned, words), indent=2) if args.json else page.render(planned, changes))


def _case(args: argparse.Namespace) -> "tuple[Case, Devices]":
    """The case to plan: the config, the model, the work and the devices that the options describe."""
    from metaalign_rl.plan import case as cases
    from metaalign_rl.plan.layout import Devices
    from metaalign_rl.plan.rates import find_device
    from metaalign_rl.plan.shape import find_shape
    from metaalign_rl.plan.work import Case, work_of

    config = load_config(args)
    gpus = 0 if args.gpu == "cpu" else args.gpus or config.cluster.gpus
    if args.gpu not in ("", "cpu") and not gpus:
        raise UserError(f"--gpu {args.gpu}: expected a number of GPUs, found none; give --gpus N")
    nodes = args.nodes or -(-gpus // 8) or 1
    if gpus % nodes:
        raise UserError(f"--gpus {gpus} --nodes {nodes}: expected the same number of GPUs on each node")
    policy = find_shape(args.model) if args.model else cases.policy_shape(config)
    if policy is None:
        raise UserError(f"model.path: the shape of the hub's model {config.model.path!r} is unknown; give --model")
    device = find_device(args.gpu or "h100" if gpus else "cpu", config.cluster.cpus)
    work = work_of(config, args.prompt_tokens, args.answer_tokens)
    reward = cases.reward_shape(config, policy)
    case = Case(config=config, policy=policy, reward=reward, device=device, work=work, nodes=nodes)
    return case, Devices(gpus, nodes)
