"""Which architectures may read several texts in one line or one batch: the scores must not change."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from reward_toys import make_row, make_tokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from metaalign_rl.core.errors import UserError
from metaalign_rl.learner.attention import require_shareable
from reward import RewardTraining, Scorer
from reward.inference.exactness import attends_to_all, longrope_threshold
from reward.inference.packed_forward import supports_packing
from reward.model import head
from reward.training.examples import Example, collate, collate_separate, collate_shared, make_example
from reward.training.shared_lines import supports_shared_lines
from reward.training.trainer import RewardTrainer, _layout

LABELS = {"chosen": {"overall": True}, "rejected": {"overall": False}}
LONG = [{"role": "user", "content": "what color is it now " * 6}]
ROWS = [
    make_row(id="a", messages=LONG, chosen="red blue red", rejected="blue", labels=LABELS),
    make_row(
        id="b", chosen="stone", rejected="red stone", response="blue", labels={**LABELS, "response": {"user": True}}
    ),
]
WINDOW = {"sliding_window": 8}
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10_000.0,
        "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    }
}  # fmt: skip
# By class of transformers: its settings, and whether a line may hold several texts.
ARCHITECTURES: dict[str, tuple[dict[str, Any], bool]] = {
    "Llama": ({}, True),
    "Qwen2": ({}, True),
    "Qwen3": ({"head_dim": 16}, True),
    "Gemma": ({"head_dim": 16}, True),
    "Phi3": ({}, True),
    "Qwen2 with a window": ({"use_sliding_window": True, "max_window_layers": 0, **WINDOW}, False),
    "Mistral": (WINDOW, False),
    "Gemma2": ({"head_dim": 16, **WINDOW}, False),
    "Gemma3Text": ({"head_dim": 16, **WINDOW}, False),
    "MiniMax": ({"head_dim": 16, "block_size": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, False),
    "Jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 4,
               "num_experts": 2, "num_experts_per_tok": 1}, False),
    "Qwen3_5Text": ({"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}, False),
    "Phi3 with longrope": ({"original_max_position_embeddings": 24, **LONGROPE}, False),
}  # fmt: skip


def make_model(name: str) -> PreTrainedModel:
    """A tiny random model of an architecture, with the head of a reward model."""
    settings, _ = ARCHITECTURES[name]
    tokenizer = make_tokenizer()
    config = getattr(transformers, f"{name.split()[0]}Config")(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, num_labels=4, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # larger than by default, so that what a token reads shows in its score
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def case(request: pytest.FixtureRequest) -> tuple[str, PreTrainedModel]:
    return request.param, make_model(request.param)


def examples() -> list[Example]:
    return [make_example(row, make_tokenizer(), 128) for row in ROWS]


@torch.no_grad()
def token_scores(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scores of each text's last token, by the trainer's own route: the head's output at `last_token`."""
    names = ("input_ids", "attention_mask", "position_ids")
    hidden = model.base_model(**{name: batch[name] for name in names if name in batch}).last_hidden_state
    return head(model)(hidden).flatten(0, 1)[batch["last_token"]]


@torch.no_grad()
def alone(model: PreTrainedModel) -> torch.Tensor:
    texts = [text for example in examples() for text in example.texts]
    return torch.cat([model(torch.tensor([text])).logits for text in texts])


def test_only_exact_architectures_share_lines(case: tuple[str, PreTrainedModel]) -> None:
    name, model = case
    assert supports_shared_lines(model) is ARCHITECTURES[name][1]
    assert supports_packing(model) is ARCHITECTURES[name][1]


def test_with_token_losses_every_architecture_is_trained_on_the_scores_that_it_gives(
    case: tuple[str, PreTrainedModel],
) -> None:
    name, model = case
    layout = _layout(RewardTraining(token_weight=1.0), model)
    batch = layout(examples(), pad_token=model.config.pad_token_id)
    assert (layout is collate_shared) is ARCHITECTURES[name][1]
    trainer = RewardTrainer.__new__(RewardTrainer)
    trainer._plain = model
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with torch.no_grad():
        scores = trainer._in_groups(tokens, partial(trainer._token_scores, model))
    torch.testing.assert_close(scores.flatten(0, 1)[batch["last_token"]], alone(model), atol=2e-4, rtol=1e-3)


def test_a_line_of_their_own_gives_answers_the_same_tokens_and_losses() -> None:
    shared, separate = (make(examples(), pad_token=0) for make in (collate_shared, collate_separate))
    for name in ("labels", "chosen", "rejected", "ranked", "strength"):
        torch.testing.assert_close(shared[name], separate[name], equal_nan=True)
    for text in range(len(separate["input_ids"])):
        one, other = (batch["input_ids"][batch["text_of_token"] == text] for batch in (shared, separate))
        assert one.tolist() == other.tolist()


def test_where_lines_are_shared_wrongly_scores_change() -> None:
    """The tests above would find it."""
    for name in ("Mistral", "Gemma3Text", "Qwen3_5Text"):
        model = make_model(name)
        batch = collate_shared(examples(), pad_token=model.config.pad_token_id)
        assert (token_scores(model, batch) - alone(model)).abs().max() > 1e-2


def test_scores_do_not_depend_on_the_batch(case: tuple[str, PreTrainedModel]) -> None:
    """With longrope, transformers chooses the frequencies of a whole batch by its longest text."""
    scorer = Scorer(case[1], make_tokenizer())
    texts = [text for example in examples() for text in example.texts]
    assert min(map(len, texts)) <= 24 < max(map(len, texts))
    torch.testing.assert_close(scorer.logits(texts), alone(case[1]), atol=2e-4, rtol=1e-3)


def test_the_config_shows_windows_recurrent_layers_and_longrope() -> None:
    assert attends_to_all(transformers.LlamaConfig())
    assert not attends_to_all(transformers.MistralConfig())
    assert not attends_to_all(transformers.Gemma3TextConfig())
    assert attends_to_all(transformers.Qwen2Config(sliding_window=8, use_sliding_window=False))
    assert longrope_threshold(make_model("Phi3 with longrope").config) == 24
    assert longrope_threshold(transformers.LlamaConfig()) is None


def test_ppo_shares_prompts_only_where_that_changes_nothing(tmp_path: Path) -> None:
    for name, config in (("exact", transformers.LlamaConfig()), ("window", transformers.MistralConfig())):
        config.save_pretrained(tmp_path / name)
    require_shareable(tmp_path / "exact")
    with pytest.raises(UserError, match="learner.share_prompts: expected false for .*window: it has a sliding window"):
        require_shareable(tmp_path / "window")


def test_with_longrope_a_training_batch_is_split_at_the_threshold() -> None:
    model = make_model("Phi3 with longrope")
    batch = collate(examples(), pad_token=model.config.pad_token_id)
    tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
    trainer = RewardTrainer.__new__(RewardTrainer)
    trainer._plain = model
    with torch.no_grad():
        together = model(**tokens).logits
        split = trainer._in_groups(tokens, lambda part: model(**part).logits)
    torch.testing.assert_close(split, alone(model), atol=2e-4, rtol=1e-3)
    assert (together - split).abs().max() > 1e-3
