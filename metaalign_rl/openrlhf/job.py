"""Runs PPO with OpenRLHF's unmodified trainer, on our prompts and with our reward model. See docs/openrlhf.md.

It uses the prompts of the run's stage `data`, the policy of `sft` and the reward model of `reward`, or the models in
model.path, reward.path and reward.url. It writes `RUN/openrlhf/`.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metaalign_rl.config import loader
from metaalign_rl.config.schema import Config
from metaalign_rl.core.arguments import path
from metaalign_rl.core.checkpoints import refuse_own_code
from metaalign_rl.core.dataflow import ANSWERS, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import write_jsonl
from metaalign_rl.core.net import listen
from metaalign_rl.openrlhf.flags import TrainerPaths, flags, unsupported_settings
from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.runtime.exit_status import guarded
from reward.plugins import openrlhf as openrlhf_plugin
from reward.plugins.environment import URL
from reward.serving.client import TOKEN_VARIABLE

MODULE = "openrlhf.cli.train_ppo_ray"
SERVER = "import sys; from reward.cli import main; sys.exit(main())"  # metaalign-reward, also where it is not installed


def main() -> int:
    """Run the job. Returns the trainer's exit status, or 2 after a user error."""
    parser = argparse.ArgumentParser(
        description="Run PPO with OpenRLHF's own trainer, on our prompts and with our reward model.",
        usage="%(prog)s [-h] --config FILE [--trainer FILE] [key=value ...] [-- OPTIONS OF OPENRLHF]",
        prog=sys.argv[0],
    )
    parser.add_argument("--config", required=True, type=path, help="a YAML file with the run's settings")
    parser.add_argument("--trainer", type=path, metavar="FILE", help=f"a script to run instead of {MODULE}")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    given, options = sys.argv[1:], []
    if "--" in given:
        separator = given.index("--")
        given, options = given[:separator], given[separator + 1 :]
    args = parser.parse_intermixed_args(given)
    start = [str(args.trainer)] if args.trainer else ["-m", MODULE]
    return guarded(lambda: run(loader.load(Config, args.config, args.settings), start, options), resume="")


def run(config: Config, start: list[str], options: list[str]) -> int:
    """Write the prompts, start a reward server if needed, and run the trainer.

    Args:
        start: arguments of Python, such as `["-m", "openrlhf.cli.train_ppo_ray"]`.
        options: more options of the trainer; they override ours.

    Returns:
        The trainer's exit status.

    Raises:
        UserError: a setting is not supported, or a model or server is missing.
    """
    context = RunContext(config)
    policy, output = context.start_policy(), context.folder.root / "openrlhf"
    check(config, policy)
    write_jsonl(output / "prompts.jsonl", prompts(config, context.rows("prompts"), policy))
    if unsupported := unsupported_settings(config):
        print(f"OpenRLHF has no option for these settings: {', '.join(unsupported)}", flush=True)
    with reward_server(config, context.reward_model()) as url:
        ours = flags(config, TrainerPaths(policy, output / "prompts.jsonl", endpoint(url), output))
        command = [sys.executable, *start, *ours, *options]
        print(shlex.join(command), flush=True)
        return subprocess.run(command, env=environment() | {URL: url}).returncode


def check(config: Config, policy: Path) -> None:
    """Check the settings that OpenRLHF would ignore or use unsafely.

    Raises:
        UserError: a setting or checkpoint is not supported; the message names it.
    """
    refuse_own_code(policy)  # OpenRLHF would run the checkpoint's code
    if config.model.dtype != "bfloat16":
        raise UserError(f"model.dtype: expected bfloat16, which OpenRLHF needs, found {config.model.dtype}")
    others = [name for name in ("checks_weight", "function_weight") if getattr(config.ppo, name) > 0]
    if others or config.ppo.model_weight == 0:
        key = (others or ["model_weight"])[0]
        expected = "0" if others else "above 0"
        value = getattr(config.ppo, key)
        raise UserError(f"ppo.{key}: expected {expected}, found {value}; here only the reward model gives rewards")
    if config.reward.view != "whole":
        raise UserError(f"reward.view: expected whole, the only view of the reward server, found {config.reward.view}")


def prompts(config: Config, rows: list[Row], policy: Path) -> list[dict[str, str]]:
    """OpenRLHF's data set: the prompts that our sampler selects for all steps, in order.

    Returns:
        One example per prompt: `input` is the rendered prompt, `label` the row as JSON.

    Raises:
        UserError: a rendered prompt is too long. OpenRLHF would cut its left end, which has the meta-prompt.
    """
    from metaalign_rl.core.tokenizers import load_tokenizer
    from metaalign_rl.ppo.prompt_sampler import PromptSampler

    tokenizer, sampler = load_tokenizer(policy), PromptSampler(rows, config.ppo.sampler, config.run.seed)
    order = [index for step in range(config.ppo.steps) for index in sampler.draw(step, config.ppo.prompts_per_step)]
    max_tokens = config.model.max_tokens - config.rollout.max_new_tokens
    examples = {index: _example(tokenizer, rows[index], max_tokens) for index in sorted(set(order))}
    return [examples[index] for index in order]


def _example(tokenizer: Any, row: Row, max_tokens: int) -> dict[str, str]:
    from metaalign_rl.core.meta_prompt import MetaPrompt

    text = MetaPrompt(row.system_info, row.user_info).render(tokenizer, row.messages)
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokens > max_tokens:
        raise UserError(f"row {row.id!r}: expected at most {max_tokens} tokens, found {tokens}; raise model.max_tokens")
    label = {name: value for name, value in row.to_json().items() if name not in ANSWERS}
    return {"input": text, "label": json.dumps(label, ensure_ascii=False)}


@contextmanager
def reward_server(config: Config, model: Path | None) -> Iterator[str]:
    """Yield the URL of the server `reward.url`, or else of a server that runs here inside the block.

    Args:
        model: the reward model's folder.

    Raises:
        UserError: there is no reward model; or the run is on a cluster, whose nodes may not reach this machine.
    """
    if config.reward.url:
        yield config.reward.url.rstrip("/")
        return
    if model is None:
        raise UserError("there is no reward model; run the stage reward, or give reward.path or reward.url")
    if os.environ.get("RAY_ADDRESS"):
        raise UserError(
            "reward.url: expected a server that every node of the cluster reaches, found none; start one with "
            f"`metaalign-reward serve --model {model} --host 0.0.0.0`, with its secret in {TOKEN_VARIABLE}"
        )
    with listen("127.0.0.1", 0) as found:
        port = found.getsockname()[1]
    arguments = ["serve", "--model", str(model), "--port", str(port), "--mode", config.reward.mode]
    command = [sys.executable, "-c", SERVER, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        try:
            assert server.stdout is not None
            if f":{port}" not in server.stdout.readline():
                raise UserError(f"reward.path: the server with {model} did not start; see its error above")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def endpoint(url: str) -> str:
    """What OpenRLHF asks for rewards: the server itself, or with a token our plugin, which asks the server.

    OpenRLHF sends no headers, and it prints and logs its arguments. The plugin reads the token from the environment.
    """
    return openrlhf_plugin.__file__ if os.environ.get(TOKEN_VARIABLE) else f"{url}/get_reward"


def environment() -> dict[str, str]:
    """This process's environment, with our packages on Python's path."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))}
