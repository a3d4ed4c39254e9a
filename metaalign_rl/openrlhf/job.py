"""PPO by OpenRLHF's own trainer, as it is, on our prompts and with our reward model.

It reads the run that the config names: the prompts of its stage `data`, the policy of `sft` and the reward model of
`reward`, or those given by model.path and reward.path or reward.url. It writes `RUN/openrlhf/`. docs/openrlhf.md.
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
from metaalign_rl.core.checkpoints import refuse_own_code
from metaalign_rl.core.dataflow import ANSWERS, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import write_jsonl
from metaalign_rl.core.net import listen
from metaalign_rl.openrlhf.flags import Places, flags, left_out
from metaalign_rl.pipeline.context import RunContext
from metaalign_rl.runtime.exit_status import guarded

MODULE = "openrlhf.cli.train_ppo_ray"
SERVER = "import sys; from reward.cli import main; sys.exit(main())"  # metaalign-reward, installed or not
TOKEN = "METAALIGN_REWARD_TOKEN"


def main() -> int:
    """The job; the trainer's exit status, 2 after a user's error."""
    parser = argparse.ArgumentParser(
        description="PPO by OpenRLHF's own trainer, with our prompts and our reward model.",
        usage="%(prog)s [-h] --config FILE [--trainer FILE] [key=value ...] [-- OPTIONS OF OPENRLHF]",
        prog=sys.argv[0],
    )
    parser.add_argument("--config", required=True, type=Path, help="a YAML file with the run's settings")
    parser.add_argument("--trainer", type=Path, metavar="FILE", help=f"a script to start in place of {MODULE}")
    parser.add_argument("words", nargs="*", metavar="key=value", help="settings over the file's")
    given, options = sys.argv[1:], []
    if "--" in given:
        place = given.index("--")
        given, options = given[:place], given[place + 1 :]
    args = parser.parse_intermixed_args(given)
    start = [str(args.trainer)] if args.trainer else ["-m", MODULE]
    return guarded(lambda: run(loader.load(Config, args.config, args.words), start, options), resume="")


def run(config: Config, start: list[str], options: list[str]) -> int:
    """Write the prompts, see that a reward server answers, and run the trainer; its exit status.

    Args:
        start: what Python runs, such as `-m openrlhf.cli.train_ppo_ray`.
        options: of the trainer, behind ours and so over them.

    Raises:
        UserError: the config, or what it names, does not serve.
    """
    context = RunContext(config)
    policy, output = context.start_policy(), context.folder.root / "openrlhf"
    check(config, policy)
    write_jsonl(output / "prompts.jsonl", prompts(config, context.rows("prompts"), policy))
    if missing := left_out(config):
        print(f"OpenRLHF has no option for these settings: {', '.join(missing)}", flush=True)
    with reward_server(config, context.reward_model()) as url:
        words = flags(config, Places(policy, output / "prompts.jsonl", url, output))
        command = [sys.executable, *start, *words, *options]
        print(shlex.join(command).replace(os.environ.get(TOKEN) or "\0", "***"), flush=True)
        return subprocess.run(command, env=environment()).returncode


def check(config: Config, policy: Path) -> None:
    """Refuse what OpenRLHF would do wrong or unsafely.

    Raises:
        UserError: names the setting or the file.
    """
    refuse_own_code(policy)  # OpenRLHF would run it
    if config.model.dtype != "bfloat16":
        raise UserError(f"model.dtype: OpenRLHF trains in bfloat16 alone; set bfloat16, found {config.model.dtype}")
    others = [name for name in ("checks_weight", "function_weight") if getattr(config.ppo, name) > 0]
    if others or config.ppo.model_weight == 0:
        raise UserError(f"ppo.{(others or ['model_weight'])[0]}: here the reward model alone is the reward")
    if config.reward.view != "whole":
        raise UserError(f"reward.view: the server shows the reward model whole rows, found {config.reward.view}")


def prompts(config: Config, rows: list[Row], policy: Path) -> list[dict[str, str]]:
    """OpenRLHF's data set: the rows that our sampler draws for each step, rendered, with the row as the label.

    Raises:
        UserError: a rendered prompt is too long: OpenRLHF would cut its left end, and so the meta-prompt.
    """
    from metaalign_rl.core.meta_prompt import load_tokenizer
    from metaalign_rl.ppo.prompt_sampler import PromptSampler

    tokenizer, sampler = load_tokenizer(policy), PromptSampler(rows, config.ppo.sampler, config.run.seed)
    drawn = [index for step in range(config.ppo.steps) for index in sampler.draw(step, config.ppo.prompts_per_step)]
    room = config.model.max_tokens - config.rollout.max_new_tokens
    made = {index: _example(tokenizer, rows[index], room) for index in sorted(set(drawn))}
    return [made[index] for index in drawn]


def _example(tokenizer: Any, row: Row, room: int) -> dict[str, str]:
    from metaalign_rl.core.meta_prompt import MetaPrompt

    text = MetaPrompt(row.system_info, row.user_info).render(tokenizer, row.messages)
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokens > room:
        raise UserError(f"row {row.id!r}: expected at most {room} tokens, found {tokens}; raise model.max_tokens")
    label = {name: value for name, value in row.to_json().items() if name not in ANSWERS}
    return {"input": text, "label": json.dumps(label, ensure_ascii=False)}


@contextmanager
def reward_server(config: Config, model: Path | None) -> Iterator[str]:
    """The address of `/get_reward`: of the server that the config names, else of one on this machine until we leave.

    Raises:
        UserError: there is no reward model, or other nodes would have to reach a server on this one.
    """
    if config.reward.url:
        yield with_token(config.reward.url)
        return
    if model is None:
        raise UserError("there is no reward model: run the stage reward, or give reward.path or reward.url")
    if os.environ.get("RAY_ADDRESS"):
        raise UserError(
            "reward.url: on a cluster give a server that every node reaches, such as "
            f"`metaalign-reward serve --model {model} --host 0.0.0.0`, with its secret in {TOKEN}"
        )
    with listen("127.0.0.1", 0) as found:
        port = found.getsockname()[1]
    words = ["serve", "--model", str(model), "--port", str(port), "--mode", config.reward.mode]
    command = [sys.executable, "-c", SERVER, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as server:
        try:
            assert server.stdout is not None
            if f":{port}" not in server.stdout.readline():
                raise UserError(f"reward.path: no server starts with {model}; its error stands above")
            yield with_token(f"http://127.0.0.1:{port}")
        finally:
            server.terminate()


def with_token(url: str) -> str:
    """The address of `/get_reward` with the server's secret, which OpenRLHF can only send as a part of it."""
    scheme, _, rest = url.rstrip("/").partition("://")
    token = os.environ.get(TOKEN)
    secret = f"openrlhf:{token}@" if token and "@" not in rest else ""
    return f"{scheme}://{secret}{rest}/get_reward"


def environment() -> dict[str, str]:
    """This process's environment, in which Python finds what this process found."""
    root = str(Path(__file__).resolve().parents[2])
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))}
