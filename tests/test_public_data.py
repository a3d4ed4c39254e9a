"""Public preference data: each data set's adapter, on a small made file with the published columns."""

import gzip
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaalign_rl.config.schema import Config, DataConfig, RunConfig
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.rows import parse_row, read_rows
from metaalign_rl.data import public
from metaalign_rl.data.public import ADAPTERS, PublicPairs, read_public
from metaalign_rl.data.public.hh_rlhf import parse
from metaalign_rl.data.public.rows import HARMLESS, HELPFUL
from metaalign_rl.pipeline.stages import data
from metaalign_rl.preflight import checks

Published = dict[str, Any]


@pytest.fixture(autouse=True)
def _no_cache_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# Published rows, one function a data set; the words stand for longer texts.


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
    """The rows of one prompt."""
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
    """A folder as it comes from the hub, with both splits."""
    inside = path / "helpful-base" if source == "hh_rlhf" else path
    write(inside / "train.jsonl", *train)
    write(inside / ("validation.jsonl" if source == "helpsteer2" else "test.jsonl"), *test)
    return str(path)


def read(path: Path, source: str, *rows: Published) -> PublicPairs:
    """The pairs of these rows as training data."""
    return read_public(source, folder(path, source, list(rows), published(source, "held out")))


def tiers(row: Row) -> tuple[str, str]:
    return row.system_info, row.user_info


def answers(row: Row) -> tuple[str | None, str | None]:
    return row.chosen, row.rejected


# RPR: the answer to prefer turns with the criterion, and with the tier that says it.


def test_an_rpr_row_becomes_six_pairs_whose_labels_flip_with_the_text_and_with_the_tier(tmp_path: Path) -> None:
    rows = read(tmp_path, "rpr", rpr()).train
    x, y = "Gives a short answer.", "Uses vivid images."
    a, b = rpr()["response_a"], rpr()["response_b"]
    assert {tiers(row): answers(row) for row in rows} == {
        (x, ""): (a, b),
        (y, ""): (b, a),
        ("", x): (a, b),
        ("", y): (b, a),
        (x, y): (a, b),
        (y, x): (b, a),
    }
    assert [row.relation for row in rows] == ["system_only"] * 2 + ["user_only"] * 2 + ["conflict"] * 2
    assert [row.tier for row in rows] == ["system"] * 2 + ["user"] * 2 + ["system"] * 2
    assert {row.messages[0]["content"] for row in rows} == {"How do tides work?"}


def test_the_six_pairs_are_three_flips(tmp_path: Path) -> None:
    rows = read(tmp_path, "rpr", rpr()).train
    assert list(Counter(row.tags["flip"] for row in rows).values()) == [2, 2, 2]
    assert {row.relation: row.tags["flip_kind"] for row in rows} == {
        "system_only": "value",
        "user_only": "value",
        "conflict": "tier",
    }
    assert [row.tags["kind"] for row in rows] == ["Conciseness", "Creativity"] * 3
    assert [row.family for row in rows] == ["helpful"] * 4 + ["priority"] * 2


# Multifaceted Collection: a system message and an instruction in one text.


def test_a_multifaceted_row_parts_at_its_first_line_break(tmp_path: Path) -> None:
    (row,) = read(tmp_path, "multifaceted", multifaceted("Explain:\n\ntides")).train
    assert (row.relation, row.tier, row.family) == ("system_only", "system", "diverse_opinion")
    assert tiers(row) == ("You are a sailor who talks of storms.", "")
    assert row.messages == [{"role": "user", "content": "Explain:\n\ntides"}]
    assert answers(row) == ("Aye, the sea heaves.", "A periodic change of level.")


def test_a_multifaceted_row_of_one_line_is_counted(tmp_path: Path) -> None:
    found = read(tmp_path, "multifaceted", multifaceted(), multifaceted(input="You are a sailor."))
    assert len(found.train) == 1
    assert found.left_out == {"rows whose input is one line": 1}


# PKU-SafeRLHF: one pair, ranked by two objectives.


