"""Public preference data: loading, splits and errors of all data sets, and the data stage."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import datasets
import pytest
from public_data_toys import (
    Published,
    folder,
    helpsteer2,
    helpsteer2_pair,
    hh_rlhf,
    multifaceted,
    private_cache,  # noqa: F401  (a fixture)
    published,
    read,
    rpr,
    safe_rlhf,
    tiers,
    write,
)

from metaalign_rl.config.schema import Config, DataConfig, RunConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.rows import parse_row, read_rows
from metaalign_rl.data import public
from metaalign_rl.data.public import ADAPTERS, read_public
from metaalign_rl.pipeline.stages import data
from metaalign_rl.preflight import checks

# All data sets.


@pytest.mark.parametrize("source", ADAPTERS)
def test_every_row_fits_the_schema_and_has_a_unique_id(source: str, tmp_path: Path) -> None:
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
def test_a_table_without_the_columns_is_refused_and_both_lists_are_named(source: str, tmp_path: Path) -> None:
    path = folder(tmp_path, source, [{"question": "a", "answer": "b"}], [{"question": "c", "answer": "d"}])
    with pytest.raises(UserError) as caught:
        read_public(source, path)
    expected = ", ".join(ADAPTERS[source].columns)
    assert f"(train): expected the columns {expected}, found question, answer; data.source and" in str(caught.value)


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
def test_the_error_of_a_wrong_row_names_the_row(source: str, row: Published, says: str, tmp_path: Path) -> None:
    good = published(source, "c#")[-1]
    with pytest.raises(UserError) as caught:
        read(tmp_path, source, good, row)
    assert f"(train): row 2: {says}" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("source", ADAPTERS)
def test_without_a_published_split_the_same_tenth_of_the_prompts_is_always_held_out(
    source: str, tmp_path: Path
) -> None:
    rows = [row for number in range(200) for row in published(source, f"Question {number}?")]
    path = write(tmp_path / "helpful-base" / "all.jsonl", *rows)
    found = read_public(source, path)
    prompts = [{row.messages[0]["content"] for row in pairs} for pairs in (found.train, found.held_out)]
    assert not prompts[0] & prompts[1]
    assert 0.05 < len(prompts[1]) / 200 < 0.15
    assert read_public(source, path) == found


def test_a_published_split_is_kept_and_training_pairs_with_its_prompts_are_left_out(tmp_path: Path) -> None:
    found = read_public("rpr", folder(tmp_path, "rpr", [rpr("One"), rpr("Two")], [rpr("Two"), rpr("Three")]))
    assert {row.messages[0]["content"] for row in found.train} == {"One"}
    assert {row.messages[0]["content"] for row in found.held_out} == {"Two", "Three"}
    assert found.left_out == {"training pairs whose prompt is held out": 6}


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_the_ending_of_a_file_gives_its_format(ending: str, tmp_path: Path) -> None:
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
def test_the_error_of_data_that_cannot_be_loaded_names_path_and_reason(
    name: str, text: str | None, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.mkdir() if text is None else path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_public("rpr", str(path))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "data.path: expected a hub id such as microsoft/rpr, or a folder or file, found nothing"),
        ("rows.jsonl", "expected a folder or file that exists, or a hub id (owner/name), found 'rows.jsonl'"),
        (
            "microsoft/rpr",
            "data.path: cannot load 'microsoft/rpr', taken for a hub id: Couldn't reach 'microsoft/rpr' on the Hub "
            "(OfflineModeIsEnabled); give the data set as it was published, as a hub id or, where the hub cannot be "
            "reached, as the folder of a copy",
        ),
    ],
)
def test_the_error_of_a_path_that_is_neither_local_nor_on_the_hub_names_it(
    path: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        read_public("rpr", path)
    assert says in str(caught.value)


def test_both_folders_of_hh_rlhf_are_loaded_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, data_dir: str | None) -> datasets.DatasetDict:
        asked.append((path, data_dir))
        return datasets.DatasetDict(train=datasets.Dataset.from_list([hh_rlhf(str(data_dir))]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_public("hh_rlhf", "Anthropic/hh-rlhf")
    assert asked == [("Anthropic/hh-rlhf", "helpful-base"), ("Anthropic/hh-rlhf", "harmless-base")]
    assert {row.tags["kind"] for row in found.train + found.held_out} == {"helpful", "harmless"}


def test_a_split_with_an_unknown_name_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "data" / "extra-00000-of-00001.jsonl", rpr())
    with pytest.raises(UserError, match=r"\(extra\): expected a split train, validation or test, found extra; rename"):
        read_public("rpr", str(tmp_path))


def test_the_error_of_data_without_a_usable_pair_names_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected pairs to train on, found 2 rows whose two answers are equal"):
        read(tmp_path, "rpr", *[rpr(response_b=rpr()["response_a"])] * 2)


# The data stage.


def config(path: str, **changes: Any) -> Config:
    return Config(data=DataConfig(source="rpr", path=path, **changes), run=RunConfig(stages=["data", "reward", "ppo"]))


@pytest.fixture
def many(tmp_path: Path) -> str:
    train = [rpr(f"Question {number}?") for number in range(20)]
    return folder(tmp_path / "rpr", "rpr", train, [rpr(f"Held out {number}?") for number in range(5)])


def test_the_data_stage_writes_training_pairs_held_out_pairs_and_prompts(many: str, tmp_path: Path) -> None:
    data.run(config(many), tmp_path / "out")
    rows = {path.stem: list(read_rows(path)) for path in (tmp_path / "out").iterdir()}
    assert {use: len(found) for use, found in rows.items()} == {"pairs": 120, "held_out_pairs": 30, "prompts": 120}
    assert {tiers(row) for row in rows["prompts"]} == {tiers(row) for row in rows["pairs"]}
    assert not any(row.chosen or row.rejected or "flip" in row.tags for row in rows["prompts"])


def test_limits_keep_all_pairs_of_a_prompt_depend_on_the_seed_and_are_reported(
    many: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limited = config(many, pairs=12, held_out_pairs=6, prompts=5)
    outputs = [tmp_path / name for name in ("one", "same", "other")]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        data.run(replace(limited, run=replace(limited.run, seed=seed)), output)
    assert "data: 12 of 120 pairs, as data.pairs says\n" in capsys.readouterr().out
    one, same, other = ([row.id for row in read_rows(output / "pairs.jsonl")] for output in outputs)
    assert one == same != other
    assert len({name.split("-")[2] for name in one}) == 2
    assert len(list(read_rows(outputs[0] / "prompts.jsonl"))) == 5


def test_rows_that_are_left_out_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(tmp_path / "rpr", "rpr", [rpr(), rpr(response_a=" ")], [rpr("held out")])
    data.run(config(path), tmp_path / "out")
    assert "data: 1 rows with an empty answer, left out\n" in capsys.readouterr().out


def test_pairs_with_the_same_dialog_and_tiers_give_one_prompt(tmp_path: Path) -> None:
    rows = read(tmp_path, "rpr", rpr(), rpr(response_a="The moon pulls.")).train
    assert len(rows) == 12
    assert len(public.prompts(rows, 100)) == 6


def test_the_stage_evaluate_is_refused_because_no_row_has_checks(many: str, tmp_path: Path) -> None:
    wanted = replace(config(many), run=RunConfig(stages=["data", "evaluate"]))
    with pytest.raises(UserError, match="because no program can check responses to this data; remove evaluate"):
        data.run(wanted, tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "good"), [("", False), ("/no/where", False), ("microsoft/rpr", True), (str(Path(__file__).parent), True)]
)
def test_preflight_accepts_a_hub_id_or_an_existing_path(path: str, good: bool) -> None:
    failing = [check.name for check in checks.check_sources(config(path)) if not check.ok]
    assert ("data.path" not in failing) is good


def test_the_data_stage_can_read_every_source() -> None:
    assert set(get_args(get_type_hints(DataConfig)["source"])) == set(data.SOURCES)
