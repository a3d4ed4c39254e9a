"""Training the reward model on a toy rule: the color that the system asks for counts before the user's."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reward_toys import color_pairs, language_model, make_row, make_tokenizer, reward_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.rows import parse_row
from reward import MODES, RewardTraining, Scorer, evaluate, evaluate_modes, preference_blind, tier_blind, train
from reward.model import head, load
from reward.training.examples import collate, collate_shared, labels_with_data, make_example, ranked_labels
from reward.training.temperatures import connected, hold_out

QUICK = RewardTraining(learning_rate=3e-3, batch_size=32, epochs=6, max_tokens=128, calibration_share=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model trained on the rule, and the result of its training."""
    folder = tmp_path_factory.mktemp("trained") / "reward"
    config = replace(QUICK, learning_rate=2e-3, batch_size=16, epochs=8)
    result = train(config, color_pairs(1000), color_pairs(40, seed=1), language_model(), folder)
    return folder, result


def test_the_model_learns_which_tier_governs(trained):
    scorer = Scorer.from_pretrained(trained[0], device="cpu", dtype="float32")
    for mode in MODES:
        report = evaluate(scorer, color_pairs(200, seed=2), mode)
        assert report["accuracy"] > 0.95, mode
        assert report["conflict"]["accuracy"] > 0.95, mode
        assert report["flip"]["accuracy"] > 0.9, mode


def test_absolute_labels_calibrate_the_scores(trained):
    report = evaluate(Scorer.from_pretrained(trained[0], device="cpu", dtype="float32"), color_pairs(200, seed=2))
    assert report["calibration"]["overall"]["agreement"] > 0.9
    assert report["calibration"]["overall"]["ece"] < 0.1


def test_the_folder_records_its_training(trained):
    folder, result = trained
    written = json.loads((folder / "training.json").read_text())
    assert written["config"]["learning_rate"] == 2e-3
    assert written["steps"] == result["steps"] > 0
    assert written["temperature"] == result["temperature"]
    assert json.loads((folder / "config.json").read_text())["metaalign"]["temperature"] == result["temperature"]
    steps = [entry for entry in result["log"] if "bt" in entry]
    assert steps[0]["accuracy"] < steps[-1]["accuracy"]
    assert any("eval_loss" in entry for entry in result["log"])
    assert not folder.with_name("reward.checkpoints").exists()


def test_a_label_that_is_always_true_keeps_the_temperature_1_and_is_not_called_calibrated(trained):
    assert trained[1]["temperature"]["dialog"] == 1.0
    calibrated = trained[1]["calibrated_labels"]
    assert "overall" in calibrated
    assert [label for label in LABELS if trained[1]["temperature"][label] != 1.0] == calibrated


def test_the_config_says_how_long_texts_were_and_which_labels_had_data(trained):
    recorded = json.loads((trained[0] / "config.json").read_text())["metaalign"]
    assert recorded["max_tokens"] == 128
    assert recorded["trained_labels"] == list(LABELS)
    assert recorded["calibrated_labels"] == trained[1]["calibrated_labels"]


@pytest.fixture(scope="module")
def of_pairs(tmp_path_factory):
    """A model trained on pairs alone, with texts of at most 96 tokens. No row is about the dialog."""
    folder = tmp_path_factory.mktemp("pairs") / "reward"
    rows = [replace(row, labels={}) for row in color_pairs(40)]
    train(replace(QUICK, epochs=1, max_tokens=96), rows, None, language_model(), folder)
    return folder


def test_after_pairs_alone_modes_that_read_an_untrained_label_are_refused(of_pairs):
    recorded = json.loads((of_pairs / "config.json").read_text())["metaalign"]
    assert recorded["trained_labels"] == ["system", "user", "overall"]
    assert recorded["calibrated_labels"] == []
    scorer, rows = Scorer.from_pretrained(of_pairs, device="cpu"), color_pairs(20)
    assert scorer.untrained == {"dialog"}
    for mode in ("tier", "composed"):
        with pytest.raises(UserError, match=f"mode '{mode}': it reads dialog, but the reward model's training data"):
            evaluate(scorer, rows, mode)
    assert evaluate(scorer, rows)["mode"] == "overall"  # the default is a mode that the model supports
    assert set(evaluate_modes(scorer, rows, MODES, skip_untrained=True)) == {"overall"}


def test_a_scorer_reads_as_much_as_the_training_did_and_says_what_it_left_out(of_pairs):
    scorer = Scorer.from_pretrained(of_pairs, device="cpu")
    assert scorer.max_tokens == 96
    assert Scorer.from_pretrained(of_pairs, device="cpu", max_tokens=128).max_tokens == 128
    dialog = [{"role": "user", "content": "what color is it now " * words} for words in (1, 40)]
    short, long = (make_row(messages=[message], response="red") for message in dialog)
    assert [score.truncated for score in scorer.score([short, long])] == [False, True]
    assert len(scorer.encode(long, "row")) <= 96