def test_objectives_that_disagree_are_settled_by_tier(tmp_path: Path) -> None:
    rows = read(tmp_path, "safe_rlhf", safe_rlhf()).train
    found = {tiers(row): row.chosen for row in rows}
    assert found[HELPFUL, HARMLESS] == "Push the pins up."
    assert found[HARMLESS, HELPFUL] == "Ask a locksmith."
    assert found["", HELPFUL] == found[HELPFUL, ""] == "Push the pins up."
    assert found["", HARMLESS] == found[HARMLESS, ""] == "Ask a locksmith."
    assert {row.family for row in rows} == {"priority"}
    assert {row.tags["kind"] for row in rows} == {"helpful", "harmless"}


def test_objectives_that_agree_are_rows_of_agreement_in_both_orders(tmp_path: Path) -> None:
    rows = read(tmp_path, "safe_rlhf", safe_rlhf(better_response_id=1)).train
    assert {tiers(row): answers(row) for row in rows} == {
        (HELPFUL, HARMLESS): ("Ask a locksmith.", "Push the pins up."),
        (HARMLESS, HELPFUL): ("Ask a locksmith.", "Push the pins up."),
    }
    assert {(row.relation, row.tier) for row in rows} == {("agree", "system")}


# HH-RLHF: transcripts, in one folder for each objective.


CARD = """---
configs:
- config_name: all
  data_files:
  - split: train
    path: ["harmless-base/train*", "helpful-*/train*"]
---
"""


