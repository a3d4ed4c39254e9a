"""The commands that prepare a model or use a trained one: `prepare`, `evaluate`, `chat` and `serve`.

Imports no heavy packages: each command imports what it needs.
"""

import argparse
import os

from metaalign_rl.cli.arguments import Commands, add_command, add_words
from metaalign_rl.core.arguments import at_least_one, model, name_and_folder, path, port, temperature
from metaalign_rl.core.errors import UserError


def add_policy_commands(commands: Commands) -> None:
    """Add the commands to the command line."""
    _add_prepare(commands)
    _add_evaluate(commands)
    _add_chat(commands)
    _add_serve(commands)


def _add_prepare(commands: Commands) -> None:
    text = "install the meta-prompt's chat template and special tokens in a language model, without training it"
    prepare = add_command(commands, "prepare", text, _prepare, "HuggingFaceTB/SmolLM2-135M-Instruct --output base")
    add = prepare.add_argument
    add("model", type=model, metavar="MODEL", help="folder of a checkpoint, GGUF file, or hub id")
    add("--output", type=path, required=True, metavar="DIR", help="new folder for the prepared model")


def _prepare(args: argparse.Namespace) -> None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports DeepSpeed, which would warn of a missing GPU
    from metaalign_rl.core.prepare import prepare_checkpoint

    output = args.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: expected a new or empty folder; give another one, or remove it")
    changes = prepare_checkpoint(args.model, output)
    print(*(f"- {change}" for change in changes or ["nothing to change"]), sep="\n")
    print(f"prepared model: {output}")
    print(f"next: metaalign-rl chat {output}, or metaalign-rl run CONFIG model.path={output}")


def _add_evaluate(commands: Commands) -> None:
    text = "evaluate any policy on rows, or a reward model on pairs"
    evaluate = add_command(commands, "evaluate", text, _evaluate, "runs/quickstart --data rows.jsonl --output out")
    add = evaluate.add_argument
    add("model", type=model, metavar="MODEL", help="folder of a run (its policy), a checkpoint or a reward model, or "
        "the base URL of an OpenAI-compatible endpoint (its key is read from OPENAI_API_KEY)")  # fmt: skip
    add("--data", type=path, required=True, metavar="FILE", help="rows with checks or pairs")
    add("--output", type=path, required=True, metavar="DIR", help="folder for figures.json and evaluation.html")
    add("--temperature", type=temperature, default=0.0, help="sampling temperature; 0 decodes greedily (default: 0)")
    add("--max-new-tokens", type=at_least_one, default=32, metavar="N", help="longest response (default: 32)")
    add("--served-model", default="", metavar="NAME", help="model to evaluate, if the endpoint has several")
    add("--tiers", choices=("template", "message"), default="template", help="how an endpoint gets the tiers: "
        "through the meta-prompt's chat template (default), or as the text of a system message")  # fmt: skip
    add("--control", action="append", default=[], type=name_and_folder, metavar="NAME=DIR",
        help="model to compare a reward model with, in addition to its run's controls; repeatable. With the NAME "
        "tier_blind, preference_blind or scalar it is evaluated as that control")  # fmt: skip
    add_words(evaluate, "settings for vLLM, such as cluster.gpus=1 model.dtype=bfloat16")


def _evaluate(args: argparse.Namespace) -> None:
    from metaalign_rl.cli.evaluate import evaluate, load_settings
    from metaalign_rl.core.dataflow import Sampling

    config = load_settings(args.model, args.words)
    sampling = Sampling(args.temperature, args.max_new_tokens, stop=tuple(config.rollout.stop))
    metrics = evaluate(
        args.model,
        args.data,
        args.output,
        config,
        sampling,
        served=args.served_model,
        tiers=args.tiers,
        controls=args.control,
    )
    for name, value in metrics.items():
        if isinstance(value, float):
            print(f"{name:<13} {value:.3f}")
    for name, modes in metrics.get("models", {}).items():  # a reward model and its controls
        print(f"accuracy, {name:<18}", *(f"{mode} {report['accuracy']:.3f}" for mode, report in modes.items()))
    print(f"all metrics and evaluation.html are in {args.output}")


def _add_chat(commands: Commands) -> None:
    text = "talk to a policy, change its meta-prompt, and see each response scored by tier"
    chat = add_command(commands, "chat", text, _chat, "runs/quickstart --system 'always write in capitals.'")
    add = chat.add_argument
    add("run", type=path, metavar="RUN_DIR", help="folder of a run, or of a policy's checkpoint")
    add("--reward", type=path, default=None, metavar="DIR", help="reward model (default: the run's)")
    add("--system", default="", metavar="TEXT", help="initial System Info")
    add("--user", default="", metavar="TEXT", help="initial User Info")
    add("--temperature", type=temperature, default=0.0, help="sampling temperature; 0 decodes greedily (default: 0)")
    add("--max-new-tokens", type=at_least_one, default=64, metavar="N", help="longest response (default: 64)")
    keep = "keep the history, or start a new dialog with each message (default: as in the run's prompts)"
    add("--dialog", action=argparse.BooleanOptionalAction, help=keep)
    add("--web", action="store_true", help="serve a web page instead, with two meta-prompts side by side")
    add("--host", default="127.0.0.1", help="address of the page (default: 127.0.0.1, only this machine)")
    add("--port", type=port, default=8501, help="port of the page (default: 8501)")


def _chat(args: argparse.Namespace) -> None:
    from metaalign_rl.chat.session import ChatPolicy, Session, trained_on_dialogs

    policy = ChatPolicy(args.run, args.reward, args.max_new_tokens)
    keep_dialog = trained_on_dialogs(args.run) if args.dialog is None else args.dialog
    start = Session(policy, args.system, args.user, args.temperature, keep_dialog)
    if args.web:
        from metaalign_rl.chat.web import serve

        serve(start, args.run.resolve().name, args.host, args.port)
    else:
        from metaalign_rl.chat.terminal import run

        run(start)


def _add_serve(commands: Commands) -> None:
    text = "serve a policy over vLLM's OpenAI-compatible API"
    serve = add_command(commands, "serve", text, _serve, "runs/quickstart --port 8000 -- --max-num-seqs 64")
    add = serve.add_argument
    add("policy", type=path, metavar="RUN_DIR", help="folder of a run, or of a checkpoint")
    add("--name", default="", help="the model's name for clients (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, only this machine)")
    add("--port", type=port, default=8000, help="port to listen on (default: 8000)")
    serve.set_defaults(options=[])
    serve.usage = f"{serve.prog} [-h] [--name NAME] [--host HOST] [--port PORT] RUN_DIR [-- OPTIONS OF vllm serve]"


def _serve(args: argparse.Namespace) -> None:
    from metaalign_rl.serving.policy_server import serve

    serve(args.policy, args.name or args.policy.resolve().name, args.host, args.port, args.options)