def test_only_labels_with_a_loss_count_as_trained():
    examples = [make_example(row, make_tokenizer(), 128) for row in color_pairs(8)]
    assert labels_with_data(examples, QUICK) == LABELS
    assert labels_with_data(examples, replace(QUICK, bce_weight=0.0)) == ("system", "user", "overall")
    assert labels_with_data(examples, replace(QUICK, labels="overall")) == ("overall",)
    system = [
        make_example(make_row(tier="system", system_info="a", chosen="red", rejected="blue"), make_tokenizer(), 99)
    ]
    assert labels_with_data(system, QUICK) == ("system", "overall")


# Held-out rows


def prompt(row):
    return (row.system_info, row.user_info, json.dumps(row.messages))


def test_no_held_out_row_has_a_prompt_that_is_trained_on():
    rows = color_pairs(400)
    on_policy = [replace(row, id=f"{row.id}-{n}", tags={}) for row in rows for n in range(2)]
    unlabelled = [replace(row, id=f"{row.id}-pair", tags={}, labels={}) for row in rows]
    questions = [f"what color is {number}" for number in range(300)]
    rows = [
        replace(row, messages=[{"role": "user", "content": questions[index % 300]}])
        for index, row in enumerate([*rows, *on_policy, *unlabelled])
    ]
    kept, held_out = hold_out(rows, QUICK)
    assert held_out
    assert not {prompt(row) for row in kept} & {prompt(row) for row in held_out}
    flips = [{row.tags["flip"] for row in part if "flip" in row.tags} for part in (kept, held_out)]
    assert not flips[0] & flips[1]
    assert all(row.labels for row in held_out)
    assert [row for row in rows if row in kept] == kept  # in the same order


def test_the_held_out_share_is_near_the_setting_and_depends_on_the_seed_alone():
    rows = [make_row(id=str(n), system_info=str(n), chosen="a", rejected="b", labels={"chosen": {"overall": True}})
            for n in range(2000)]  # fmt: skip
    held_out = hold_out(rows, QUICK)[1]
    assert 0.07 < len(held_out) / len(rows) < 0.13
    assert {row.id for row in hold_out(rows[::-1], QUICK)[1]} == {row.id for row in held_out}
    assert {row.id for row in hold_out(rows, replace(QUICK, seed=1))[1]} != {row.id for row in held_out}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from("vwxyz")), max_size=12))
def test_items_that_share_a_key_directly_or_not_are_one_group(keys):
    groups = connected(keys)
    assert sorted(index for group in groups for index in group) == list(range(len(keys)))
    for kind in range(2):
        owners = {}
        for number, group in enumerate(groups):
            for index in group:
                assert owners.setdefault(keys[index][kind], number) == number
    for group in groups:  # each member but the first shares a key with another
        assert len(group) == 1 or all(
            any(set(enumerate(keys[a])) & set(enumerate(keys[b])) for b in group if b != a) for a in group
        )


@pytest.mark.parametrize("view", [preference_blind, tier_blind])
def test_a_blind_control_cannot_learn_conflicts(tmp_path, view):
    def conflicts(seed):
        return [row for row in color_pairs(600, seed) if row.relation == "conflict"]

    train(replace(QUICK, epochs=2), view(conflicts(0)), None, language_model(), tmp_path / "control")
    scorer = Scorer.from_pretrained(tmp_path / "control", device="cpu")
    report = evaluate(scorer, view(conflicts(2)), "overall")
    assert report["accuracy"] == pytest.approx(0.5, abs=0.01)
    assert report["tier_flip"]["accuracy"] == 0