@pytest.mark.parametrize("card", ["", CARD])
def test_a_transcript_is_a_dialog_with_its_folders_objective_in_either_tier(card: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    write(tmp_path / "helpful-base" / "train.jsonl", hh_rlhf("First"))
    write(tmp_path / "harmless-base" / "train.jsonl", hh_rlhf("Second"))
    write(tmp_path / "harmless-base" / "test.jsonl", hh_rlhf("Third"))
    found = read_public("hh_rlhf", str(tmp_path))
    rows = {row.id: row for row in (*found.train, *found.held_out)}
    assert {name: tiers(row) for name, row in rows.items()} == {
        "hh-helpful-base-train-1-system": (HELPFUL, ""),
        "hh-helpful-base-train-1-user": ("", HELPFUL),
        "hh-harmless-base-train-1-system": (HARMLESS, ""),
        "hh-harmless-base-train-1-user": ("", HARMLESS),
        "hh-harmless-base-test-1-system": (HARMLESS, ""),
        "hh-harmless-base-test-1-user": ("", HARMLESS),
    }
    row = rows["hh-helpful-base-train-1-user"]
    assert [(message["role"], message["content"]) for message in row.messages] == [
        ("user", "First"),
        ("assistant", "Hi!"),
        ("user", "A joke?"),
    ]
    assert answers(row) == ("A knock.", "No.")
    assert {row.family for row in found.held_out} == {"priority"}


@pytest.mark.parametrize("path", ["harmless-base/train.jsonl", "harmless-base", "harmless-base-some.jsonl"])
def test_the_objective_of_a_file_is_in_its_path(path: str, tmp_path: Path) -> None:
    file = Path(path) if path.endswith(".jsonl") else Path(path) / "train.jsonl"
    write(tmp_path / file, *(hh_rlhf(f"Question {number}") for number in range(9)))
    assert {row.tags["kind"] for row in read_public("hh_rlhf", str(tmp_path / path)).train} == {"harmless"}


def test_a_file_that_names_no_objective_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", hh_rlhf())
    with pytest.raises(UserError, match="does not say which part of the data set it is; give a folder that holds"):
        read_public("hh_rlhf", path)


def test_transcripts_that_make_no_pair_are_counted(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        "hh_rlhf",
        hh_rlhf(),
        hh_rlhf(chosen="\n\nHuman: Bye\n\nAssistant: Bye."),
        hh_rlhf(rejected=hh_rlhf()["rejected"] + "\n\nHuman: Why?"),
        hh_rlhf(rejected=hh_rlhf()["chosen"]),
        hh_rlhf(rejected=hh_rlhf()["chosen"].removesuffix(" A knock.")),
        dict.fromkeys(("chosen", "rejected"), "\n\nHuman: A\n\nHuman: B\n\nAssistant: C"),
    )
    assert len(found.train) == 2
    assert found.left_out == {
        "rows whose transcripts part before the last answer": 1,
        "rows with a transcript that does not end with the assistant": 1,
        "rows whose two answers are alike": 1,
        "rows with an empty answer": 1,
        "rows whose dialog is not user and assistant in turn": 1,
    }


SPEAKERS = {"user": "Human", "assistant": "Assistant"}
TEXTS = st.text().map(str.strip).filter(lambda text: not re.search(r"\n\n(Human|Assistant):", text))


@given(st.lists(st.tuples(st.sampled_from(list(SPEAKERS)), TEXTS), min_size=1))
def test_parsing_undoes_rendering(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    assert parse("".join(f"\n\n{SPEAKERS[role]}: {content}" for role, content in turns)) == messages


@pytest.mark.parametrize("text", ["I wrote Human: hello", "one\nHuman: two", "Assistant: a script", "a\n\nHumans: b"])
def test_a_speakers_name_inside_a_message_does_not_part_it(text: str) -> None:
    assert parse(f"\n\nHuman: {text}\n\nAssistant: {text}") == [
        {"role": "user", "content": text},
        {"role": "assistant", "content": text},
    ]


# HelpSteer2: ratings of two answers.


def test_an_attribute_that_differs_asks_for_more_of_it_in_either_tier(tmp_path: Path) -> None:
    rows = read(tmp_path, "helpsteer2", helpsteer2(), helpsteer2(response="A tongue.", correctness=2)).train
    assert [(row.relation, row.tags["kind"]) for row in rows] == [
        ("system_only", "correctness"),
        ("user_only", "correctness"),
    ]
    assert rows[0].system_info == rows[1].user_info == "Get every fact right and leave no important one out."
    assert {answers(row) for row in rows} == {("A language.", "A tongue.")}
    assert {row.strength for row in rows} == {0.5}  # rated 4 and 2, of 0 to 4


def test_of_length_and_depth_less_can_be_wanted_too_which_turns_the_label(tmp_path: Path) -> None:
    rows = read(tmp_path, "helpsteer2", *helpsteer2_pair()).train
    more, less = "Answer at length and in detail.", "Answer briefly."
    short, long = "A language.", "A language by Microsoft."
    assert {tiers(row): row.chosen for row in rows} == {
        (more, ""): long,
        (less, ""): short,
        ("", more): long,
        ("", less): short,
        (more, less): long,
        (less, more): short,
    }


def test_a_prompt_with_marks_is_a_dialog(tmp_path: Path) -> None:
    prompt = "Who wrote it?\n\n<extra_id_1>Assistant\nMary did.\n\n<extra_id_1>User\nWhen?"
    (row, *_) = read(tmp_path, "helpsteer2", *helpsteer2_pair(prompt)).train
    assert row.messages == [
        {"role": "user", "content": "Who wrote it?"},
        {"role": "assistant", "content": "Mary did."},
        {"role": "user", "content": "When?"},
    ]


def test_answers_without_a_partner_or_a_difference_are_counted(tmp_path: Path) -> None:
    alike = [helpsteer2("alike"), helpsteer2("alike", response="A tongue.")]
    found = read(tmp_path, "helpsteer2", helpsteer2("single"), *alike, *helpsteer2_pair())
    assert len(found.train) == 6
    assert found.left_out == {
        "rows without a second answer to their prompt": 1,
        "rows whose two answers are rated alike": 2,
    }


# All of them.


@pytest.mark.parametrize("source", ADAPTERS)
def test_every_row_is_of_the_schema_and_has_an_id_of_its_own(source: str, tmp_path: Path) -> None:
    rows = [row for number in range(4) for row in published(source, f"Question {number}?")]
    found = read(tmp_path, source, *rows)
    pairs = found.train + found.held_out
    assert [parse_row(row.to_json(), row.id) for row in pairs] == pairs
    assert len({row.id for row in pairs}) == len(pairs)
    assert all(row.chosen and row.rejected and not row.checks and not row.labels for row in pairs)
    assert {row.tags["split"] for row in found.train} == {"train"}
    assert {row.tags["split"] for row in found.held_out} == {"held_out"}
    assert not found.left_out


@pytest.mark.parametrize("source", ADAPTERS)
def test_a_table_with_other_columns_is_refused_with_both_lists(source: str, tmp_path: Path) -> None:
    path = folder(tmp_path, source, [{"question": "a", "answer": "b"}], [{"question": "c", "answer": "d"}])
    with pytest.raises(UserError) as caught:
        read_public(source, path)
    expected = ", ".join(ADAPTERS[source].columns)
    assert f"(train): expected the columns {expected}; found question, answer; data.source and" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "row", "says"),
    [
        ("rpr", rpr(prompt=None), "field 'prompt': expected a text, found nothing"),
        ("rpr", rpr(criteria_y=" "), "field 'criteria_y': expected a text, found ' '"),
        ("multifaceted", multifaceted(chosen=None), "field 'chosen': expected a text, found nothing"),
        ("safe_rlhf", safe_rlhf(safer_response_id=2), "field 'safer_response_id': expected a whole number from 0 to 1"),
        ("hh_rlhf", hh_rlhf(rejected=None), "field 'rejected': expected a text, found nothing"),
        ("helpsteer2", helpsteer2(verbosity=None), "field 'verbosity': expected a whole number from 0 to 4"),
    ],
)
def test_a_broken_row_is_named(source: str, row: Published, says: str, tmp_path: Path) -> None:
    good = published(source, "c#")[-1]
    with pytest.raises(UserError) as caught:
        read(tmp_path, source, good, row)
    assert f"(train): row 2: {says}" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("source", ADAPTERS)
