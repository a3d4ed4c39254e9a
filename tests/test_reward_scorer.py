"""Scoring with a saved model gives the same numbers in any order, batch, folder and library."""

import json
import shutil
import subprocess
import sys

import pytest
from reward_toys import color_pairs, encoder, language_model, make_row, make_tokenizer, reward_model

from metaalign_rl.core.batching import batches_by_length
from metaalign_rl.core.chat_template import META_PROMPT_VERSION
from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import MetaPrompt
from reward import Scorer, export_scalar

ROWS = [
    {
        "messages": [{"role": "user", "content": "what color " * length}],
        "response": "red " * (1 + length % 3),
        **tiers,
    }
    for length, tiers in enumerate(
        [
            {},
            {"system_info": "say red"},
            {"user_info": "say blue"},
            {"system_info": "say red", "user_info": "now"},
        ]
        * 3,
        start=1,
    )
]


@pytest.fixture(scope="module")
def scorer():
    return Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32")


@pytest.fixture
def copied_model(tmp_path):
    return shutil.copytree(reward_model(), tmp_path / "model")


def logits(scores):
    return [list(score.logits.values()) for score in scores]


def test_a_row_scores_the_same_alone_in_a_batch_and_in_reverse_order(scorer):
    together = logits(scorer.score(ROWS))
    alone = [logits(scorer.score([row]))[0] for row in ROWS]
    backwards = logits(scorer.score(ROWS[::-1], batch_tokens=100))[::-1]
    for one, two, three in zip(together, alone, backwards, strict=True):
        assert one == pytest.approx(two, abs=1e-5)
        assert one == pytest.approx(three, abs=1e-5)


def test_every_part_of_a_row_changes_its_score(scorer):
    row = make_row(system_info="say red", user_info="say blue", response="red")
    plain = scorer.score([row])[0].overall
    for change in ({"system_info": "say blue"}, {"user_info": "say red"}, {"response": "blue"}):
        changed = make_row(**{"system_info": "say red", "user_info": "say blue", "response": "red"} | change)
        assert abs(scorer.score([changed])[0].overall - plain) > 1e-3


def test_no_rows_give_no_scores(scorer):
    assert scorer.score([]) == []


def test_batches_hold_every_text_once_within_the_token_limit():
    lengths = [5, 90, 7, 40, 200, 41, 6]
    batches = list(batches_by_length(lengths, 100))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(b) * max(lengths[i] for i in b) <= 100 or len(b) == 1 for b in batches)


def test_a_long_dialog_loses_its_start_and_no_tier(scorer):
    long = make_row(
        system_info="say red",
        messages=[{"role": "user", "content": "stone " * 500 + "now"}],
        response="red please",
    )
    tokens = scorer.tokenizer.convert_ids_to_tokens(scorer.encode(long, "row"))
    assert len(tokens) <= scorer.max_tokens
    assert tokens[:3] == ["<System Info>", "▁say", "▁red"]
    assert tokens[-5:] == ["▁now", "<Assistant>", "▁red", "▁please", "<eos>"]


def test_an_error_names_a_row_whose_tiers_do_not_fit(scorer):
    with pytest.raises(UserError, match=r"rows\[1\].*max_tokens=128"):
        scorer.score([ROWS[0], {**ROWS[0], "system_info": "stone " * 200}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": None}, r"rows\[1\]: field 'response': expected a string, found nothing"),
        ({"messages": []}, r"rows\[1\]: field 'messages'"),
        ({"user_info": 3}, r"rows\[1\]: field 'user_info': expected a string, found 3"),
        ({"userinfo": "loud"}, r"rows\[1\]: unknown field 'userinfo'; did you mean 'user_info'"),
    ],
)
def test_an_error_names_the_index_and_field_of_a_malformed_row(scorer, change, message):
    with pytest.raises(UserError, match=message):
        scorer.score([ROWS[0], {**ROWS[0], **change}])


def test_saving_and_loading_keeps_the_scores(scorer, tmp_path):
    scorer.model.save_pretrained(tmp_path)
    scorer.tokenizer.save_pretrained(tmp_path)
    loaded = Scorer.from_pretrained(tmp_path, device="cpu", dtype="float32")
    assert logits(loaded.score(ROWS)) == logits(scorer.score(ROWS))


def test_the_plain_checkpoint_scores_the_same_in_a_transformers_pipeline(scorer):
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(reward_model()), device="cpu")
    for row, score in zip(ROWS, scorer.score(ROWS), strict=True):
        meta = MetaPrompt(row.get("system_info", ""), row.get("user_info", ""))
        text = meta.render(classify.tokenizer, row["messages"], row["response"])
        raw = classify(text, top_k=None, function_to_apply="none")
        assert {r["label"]: r["score"] for r in raw} == pytest.approx(score.logits, abs=1e-5)
        by_default = classify(text, top_k=None)
        assert {r["label"]: r["score"] for r in by_default} == pytest.approx(score.probabilities, abs=1e-5)


def test_the_config_has_the_labels_and_prevents_a_softmax_across_them():
    config = json.loads((reward_model() / "config.json").read_text())
    assert list(config["id2label"].values()) == list(LABELS)
    assert config["problem_type"] == "multi_label_classification"
    assert config["metaalign"]["meta_prompt_version"] == META_PROMPT_VERSION
    assert config["metaalign"]["temperature"] == dict.fromkeys(LABELS, 1.0)


