"""Settings: how YAML files and key=value words are read, the errors for wrong ones, and the documentation."""

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from conftest import ROOT
from hypothesis import example, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from metaalign_rl.config import loader
from metaalign_rl.config.keys import keys_of
from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.reward import RewardConfig
from metaalign_rl.config.schema import Config
from metaalign_rl.config.settings_table import describe, groups
from metaalign_rl.config.yaml_values import type_name
from metaalign_rl.core import renamed_settings
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.settings import Documentation, setting
from reward.training.config import CommonTraining, RewardTraining


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    """A section. This sentence is not shown."""

    rate: float = setting(0.1, "The rate.", unit="per step")
    switch: bool = False
    mode: Literal["on", "off", "auto"] = setting("auto", "When to do it.", level="core")
    stage: Literal[0, 1, 2] = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    """One field of every type that settings know."""

    name: str = ""
    count: int = 3
    limit: int | None = None
    note: str | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    words: tuple[str, ...] = ()
    stages: list[str] = setting(["a", "b"], "What to do.")
    weights: dict[str, float] = setting({}, "How much.")
    inner: Inner = field(default_factory=lambda: Inner(rate=0.5))


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedsName:
    """A required key."""

    name: str


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def described(cls: type) -> dict[str, list[str]]:
    """The cells of each line of `describe`, by key."""
    lines = [line for line in describe(cls).splitlines() if line and not line.startswith("#")]
    cells = [re.split(" {2,}", line) for line in lines]
    assert len({row[0] for row in cells}) == len(cells)
    return {row[0]: row[1:] for row in cells}