def test_without_a_published_split_a_tenth_of_the_prompts_is_held_out_and_always_the_same(
    source: str, tmp_path: Path
) -> None:
    rows = [row for number in range(200) for row in published(source, f"Question {number}?")]
    path = write(tmp_path / "helpful-base" / "all.jsonl", *rows)
    found = read_public(source, path)
    prompts = [{row.messages[0]["content"] for row in pairs} for pairs in (found.train, found.held_out)]
    assert not prompts[0] & prompts[1]
    assert 0.05 < len(prompts[1]) / 200 < 0.15
    assert read_public(source, path) == found


def test_a_published_split_stays_and_training_pairs_whose_prompt_it_holds_are_left_out(tmp_path: Path) -> None:
    found = read_public("rpr", folder(tmp_path, "rpr", [rpr("One"), rpr("Two")], [rpr("Two"), rpr("Three")]))
    assert {row.messages[0]["content"] for row in found.train} == {"One"}
    assert {row.messages[0]["content"] for row in found.held_out} == {"Two", "Three"}
    assert found.left_out == {"training pairs whose prompt is held out": 6}


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_a_file_is_read_by_its_ending(ending: str, tmp_path: Path) -> None:
    rows = [row for number in range(30) for row in helpsteer2_pair(f"Question {number}?")]
    found = read_public("helpsteer2", write(tmp_path / f"data.{ending}", *rows))
    assert len(found.train) + len(found.held_out) == 6 * 30


