"""`metaalign-reward`: train, evaluate, use and export the reward model."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from metaalign_rl.core import renamed_settings
from metaalign_rl.core.arguments import at_least_one, model, path
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import write_json, write_jsonl
from metaalign_rl.core.records import read_records
from metaalign_rl.core.rows import read_rows
from metaalign_rl.core.settings import documentation
from metaalign_rl.core.views import CONTROLS, apply_view
from reward.score import MODES, Mode, Score
from reward.training import controls
from reward.training.config import RewardTraining

EXAMPLES = """examples:
  metaalign-reward train --base sft-model --data pairs.jsonl --output reward-model --learning-rate 1e-3
  torchrun --standalone --nproc-per-node 4 --no-python metaalign-reward train ...
  metaalign-reward evaluate --model reward-model --data held_out_pairs.jsonl --output report.json
  metaalign-reward score --model reward-model --input rows.jsonl --output scores.jsonl
  metaalign-reward explain --model reward-model --input rows.jsonl
  metaalign-reward serve --model reward-model --port 8300
  metaalign-reward export --scalar --model reward-model --output scalar-model

a row to score; rows are in a file of JSON lines, a JSON array or Parquet:
  {"system_info": "Answer in capitals.", "messages": [{"role": "user", "content": "hi"}], "response": "HELLO"}
