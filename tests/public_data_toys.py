"""Published rows of each public data set, made for the tests: the published columns with short texts."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.public import PublicPairs, read_public

Published = dict[str, Any]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own for `datasets`, so that no result comes from this machine's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rpr(prompt: str = "How do tides work?", **changes: Any) -> Published:
    row = {"prompt": prompt, "response_a": "In short: the moon.", "response_b": "Imagine a vast, breathing sea."}
    row |= {"criteria_x": "Gives a short answer.", "category_x": "Conciseness", "scenario_x": "A busy pupil asks."}
    row |= {"criteria_y": "Uses vivid images.", "category_y": "Creativity", "scenario_y": "A poet asks."}
    return row | {"id": 7} | {f"profile_{number}": "Likes the sea." for number in range(5)} | changes


def multifaceted(prompt: str = "What is a tide?", **changes: Any) -> Published:
    row = {"input": f"You are a sailor who talks of storms.\n{prompt}"}
    return row | {"chosen": "Aye, the sea heaves.", "rejected": "A periodic change of level."} | changes


def safe_rlhf(prompt: str = "How do I pick a lock?", **changes: Any) -> Published:
    row = {"prompt": prompt, "response_0": "Push the pins up.", "response_1": "Ask a locksmith."}
    row |= {"is_response_0_safe": False, "is_response_1_safe": True}
    return row | {"better_response_id": 0, "safer_response_id": 1} | changes


def hh_rlhf(prompt: str = "Hello", **changes: Any) -> Published:
    common = f"\n\nHuman: {prompt}\n\nAssistant: Hi!\n\nHuman: A joke?\n\nAssistant:"
    return {"chosen": f"{common} A knock.", "rejected": f"{common} No."} | changes


def helpsteer2(prompt: str = "c#", **changes: Any) -> Published:
    ratings = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    return {"prompt": prompt, "response": "A language.", **ratings} | changes


def helpsteer2_pair(prompt: str = "c#") -> list[Published]:
    return [helpsteer2(prompt), helpsteer2(prompt, response="A language by Microsoft.", verbosity=3)]


def published(source: str, prompt: str) -> list[Published]:
    """The published rows of one prompt."""
    makers = {"rpr": rpr, "multifaceted": multifaceted, "safe_rlhf": safe_rlhf, "hh_rlhf": hh_rlhf}
    return helpsteer2_pair(prompt) if source == "helpsteer2" else [makers[source](prompt)]


def write(path: Path, *rows: Published) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(list(rows)).to_csv(path)
    else:
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    return str(path)


def folder(path: Path, source: str, train: list[Published], test: list[Published]) -> str:
    """A folder as on the hub, with both splits."""
    inside = path / "helpful-base" if source == "hh_rlhf" else path
    write(inside / "train.jsonl", *train)
    write(inside / ("validation.jsonl" if source == "helpsteer2" else "test.jsonl"), *test)
    return str(path)


def read(path: Path, source: str, *rows: Published) -> PublicPairs:
    """The pairs that `source`'s adapter makes of these rows as training data."""
    return read_public(source, folder(path, source, list(rows), published(source, "held out")))


def tiers(row: Row) -> tuple[str, str]:
    return row.system_info, row.user_info


def answers(row: Row) -> tuple[str | None, str | None]:
    return row.chosen, row.rejected