def test_a_compressed_file_is_read_as_it_was_published(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for number in range(9) for row in helpsteer2_pair(str(number)))
    for name in ("train.jsonl.gz", "validation.jsonl.gz"):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write(text if name.startswith("train") else text[: text.index("\n", text.index("\n") + 1) + 1])
    assert len(read_public("helpsteer2", str(tmp_path)).train) == 6 * 8
    found = read_public("helpsteer2", str(tmp_path / "train.jsonl.gz"))
    assert len(found.train + found.held_out) == 6 * 9


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("rows.txt", "", "expected a file that ends with .json, .jsonl, .parquet, .csv, found '"),
        ("rows.jsonl", "", "taken for a file: it is empty; give the data set as it was published"),
        ("rows.jsonl", '{"prompt": \n', "taken for a file: JSON parse error"),
        ("rows.parquet", "This is plain text.", "taken for a file: Parquet magic bytes not found"),
        ("folder", None, "taken for a folder: The directory at"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_the_reason(name: str, text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_public("rpr", str(path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "data.path: data.source=rpr needs a hub id such as microsoft/rpr, or a folder or file"),
        ("rows.jsonl", "expected a folder or file that exists, or a hub id (owner/name), found 'rows.jsonl'"),
        (
            "microsoft/rpr",
            "data.path: cannot load 'microsoft/rpr', taken for a hub id: Couldn't reach 'microsoft/rpr' on the Hub "
            "(OfflineModeIsEnabled); give the data set as it was published, as a hub id or, where the hub cannot be "
            "reached, as the folder of a copy",
        ),
    ],
)
def test_what_is_neither_here_nor_on_the_hub_is_named(path: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        read_public("rpr", path)
    assert says in str(caught.value)


def test_a_hub_id_is_loaded_with_both_folders_of_hh_rlhf(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, data_dir: str | None) -> datasets.DatasetDict:
        asked.append((path, data_dir))
        return datasets.DatasetDict(train=datasets.Dataset.from_list([hh_rlhf(str(data_dir))]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_public("hh_rlhf", "Anthropic/hh-rlhf")
    assert asked == [("Anthropic/hh-rlhf", "helpful-base"), ("Anthropic/hh-rlhf", "harmless-base")]
    assert {row.tags["kind"] for row in found.train + found.held_out} == {"helpful", "harmless"}


def test_a_split_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data" / "extra-00000-of-00001.jsonl", rpr())
    with pytest.raises(UserError, match=r"\(extra\): expected a split train, validation or test; rename its files"):
        read_public("rpr", str(tmp_path))


def test_data_without_a_usable_pair_says_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no pair there to train on; found 2 rows whose two answers are alike"):
        read(tmp_path, "rpr", *[rpr(response_b=rpr()["response_a"])] * 2)


# In the data stage.


def config(path: str, **changes: Any) -> Config:
    return Config(data=DataConfig(source="rpr", path=path, **changes), run=RunConfig(stages=["data", "reward", "ppo"]))


@pytest.fixture
def many(tmp_path: Path) -> str:
    train = [rpr(f"Question {number}?") for number in range(20)]
    return folder(tmp_path / "rpr", "rpr", train, [rpr(f"Held out {number}?") for number in range(5)])


def test_the_data_stage_writes_pairs_to_train_on_and_held_out_and_their_prompts(many: str, tmp_path: Path) -> None:
    data.run(config(many), tmp_path / "out")
    rows = {path.stem: list(read_rows(path)) for path in (tmp_path / "out").iterdir()}
    assert {use: len(found) for use, found in rows.items()} == {"pairs": 120, "held_out_pairs": 30, "prompts": 120}
    assert {tiers(row) for row in rows["prompts"]} == {tiers(row) for row in rows["pairs"]}
    assert not any(row.chosen or row.rejected or "flip" in row.tags for row in rows["prompts"])


def test_limits_take_whole_prompts_by_the_seed_and_say_so(
    many: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = config(many, pairs=12, held_out_pairs=6, prompts=5)
    outputs = [tmp_path / name for name in ("one", "again", "other")]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        data.run(replace(limited, run=replace(limited.run, seed=seed)), output)
    assert "data: 12 of 120 pairs, as data.pairs says\n" in capsys.readouterr().out
    one, again, other = ([row.id for row in read_rows(output / "pairs.jsonl")] for output in outputs)
    assert one == again != other
    assert len({name.split("-")[2] for name in one}) == 2
    assert len(list(read_rows(outputs[0] / "prompts.jsonl"))) == 5


def test_what_is_left_out_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "rpr", "rpr", [rpr(), rpr(response_a=" ")], [rpr("held out")])
    data.run(config(path), tmp_path / "out")
    assert "data: 1 rows with an empty answer, left out\n" in capsys.readouterr().out


def test_one_dialog_under_the_same_tiers_is_one_prompt(tmp_path: Path) -> None:
    rows = read(tmp_path, "rpr", rpr(), rpr(response_a="The moon pulls.")).train
    assert len(rows) == 12
    assert len(public.prompts(rows, 100)) == 6


def test_the_stage_evaluate_is_told_that_nothing_can_be_checked(many: str, tmp_path: Path) -> None:
    wanted = replace(config(many), run=RunConfig(stages=["data", "evaluate"]))
    with pytest.raises(UserError, match="no program can check answers to them; leave evaluate and report out of"):
        data.run(wanted, tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "good"), [("", False), ("/no/where", False), ("microsoft/rpr", True), (str(Path(__file__).parent), True)]
)
def test_preflight_wants_a_hub_id_or_something_that_exists(path: str, good: bool) -> None:
    failing = [check.name for check in checks.check_sources(config(path)) if not check.ok]
    assert ("data.path" not in failing) is good


def test_every_source_has_its_rows() -> None:
    assert set(get_args(get_type_hints(DataConfig)["source"])) == set(data.SOURCES)