"""
_RAW = argparse.RawDescriptionHelpFormatter


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, or 2 after an error that the user can fix."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("reward").setLevel(logging.INFO)
    try:
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _score(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from reward.answers import answer_row

    _require_other_file(arguments.input, arguments.output)
    places, records = _read(arguments.input)
    rows = [answer_row(record, place) for record, place in zip(records, places, strict=True)]
    with _load_scorers(arguments) as scorer:
        scores = scorer.stream(rows, places, batch_tokens=arguments.batch_tokens)
        bar = tqdm(scores, "scoring", len(rows), unit=" rows", disable=None)  # None: shown only on a terminal
        write_jsonl(arguments.output, (_score_record(*pair) for pair in zip(records, bar, strict=True)))


def _read(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """The place of each record in the file, for errors, and the records."""
    found = [(record.place, record.read()) for record in read_records(path)]
    return [place for place, _ in found], [values for _, values in found]


def _score_record(record: dict[str, Any], score: Score) -> dict[str, Any]:
    name = {"id": record["id"]} if "id" in record else {}
    return {
        **name,
        "overall": score.overall,
        "tiers": score.tiers,
        "probabilities": score.probabilities,
        "truncated": score.truncated,
    }


def _require_other_file(source: Path, output: Path | None) -> None:
    """Raise a `UserError` if a command would overwrite the file that it reads."""
    if output is not None and (output.resolve() == source.resolve() or (output.exists() and output.samefile(source))):
        raise UserError(f"--output {output}: expected another file than the input, found the same; give a new name")


def _evaluate(arguments: argparse.Namespace) -> None:
    _require_other_file(arguments.data, arguments.output)
    rows = apply_view(list(read_rows(arguments.data)), controls.view_of(arguments.control))
    mode: Mode | None = "overall" if arguments.control else arguments.mode
    scorer = _load_scorer(arguments)
    from reward.evaluation.evaluate import evaluate

    report = evaluate(scorer, rows, mode, batch_tokens=arguments.batch_tokens)
    if arguments.output:
        write_json(arguments.output, report)
    else:
        print(json.dumps(report, indent=2))


def _explain(arguments: argparse.Namespace) -> None:
    from reward.evaluation.explanation import as_text, explain

    _require_other_file(arguments.input, arguments.output)
    places, records = _read(arguments.input)
    explanations = explain(_load_scorer(arguments), records, places, batch_tokens=arguments.batch_tokens)
    if arguments.output:
        write_jsonl(arguments.output, (explanation.to_json() for explanation in explanations))
    else:
        print("\n".join(map(as_text, explanations)))


def _train(arguments: argparse.Namespace) -> None:
    config = RewardTraining(**{field.name: getattr(arguments, field.name) for field in fields(RewardTraining)})
    config, view = controls.training_of(arguments.control, config), controls.view_of(arguments.control)
    rows = apply_view(list(read_rows(arguments.data)), view)
    eval_rows = apply_view(list(read_rows(arguments.eval_data)), view) if arguments.eval_data else None
    from reward.training.train import train

    _hide_progress_bars()
    result = train(config, rows, eval_rows, arguments.base, arguments.output)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts one process per device
        print(f"{arguments.output}: {result['steps']} updates, {result['seconds']:.0f} s, loss {result['loss']:.4f}")
        print(f"labels with training data: {', '.join(result['trained_labels'])}")
        print(f"calibrated: {', '.join(result['calibrated_labels']) or 'none, for lack of held-out labelled rows'}")


def _export(arguments: argparse.Namespace) -> None:
    from reward.model import export_scalar

    _hide_progress_bars()
    export_scalar(arguments.model, arguments.output)


def _serve(arguments: argparse.Namespace) -> None:
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if find_spec(package) is None:
            raise UserError(f'serve: {package} is not installed; pip install "metaalign-rl[serve]"')
    from reward.serving.app import ServingConfig
    from reward.serving.server import require_token, serve

    token = require_token(arguments.host)
    scorer = _load_scorer(arguments)
    config = ServingConfig(
        name=arguments.name or Path(arguments.model).name,
        token=token,
        mode=arguments.mode,
        batch_tokens=arguments.batch_tokens,
        queue_tokens=arguments.queue_tokens,
        max_wait=arguments.max_wait_ms / 1000,
        max_bytes=arguments.max_body_mib * 2**20,
        max_row_characters=arguments.max_row_characters,
        max_row_messages=arguments.max_row_messages,
        body_seconds=arguments.body_seconds,
    )
    serve(scorer, config, arguments.host, arguments.port)


def _load_scorers(arguments: argparse.Namespace) -> Any:
    """A context manager with a scorer, or with a pool of scorers if several devices are given."""
    devices = arguments.device or [None]
    if len(devices) == 1:
        arguments.device = devices[0]
        return nullcontext(_load_scorer(arguments))
    from reward.scorer_pool import ScorerPool

    _hide_progress_bars()
    return ScorerPool(arguments.model, devices, arguments.dtype, arguments.max_tokens)


def _load_scorer(arguments: argparse.Namespace) -> Any:
    from reward.scorer import Scorer

    _hide_progress_bars()
    return Scorer.from_pretrained(
        arguments.model, device=arguments.device, dtype=arguments.dtype, max_tokens=arguments.max_tokens
    )


def _hide_progress_bars() -> None:
    """Hide transformers' bars for loading and saving, unless standard error is a terminal."""
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("metaalign-reward", description=__doc__, epilog=EXAMPLES, formatter_class=_RAW)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    score = _command(commands, "score", _score, "score responses")
    score.add_argument("--input", type=path, required=True, help="rows: messages, response, system_info, user_info")
    score.add_argument(
        "--output", type=path, required=True, help="JSONL: overall, tiers (logits), probabilities, truncated"
    )
    _add_model(score, several=True)

    explain = _command(commands, "explain", _explain, "show how much each tier changed the scores")
    explain.add_argument("--input", type=path, required=True, help="rows, as for score")
    explain.add_argument("--output", type=path, help="JSONL: overall, probabilities, moved (default: print as text)")
    _add_model(explain)

    evaluate = _command(commands, "evaluate", _evaluate, "measure accuracy and calibration on pairs")
    evaluate.add_argument("--data", type=path, required=True, help="rows with chosen and rejected")
    evaluate.add_argument("--output", type=path, help="JSON report (default: standard output)")
    evaluate.add_argument(
        "--mode",
        choices=MODES,
        help="score that ranks a pair (default: the first of these whose labels the model was trained on)",
    )
    _add_control(evaluate, "evaluate the model as this control: hide what it does not see, and use mode overall")
    _add_model(evaluate)

    serve = _command(commands, "serve", _serve, "score over HTTP: POST /score, /get_reward, /classify")
    _add_serving(serve)
    _add_model(serve)

    train = _command(commands, "train", _train, "train on pairs and labelled responses; resumes if interrupted")
    train.add_argument("--base", type=model, required=True, help="checkpoint to start from: an SFT model, or any other")
    train.add_argument("--data", type=path, required=True, help="rows with chosen and rejected, or labels")
    train.add_argument("--eval-data", type=path, help="rows whose loss is logged after each epoch")
    train.add_argument("--output", type=path, required=True, help="folder for the model; must be new or empty")
    _add_control(
        train, "train a control: without the meta-prompt, without each text's tier, or with the label overall only"
    )
    _add_training(train)

    export = _command(commands, "export", _export, "write a checkpoint for tools that load only one label")
    export.add_argument("--scalar", action="store_true", required=True, help="keep only the label overall")
    export.add_argument("--model", type=model, required=True, help="reward model's folder or hub id")
    export.add_argument("--output", type=path, required=True, help="folder to write; must be new or empty")
    return parser


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help, epilog=EXAMPLES, formatter_class=_RAW)
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    parser.add_argument("--model", type=model, required=True, help="reward model's folder or hub id")
    device = "for example cpu or cuda:1 (default: the machine's accelerator, or the CPU)"
    if several:
        parser.add_argument("--device", nargs="+", help=f"{device}; with several, each gets a process: cuda:0 cuda:1")
    else:
        parser.add_argument("--device", help=device)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="data type (default: bfloat16 if this hardware is fast at it, else the checkpoint's type)",
    )
    parser.add_argument("--batch-tokens", type=int, default=16_384, help="tokens per forward pass (default: 16384)")
    parser.add_argument(
        "--max-tokens",
        type=at_least_one,
        help="tokens of the longest text; of a longer one, the beginning of the dialog is not read (default: as in "
        "training)",
    )


