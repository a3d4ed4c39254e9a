"""Training of any backbone, with all weights or with LoRA, saves the same kind of plain checkpoint."""

import sys
from dataclasses import replace

import pytest
import torch
from reward_toys import color_pairs, encoder, language_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, set_seed

from metaalign_rl.core.batching import pad
from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.errors import UserError
from reward import RewardTraining, Scorer, train
from reward.model import build
from reward.training.lora import add_lora, merge_lora

CONFIG = RewardTraining(learning_rate=3e-3, batch_size=16, max_tokens=128, log_steps=1, calibration_share=0.1)
LORA = replace(CONFIG, lora_rank=4)
BASES = {"decoder": language_model, "encoder": encoder, "encoder with a pooler": lambda: encoder("Bert")}
ROWS = [replace(row, chosen="red", rejected="blue", labels={}) for row in color_pairs(96)]  # learned in a few steps
ANSWERS = [replace(row, response=row.chosen) for row in color_pairs(20, seed=2)]


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]()


def weights_of(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "lora"])
def test_training_any_backbone_gives_a_plain_checkpoint(tmp_path, base, rank):
    result = train(replace(CONFIG, lora_rank=rank, epochs=4), ROWS, ROWS[:16], base, tmp_path / "reward")
    losses = [entry["bt"] for entry in result["log"] if "bt" in entry]
    assert losses[-1] < 0.8 * losses[0]
    plain, _ = build(base)
    assert weights_of(tmp_path / "reward").keys() == plain.state_dict().keys()
    scorer = Scorer.from_pretrained(tmp_path / "reward", device="cpu", dtype="float32")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    with torch.no_grad():
        logits = loaded(**pad([scorer.encode(row, "row") for row in ANSWERS], pad_token=0)).logits
    for expected, score in zip(logits.tolist(), scorer.score(ANSWERS), strict=True):
        assert [score.logits[label] for label in LABELS] == pytest.approx(expected, abs=1e-5)


def test_lora_changes_only_the_linear_layers_of_the_backbone(tmp_path, base):
    set_seed(LORA.seed)
    before = build(base)[0].state_dict()
    train(replace(LORA, calibration_share=0.0), ROWS, None, base, tmp_path / "reward")
    after = weights_of(tmp_path / "reward")
    prefix = "model." if "model." in next(iter(after)) else "bert."
    changed = {name for name in after if name.startswith(prefix) and not torch.equal(before[name], after[name])}
    linear = {name for name in before if name.startswith(prefix) and before[name].ndim == 2 and "embed" not in name}
    assert changed == linear


def test_merging_adapters_keeps_the_scores(base):
    torch.manual_seed(0)
    model, tokenizer = build(base)
    trained = add_lora(model, rank=4, alpha=32.0).eval()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    text = pad([tokenizer.encode("what color is it")], pad_token=0)
    with torch.no_grad():
        unmerged = trained(**text).logits
        merge_lora(trained)
        torch.testing.assert_close(model(**text).logits, unmerged, atol=1e-5, rtol=0)
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


@pytest.mark.parametrize("token_weight", [0.0, 1.0])
def test_gradient_checkpointing_gives_the_same_adapters(tmp_path, token_weight):
    config = replace(LORA, token_weight=token_weight)
    train(config, ROWS, None, language_model(), tmp_path / "kept")
    train(replace(config, gradient_checkpointing=True), ROWS, None, language_model(), tmp_path / "recomputed")
    kept, recomputed = weights_of(tmp_path / "kept"), weights_of(tmp_path / "recomputed")
    torch.testing.assert_close(kept, recomputed, atol=1e-5, rtol=0)


def test_the_token_loss_needs_a_decoder(tmp_path):
    with pytest.raises(UserError, match="token_weight: expected 0, found 1.0: .*ModernBert is not a decoder"):
        train(replace(CONFIG, token_weight=1.0), ROWS, None, encoder(), tmp_path / "reward")


def test_an_error_says_how_to_install_peft(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install metaalign-rl\[lora\]"):
        train(LORA, ROWS, None, language_model(), tmp_path / "reward")