def values(annotation: Any) -> st.SearchStrategy[Any]:
    """Any value of a field's type."""
    simple = {
        str: TEXT,
        int: st.integers(),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        NoneType: st.none(),
    }
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_dataclass(annotation):
        hints = get_type_hints(annotation)
        return st.builds(annotation, **{f.name: values(hints[f.name]) for f in fields(annotation)})
    if origin is UnionType:
        return st.one_of(*map(values, arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is dict:
        return st.dictionaries(TEXT, values(arguments[1]), max_size=3)
    if origin is list or arguments[-1:] == (...,):
        return st.lists(values(arguments[0]), max_size=3).map(origin)
    if origin is tuple:
        return st.tuples(*map(values, arguments))
    return simple[annotation]


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(cls: type, path: Path | None, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        loader.load(cls, path, list(words))
    return str(caught.value)


@budget(deadline=None)  # a busy machine is not a failure
@given(config=values(Outer))
@example(
    config=Outer(count=1, stages=["\x85", "a\u2028b", "\u2029"])
)  # characters that only YAML treats as line breaks
def test_load_reads_back_what_dump_prints(config: Outer, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp(), loader.dump(config))
    assert loader.load(Outer, path, []) == config


def test_a_run_config_survives_dump_and_load(tmp_path: Path) -> None:
    config = replace(
        Config(), run=replace(Config().run, name="no", stages=["ppo"]), learner=LearnerConfig(world_size=3)
    )
    assert loader.load(Config, write(tmp_path, loader.dump(config)), []) == config
    assert loader.load(Config, None, []) == Config()


@budget(deadline=None)
@given(name=st.from_regex(r"[a-z_]{1,12}(\.[a-z_]{1,12}){0,2}", fullmatch=True), value=TEXT)
def test_an_error_names_an_unknown_key_and_gives_a_hint(name: str, value: str) -> None:
    if name not in keys_of(Config) and name not in renamed_settings.KEYS:
        said = message(Config, None, f"{name}={value}")
        assert f"unknown key {name!r}; " in said
        assert "did you mean" in said or "known: " in said


def test_words_override_the_file_and_the_file_overrides_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "count: 5\nlimit: 7\ninner:\n  switch: true\n")
    config = loader.load(Outer, path, ["limit=8", "inner.mode=off"])
    assert config == Outer(count=5, limit=8, inner=Inner(rate=0.5, switch=True, mode="off"))


def test_a_section_keeps_the_defaults_of_the_class_that_contains_it() -> None:
    assert loader.load(Outer, None, ["inner.stage=1"]).inner == Inner(rate=0.5, stage=1)


def test_a_section_may_be_empty_or_dotted_or_one_word(tmp_path: Path) -> None:
    assert loader.load(Outer, write(tmp_path, "inner:\n"), []) == Outer()
    assert loader.load(Outer, write(tmp_path, "inner.rate: 2\n"), []).inner.rate == 2.0
    assert loader.load(Outer, None, ["inner={rate: 2, stage: 0}"]).inner == Inner(rate=2.0, stage=0)
    assert loader.load(Outer, write(tmp_path, ""), []) == Outer()


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("inner.rate=1e-3", "rate", 0.001),
        ("inner.rate=3", "rate", 3.0),
        ("inner.rate=.inf", "rate", math.inf),
        ("inner.mode=on", "mode", "on"),
        ("inner.mode=off", "mode", "off"),
        ("inner.switch=true", "switch", True),
        ("inner.stage=1", "stage", 1),
        ("name=no", "name", "no"),
        ("name=007", "name", "007"),
        ("name=1e-3", "name", "1e-3"),
        ("name=", "name", ""),
        ("name='no'", "name", "no"),
        ("name=a: [b # c", "name", "a: [b # c"),
        ("name=x=y", "name", "x=y"),
        ("count=30_000", "count", 30_000),
        ("limit=null", "limit", None),
        ("note=null", "note", None),
        ("note='null'", "note", "null"),
        ("note=12:30", "note", "12:30"),
        ("betas=[0, 1]", "betas", (0.0, 1.0)),
        ("words=[yes, 1]", "words", ("yes", "1")),
        ("stages=[]", "stages", []),
        ("weights={user: 2, dialog/neutral: .5}", "weights", {"user": 2.0, "dialog/neutral": 0.5}),
    ],
)
def test_the_fields_type_decides_how_a_value_is_read(word: str, key: str, value: object) -> None:
    config = loader.load(Outer, None, [word])
    found = getattr(config.inner if word.startswith("inner.") else config, key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("count=ten", "'count=ten': key 'count': expected a whole number (int), found 'ten'"),
        ("count=1.5", "expected a whole number (int), found '1.5'"),
        ("count='3'", "expected a whole number (int), found the text '3'"),
        ("count=", "expected a whole number (int), found nothing"),
        ("inner.rate=fast", "key 'inner.rate': expected a number (float), found 'fast'"),
        ("inner.switch=yes", "expected true or false (bool), found 'yes'"),
        ("inner.mode=often", "expected one of on, off, auto, found 'often'"),
        ("inner.stage=3", "expected one of 0, 1, 2, found '3'"),
        ("limit=None", "expected a whole number (int) or null, found 'None'"),
        (
            "betas=[1]",
            "expected a list [a number (float), a number (float)] (tuple[float, float]), found a list of 1",
        ),
        ("betas=[1, a]", "key 'betas[1]': expected a number (float), found 'a'"),
        ("stages=ppo", "expected a list [text (str)] (list[str]), found 'ppo'"),
        ("weights={user: a}", "key 'weights.user': expected a number (float), found 'a'"),
        ("weights=[1]", "expected a table {key: a number (float), …} (dict[str, float]), found a list of 1"),
        ("inner=3", "key 'inner': expected a section of keys, found '3'"),
        ("name=null", "key 'name': expected text (str), found nothing"),
        ("weights={a", "the value is not valid YAML"),
        ("count", "'count': expected key=value, such as run.name=mine"),
    ],
)
def test_an_error_names_the_key_of_an_ill_typed_value_and_the_expected_type(word: str, says: str) -> None:
    assert says in message(Outer, None, word)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("count: 1\nlimt: 2\n", ":2: unknown key 'limt'; did you mean 'limit'?"),
        ("inner:\n  rat: 2\n", ":2: unknown key 'inner.rat'; did you mean 'inner.rate'?"),
        ("count: 1\n\ninner:\n  rate: x\n", ":4: key 'inner.rate': expected a number (float), found 'x'"),
        ("count: 1\ncount: 2\n", ":2: key 'count' is already set at "),
        ("inner: 3\n", ":1: key 'inner': expected a section of keys, found '3'"),
        ("count: [1\nname: x\n", ":2: not valid YAML"),
        ("count: 1\n\tname: x\n", ":2: not valid YAML"),
        ("a: 1\n---\nb: 2\n", ":2: not valid YAML"),
        ("- a\n", ":1: expected keys with values, found a list of 1"),
        ("? [a]\n: 1\n", ":1: expected a key, found a list of 1"),
        ("name: !!python/object:os.system x\nzzz: 1", ":2: unknown key 'zzz'"),
    ],
)
def test_an_error_names_the_file_and_line(text: str, says: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    said = message(Outer, path)
    assert said.startswith(f"{path}{says}")
    assert "\n" not in said


def test_an_error_names_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "missing.yaml: No such file" in message(Outer, tmp_path / "missing.yaml")
    assert str(tmp_path) in message(Outer, tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9\n")
    assert "latin.yaml: not valid UTF-8" in message(Outer, tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ppo.lr", "learner.learning_rate"),
        ("sft.lr", "'sft.learning_rate'?"),
        ("leaner.epochs", "'learner.epochs'?"),
        ("prompts_per_step", "'ppo.prompts_per_step'?"),
        ("ppo.step", "'ppo.steps'?"),
        ("modle", "'model'?"),
    ],
)
def test_the_nearest_key_is_searched_in_all_sections(name: str, meant: str) -> None:
    assert meant in message(Config, None, f"{name}=1")


def test_an_error_names_a_missing_required_key() -> None:
    assert "key 'name' is missing" in message(NeedsName, None)
    assert loader.load(NeedsName, None, ["name=x"]) == NeedsName(name="x")
    assert "(required)" in describe(NeedsName)


# Documentation.


def test_describe_lists_every_value_with_its_unit_and_meaning() -> None:
    found = described(Outer)
    assert found["inner.rate"] == ["float", "0.5", "per step", "The rate."]
    assert found["inner.mode"] == ["on | off | auto", "auto", "When to do it."]
    assert found["stages"] == ["list[str]", "[a, b]", "What to do."]
    assert "inner" not in found


def test_the_core_settings_come_first_and_the_others_by_section() -> None:
    lines = [line.split("  ")[0] for line in describe(Outer).splitlines() if line]
    assert lines[:2] == ["# The core settings, which most runs set.", "inner.mode"]
    assert lines[-4:] == [
        "# inner: A section. This sentence is not shown.",
        "inner.rate",
        "inner.switch",
        "inner.stage",
    ]


def test_a_list_or_table_is_not_shared_between_two_objects() -> None:
    one, other = Outer(), Outer()
    one.stages.append("c")
    one.weights["user"] = 1.0
    assert other == Outer() == loader.load(Outer, None, [])


def test_an_inherited_field_keeps_its_documentation_under_another_default() -> None:
    ours, theirs = keys_of(RewardConfig), keys_of(RewardTraining)
    assert {name for name in ours if name in theirs and ours[name].default != theirs[name].default} == {
        "learning_rate", "batch_size", "token_weight", "easy_first_fraction",
    }  # fmt: skip
    common = keys_of(CommonTraining)
    assert len(common) == 11
    assert all(ours[name].documentation == theirs[name].documentation != Documentation("") for name in common)


def test_every_key_of_a_run_is_described_once() -> None:
    found = described(Config)
    assert set(found) == {name for name, key in keys_of(Config).items() if not key.is_section}
    assert {"run.name", "ppo.steps", "learner.learning_rate"} <= set(found)


@pytest.mark.parametrize("cls", [Config, RewardTraining])
def test_every_setting_has_a_meaning_in_sentences_and_a_unit_if_it_is_a_number(cls: type) -> None:
    for name, key in keys_of(cls).items():
        if not key.is_section:
            found = key.documentation
            assert found.meaning.endswith("."), name
            assert found.unit or not {"int", "float"} & set(re.findall(r"\w+", type_name(key.annotation))), name


def test_the_page_holds_every_word_of_every_settings_description() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows: dict[str, list[list[str]]] = {}
    for line in page.splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 5:
            rows.setdefault(cells[0].strip("`"), []).append(cells)
    for cls in (Config, RewardTraining):
        for name, key in keys_of(cls).items():
            if not key.is_section:
                ((_, _, _, unit, meaning),) = rows[name]
                assert (unit, meaning) == (key.documentation.unit, key.documentation.meaning), name
    for group in groups(Config):
        assert not group.section or group.meaning in page, group.section


def test_the_core_settings_are_few_and_come_first_on_the_page() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    core, *others = groups(Config)
    assert core.section == "" and 20 <= len(core.keys) <= 40
    places = [page.index(f"| `{name}` |") for group in (core, *others) for name in group.keys]
    assert places == sorted(places)


def test_a_batch_that_ranks_and_passes_cannot_share_equally_is_refused() -> None:
    """Else 3 ranks would train 30 rows of 32."""
    three = ["learner.world_size=3"]
    with pytest.raises(UserError, match=r"sft.batch_size: expected a multiple of .* = 3, found 32"):
        loader.load(Config, None, three)
    assert loader.load(Config, None, [*three, "sft.batch_size=33"]).sft.batch_size == 33
    loader.load(Config, None, [*three, "run.stages=[ppo]"])  # no SFT
    for words in (["sft.gradient_accumulation=5"], ["reward.gradient_accumulation=5"], ["reward.devices=5"]):
        with pytest.raises(UserError, match="batch_size: expected a multiple of"):
            loader.load(Config, None, words)