def _add_control(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "--control",
        type=lambda name: name.replace("-", "_"),
        choices=CONTROLS,
        default="",
        help=help,
    )


def _add_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address (default: this machine only); any other needs a secret in METAALIGN_REWARD_TOKEN, which clients "
        "send",
    )
    parser.add_argument("--port", type=int, default=8300, help="port to listen on (default: 8300)")
    parser.add_argument("--name", default="", help="the model's name in replies (default: the folder's name)")
    parser.add_argument("--mode", choices=MODES, default="overall", help="the score of /get_reward (default: overall)")
    parser.add_argument(
        "--max-wait-ms",
        type=float,
        default=5.0,
        help="how long a request waits for others to share its batch (default: 5)",
    )
    parser.add_argument(
        "--queue-tokens",
        type=int,
        default=262_144,
        help="tokens that may wait; further requests get status 429 (default: 262144)",
    )
    parser.add_argument(
        "--max-row-characters", type=at_least_one, default=100_000, help="characters of a row (default: 100000)"
    )
    parser.add_argument("--max-row-messages", type=at_least_one, default=512, help="messages of a row (default: 512)")
    parser.add_argument("--max-body-mib", type=at_least_one, default=4, help="MiB of a request's body (default: 4)")
    parser.add_argument(
        "--body-seconds", type=float, default=20.0, help="seconds until a request's body must be complete (default: 20)"
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    for field in fields(RewardTraining):
        meaning = documentation(field).meaning
        flag, text = _flag(field.name), f"{meaning} (default: {field.default})"
        if field.type is bool:
            parser.add_argument(flag, action="store_true", help=meaning)
        elif field.type in (int, float):
            parser.add_argument(flag, type=field.type, default=field.default, help=text)
        else:
            parser.add_argument(flag, choices=get_args(field.type), default=field.default, help=text)
    for old, new in renamed_settings.KEYS.items():
        if old.startswith("reward."):
            parser.add_argument(_flag(old), type=_refuse(_flag(new)), help=argparse.SUPPRESS)


def _flag(key: str) -> str:
    return f"--{key.removeprefix('reward.').replace('_', '-')}"


def _refuse(new: str) -> Callable[[str], None]:
    """The type of an option that was renamed: every value is an error."""

    def refuse(value: str) -> None:
        raise argparse.ArgumentTypeError(f"was renamed to {new}; use the new option")

    return refuse
