"""Rows that the model of a run cannot read are found before the first training."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_prompt_toys import assistant, user
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.config.schema import Config, EvaluateConfig, ModelConfig, RolloutConfig, RunConfig
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import BadRows, UserError
from metaalign_rl.core.files import write_json, write_jsonl
from metaalign_rl.core.meta_prompt import SPECIAL_TOKENS, encode_answer, encode_row, install
from metaalign_rl.pipeline.fitting_rows import Ruler, require_fitting_rows

Tokenizers = dict[str, PreTrainedTokenizerFast]
ROW = Row(
    id="1", family="helpful", relation="user_only", tier="user", system_info="", user_info="be brief",
    messages=[user("hello")],
)  # fmt: skip
STAGES = ["data", "sft", "reward", "ppo", "evaluate"]


def verdict(check: object) -> str:
    try:
        check()  # type: ignore[operator]
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["own", "chatml", "llama2"])
@settings(max_examples=60, deadline=None)
@given(
    texts=st.tuples(*[st.text("ab é漢", max_size=30)] * 4),
    answer=st.none() | st.text("ab é漢", min_size=1, max_size=30),
    roles=st.lists(st.booleans(), max_size=3),
    room=st.integers(1, 200),
)
def test_a_row_is_refused_exactly_if_training_would_refuse_it(
    installed: Tokenizers, name: str, texts: tuple[str, ...], answer: str | None, roles: list[bool], room: int
) -> None:
    """The toys have one token per byte, the most that a tokenizer makes of a text."""
    system, of_user, first, last = texts
    dialog = [*(user(first) if is_user else assistant(first) for is_user in roles), user(last)]
    row = replace(ROW, system_info=system, user_info=of_user, messages=dialog)
    tokenizer = installed[name]

    def encode() -> object:
        if answer is None:
            return encode_row(tokenizer, row, max_tokens=room, place="row")
        return encode_answer(tokenizer, row, answer, max_tokens=room, place="row")

    expected = verdict(encode)
    found = verdict(lambda: Ruler(tokenizer).check(row, answer, room, "row"))
    assert bool(found) == bool(expected)


def run_folder(root: Path, tokenizer: PreTrainedTokenizerFast, **rows: list[Row]) -> RunFolder:
    """A run's folder with rows, and a checkpoint `base` with the tokenizer and a context of 300 tokens."""
    folder = RunFolder(root)
    tokenizer.save_pretrained(folder.base)
    write_json(folder.base / "config.json", {"max_position_embeddings": 300})
    for use, found in rows.items():
        write_jsonl(folder.rows(use), (row.to_json() for row in found))
    return folder


def config(max_tokens: int = 260, stages: list[str] = STAGES) -> Config:
    return Config(
        run=RunConfig(stages=stages),
        model=ModelConfig(max_tokens=max_tokens),
        rollout=RolloutConfig(max_new_tokens=120),
        evaluate=EvaluateConfig(max_new_tokens=20),
    )


def test_every_use_is_measured_with_its_own_room_and_all_bad_rows_are_named(
    installed: Tokenizers, tmp_path: Path
) -> None:
    long, longer = "a" * 100, "a" * 220
    folder = run_folder(
        tmp_path, installed["llama2"],
        demonstrations=[replace(ROW, response="a"), replace(ROW, id="twice", messages=[user("a")] * 2, response="a")],
        pairs=[replace(ROW, chosen="a" * 400, rejected="a", id="long answer"), replace(ROW, chosen="a", rejected="b")],
        prompts=[replace(ROW, user_info=long, id="long tier"), ROW],
        held_out_prompts=[replace(ROW, user_info=long), replace(ROW, user_info=longer, id="longer tier")],
    )  # fmt: skip
    with pytest.raises(UserError) as error:
        require_fitting_rows(config(), folder, folder.base)
    title, *bad = str(error.value).splitlines()
    assert title == "4 bad rows:"
    for use, row, text in (
        ("demonstrations", "twice", "roles must alternate"),
        ("pairs", "long answer", "leaves no room for the dialog"),
        ("prompts", "long tier", "max_tokens=140 leaves no room"),
        ("held_out_prompts", "longer tier", "max_tokens=240"),
    ):  # fmt: skip
        assert any(f"{use}.jsonl: row {row!r}: " in line and text in line for line in bad), (row, bad)
    require_fitting_rows(config(stages=["data"]), folder, folder.base)  # no stage reads them


def test_a_pair_whose_answers_have_the_same_tokens_is_refused(tmp_path: Path) -> None:
    words = {word: index for index, word in enumerate(("<unk>", *SPECIAL_TOKENS, "yes"))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    install(tokenizer)
    rows = [
        replace(ROW, chosen="paris", rejected="rome", id="unknown words"),
        replace(ROW, chosen="yes", rejected="rome"),
    ]
    folder = run_folder(tmp_path, tokenizer, held_out_pairs=rows)
    with pytest.raises(
        UserError, match=r"^.*held_out_pairs.jsonl: row 'unknown words': 'chosen' and 'rejected' are the"
    ):
        require_fitting_rows(config(), folder, folder.base)


def test_a_context_that_the_model_does_not_have_is_refused(installed: Tokenizers, tmp_path: Path) -> None:
    folder = run_folder(tmp_path, installed["chatml"])
    require_fitting_rows(config(300), folder, folder.base)
    with pytest.raises(
        UserError, match=r"model.max_tokens: expected at most 300, the context that .*config.json states, "
    ):
        require_fitting_rows(config(301), folder, folder.base)
    write_json(folder.base / "config.json", {"text_config": {"max_position_embeddings": 100}})
    with pytest.raises(UserError, match="expected at most 100"):
        require_fitting_rows(config(), folder, folder.base)


def test_short_rows_need_no_tokenizer(installed: Tokenizers, monkeypatch: pytest.MonkeyPatch) -> None:
    from metaalign_rl.pipeline import fitting_rows

    encoded = []
    monkeypatch.setattr(fitting_rows, "encode", lambda *_, **__: encoded.append(1) or [0] * 20)
    ruler, bad = Ruler(installed["chatml"]), BadRows()
    ruler.check_all([replace(ROW, id=str(number)) for number in range(1000)], "prompts", 100, Path("prompts"), bad)
    bad.require_none()
    assert len(encoded) <= 2, "a pattern of dialogs is rendered once"