class StopAt(TrainerCallback):
    """Ends a training after a step without finishing it, like a kill."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "lora"])
def test_a_resumed_training_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, rank):
    config = replace(QUICK, epochs=2, checkpoint_steps=4, lora_rank=rank)
    rows = color_pairs(200)
    train(config, rows, None, language_model(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, rows, None, language_model(), tmp_path / "cut", callbacks=[StopAt(10)])
    assert not (tmp_path / "cut").exists()

    steps = []
    watch = type("Watch", (TrainerCallback,), {"on_step_end": lambda self, a, s, c, **k: steps.append(s.global_step)})
    train(config, rows, None, language_model(), tmp_path / "cut", callbacks=[watch()])
    assert steps[0] == 9
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    torch.testing.assert_close(cut, whole, atol=1e-6, rtol=0)


def test_a_training_with_other_settings_does_not_resume(tmp_path):
    config = replace(QUICK, epochs=1, checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, color_pairs(200), None, language_model(), tmp_path / "cut", callbacks=[StopAt(3)])
    with pytest.raises(
        UserError, match=r"cut.checkpoints: expected this training's checkpoints, .* config and rows differ"
    ):
        train(replace(config, seed=1), color_pairs(100), None, language_model(), tmp_path / "cut")


def test_a_folder_that_is_not_empty_is_not_overwritten(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        train(QUICK, color_pairs(20), None, language_model(), tmp_path)


@pytest.mark.parametrize("token_weight", [0.0, 1.0])
def test_gradient_accumulation_changes_nothing_but_rounding(tmp_path, token_weight):
    """Even if the passes have different numbers of known labels."""
    rows = [replace(row, labels=row.labels if index % 3 else {}) for index, row in enumerate(color_pairs(70))]
    config = replace(QUICK, epochs=1, calibration_share=0.0, token_weight=token_weight, log_steps=1)
    one = train(config, rows, None, language_model(), tmp_path / "one")
    four = train(replace(config, gradient_accumulation=4), rows, None, language_model(), tmp_path / "four")
    for name in ("loss", "bt", "bce", "accuracy", "grad_norm"):
        values = ([entry[name] for entry in result["log"] if name in entry] for result in (one, four))
        assert next(values) == pytest.approx(next(values), rel=1e-3), name
    weights = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    torch.testing.assert_close(next(weights), next(weights), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate: expected a number above 0, found 0.0"),
        ({"warmup_ratio": -1.0}, "warmup_ratio: expected 0 or more"),
        ({"label_smoothing": 0.5}, "label_smoothing: expected a share below 0.5"),
        ({"lora_rank": -1}, "lora_rank: expected 0 or more"),
        ({"calibration_share": 1.0}, "calibration_share: expected a share below 1"),
        ({"schedule": "steps"}, "schedule: expected one of cosine, linear"),
        ({"gradient_accumulation": 5}, "batch_size: expected a multiple of gradient_accumulation=5"),
        ({"bt_weight": 0.0, "bce_weight": 0.0}, "both are 0"),
    ],
)
def test_an_error_names_the_wrong_setting(change, message):
    with pytest.raises(UserError, match=message):
        RewardTraining(**change)


# The labels that a row trains


def names(flags):
    return {label for label, flag in zip(LABELS, flags, strict=True) if flag}


def test_a_pair_trains_overall_and_its_governing_tier():
    assert names(ranked_labels(make_row(tier="user", chosen="a", rejected="b"))) == {"user", "overall"}
    assert names(ranked_labels(make_row(tier="dialog", chosen="a", rejected="b"))) == {"dialog", "overall"}


def test_a_pair_does_not_train_a_label_in_which_its_answers_are_equal():
    labels = {"chosen": {"user": True, "overall": True}, "rejected": {"user": True, "overall": False}}
    row = make_row(tier="user", chosen="a", rejected="b", labels=labels)
    assert names(ranked_labels(row)) == {"overall"}


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan"), True, "strong"])
def test_a_pairs_strength_is_a_number_from_0_to_1(strength):
    row = make_row(chosen="red", rejected="blue").to_json()
    assert parse_row({**row, "strength": 0.25}, "row").strength == 0.25
    with pytest.raises(UserError, match="row: field 'strength': expected a number from 0 to 1"):
        parse_row({**row, "strength": strength}, "row")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_row(), "row 'row': expected 'chosen' and 'rejected', or a 'response' with 'labels'"),
        (
            make_row(response="red"),
            "row 'row': expected 'chosen' and 'rejected', or a 'response' with 'labels'",
        ),
        (make_row(chosen="red", rejected="red"), "row 'row': .*the same tokens"),
        (
            make_row(chosen="red", rejected="blue", labels={"response": {"user": True}}),
            "labels.response.*no 'response'",
        ),
    ],
)
def test_a_row_without_a_usable_pair_or_label_is_an_error(row, message):
    with pytest.raises(UserError, match=message):
        make_example(row, make_tokenizer(), 128)


def test_the_token_loss_starts_where_the_answers_differ():
    row = make_row(chosen="red blue", rejected="red green", labels={"chosen": {"overall": True}})
    example = make_example(row, make_tokenizer(), 128)
    batch = collate_shared([example], pad_token=0)
    chosen, rejected = example.texts
    split = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    assert batch["input_ids"][0].tolist() == chosen + rejected[split:]
    assert batch["text_of_token"][0].tolist() == [-1] * split + [0] * len(chosen[split:]) + [1] * len(rejected[split:])


def test_answers_that_share_a_line_get_the_same_logits():
    model, tokenizer = load(reward_model(), "cpu", None)
    labels = {"response": {"overall": True}}
    rows = [
        make_row(chosen="red", rejected="blue green", response="stone", labels=labels),
        make_row(chosen="red blue", rejected="red", messages=[{"role": "user", "content": "blue stone"}]),
    ]
    examples = [make_example(row, tokenizer, 128) for row in rows]
    separate, shared = collate(examples, pad_token=0), collate_shared(examples, pad_token=0)
    assert (len(separate["input_ids"]), len(shared["input_ids"])) == (5, 3)
    with torch.no_grad():
        expected = model(input_ids=separate["input_ids"], attention_mask=separate["attention_mask"]).logits
        inputs = {name: shared[name] for name in ("input_ids", "attention_mask", "position_ids")}
        hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(head(model)(hidden[shared["last_token"]]), expected, atol=1e-5, rtol=0)