def test_folded_temperatures_divide_the_logits_of_the_plain_checkpoint(scorer, copied_model):
    from reward.model import fold_temperatures

    calibrated = Scorer.from_pretrained(copied_model, device="cpu", dtype="float32")
    fold_temperatures(calibrated.model, {"system": 2.0, "user": 0.5, "dialog": 1.0, "overall": 4.0})
    plain, folded = scorer.score(ROWS[:1])[0].logits, calibrated.score(ROWS[:1])[0].logits
    expected = {"system": 0.5, "user": 2.0, "dialog": 1.0, "overall": 0.25}
    assert folded == pytest.approx({label: plain[label] * factor for label, factor in expected.items()}, rel=1e-4)
    assert calibrated.model.config.metaalign["temperature"]["overall"] == 4.0


@pytest.mark.parametrize("pad", [None, "<eos>"])
def test_a_base_without_its_own_padding_token_gets_one(tmp_path, pad):
    from reward.model import build

    base = shutil.copytree(language_model(), tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(base)
    model, tokenizer = build(base)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    scorer = Scorer(model.eval(), tokenizer)
    together, alone = scorer.score(ROWS), [scorer.score([row])[0] for row in ROWS]
    assert logits(together)[0] == pytest.approx(logits(alone)[0], abs=1e-5)


def test_an_encoder_can_be_the_backbone_and_has_no_dropout():
    from reward.model import build, fold_temperatures

    model, tokenizer = build(encoder("Bert"))
    scorer = Scorer(model.train(), tokenizer)
    before = scorer.score(ROWS)
    assert logits(scorer.score(ROWS)) == logits(before)
    fold_temperatures(model, dict.fromkeys(LABELS, 2.0))
    assert scorer.score(ROWS)[0].overall == pytest.approx(before[0].overall / 2, rel=1e-4)


def test_export_scalar_keeps_only_the_label_overall(scorer, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    export_scalar(reward_model(), tmp_path / "scalar")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "scalar", num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "scalar")
    text = MetaPrompt().render(tokenizer, ROWS[0]["messages"], ROWS[0]["response"])
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    assert model(**inputs).logits.shape == (1, 1)
    assert model(**inputs).logits.item() == pytest.approx(scorer.score(ROWS[:1])[0].overall, abs=1e-5)
    with pytest.raises(UserError, match="exists already"):
        export_scalar(reward_model(), tmp_path / "scalar")


def test_a_missing_folder_is_an_error_and_not_a_hub_id(tmp_path):
    for path in (tmp_path / "nothing", "./nothing", "nothing", "tests/nothing", "a/b/c"):
        with pytest.raises(UserError, match=f"{path}: no such folder"):
            Scorer.from_pretrained(path)


def test_a_hub_id_is_fetched_without_pickles_or_code(monkeypatch):
    calls = []

    def fetch(name, allow_patterns):
        calls.append((name, allow_patterns))
        return str(reward_model())

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    Scorer.from_pretrained("some-lab/some-reward-model", device="cpu")
    name, patterns = calls[0]
    assert name == "some-lab/some-reward-model"
    assert not any(pattern.endswith((".bin", ".pt", ".py", ".pkl")) for pattern in patterns)


def test_an_error_names_a_hub_id_that_cannot_be_fetched(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(name, allow_patterns):
        raise LocalEntryNotFoundError("the hub cannot be reached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(UserError, match=r"some-lab/nothing: expected a folder or .*\(the hub cannot be reached\)"):
        Scorer.from_pretrained("some-lab/nothing")


def test_weights_that_are_not_safetensors_are_refused(copied_model):
    (copied_model / "model.safetensors").rename(copied_model / "pytorch_model.bin")
    with pytest.raises(UserError, match="expected model.safetensors or model.safetensors.index.json, found neither"):
        Scorer.from_pretrained(copied_model)


def test_an_error_names_the_folder_of_broken_weights(copied_model):
    (copied_model / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match=f"{copied_model}/model.safetensors: no safetensors file"):
        Scorer.from_pretrained(copied_model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_checkpoint_with_its_own_code_is_refused(copied_model, name):
    config = json.loads((copied_model / name).read_text())
    own = {"auto_map": {"AutoModel": "evil.Model"}, "model_type": "evil", "tokenizer_class": "EvilTokenizer"}
    (copied_model / name).write_text(json.dumps(config | own))
    with pytest.raises(UserError, match="auto_map"):
        Scorer.from_pretrained(copied_model)


def test_a_model_for_another_version_of_the_meta_prompt_is_refused(copied_model):
    config = json.loads((copied_model / "config.json").read_text())
    config["metaalign"]["meta_prompt_version"] = 99
    (copied_model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="found version 99"):
        Scorer.from_pretrained(copied_model)


def test_a_language_model_is_refused():
    with pytest.raises(UserError, match="not a reward model.*metaalign-reward train"):
        Scorer.from_pretrained(language_model())


def test_scores_that_are_not_finite_are_an_error(copied_model):
    import torch

    from reward.model import head

    broken = Scorer.from_pretrained(copied_model, device="cpu", dtype="float32")
    torch.nn.init.constant_(head(broken.model).weight, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        broken.score(ROWS)


def test_scoring_imports_none_of_the_training_system():
    code = f"""
import sys
from reward import Scorer
Scorer.from_pretrained({str(reward_model())!r}).score({ROWS[:1]!r})
heavy = {{"ray", "vllm", "deepspeed", "openrlhf"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_row_of_a_data_set_is_scored_by_its_response(scorer):
    from dataclasses import replace

    row = color_pairs(2)[0]
    assert scorer.score([replace(row, response=row.chosen)])[0].tiers.keys() == {"system", "user", "dialog"}
