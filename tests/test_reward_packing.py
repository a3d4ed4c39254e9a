"""Packs: many texts in one sequence of tokens, with the same scores as each text alone."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reward_toys import make_row, make_tokenizer, reward_model
from transformers import AutoModelForSequenceClassification, GemmaConfig, MiniMaxConfig, MistralConfig, Qwen3Config

from reward import Scorer
from reward.inference.packed_forward import supports_packing
from reward.inference.packing import pack_texts
from reward.inference.prefixes import group_by_prefix

TEXTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=20)
ROWS = [
    make_row(system_info=f"say {color}", messages=[{"role": "user", "content": "what color is it now " * turns}],
             response="red " * length)
    for turns, color, length in product((1, 3), ("red", "blue"), (1, 2, 5, 9))
]  # fmt: skip


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32")


@given(TEXTS, st.integers(1, 60))
def test_packs_hold_every_text_once_within_the_token_limit(texts: list[list[int]], limit: int) -> None:
    packs = list(pack_texts(group_by_prefix(texts), texts, limit))
    assert sorted(index for pack in packs for index in pack.texts) == list(range(len(texts)))
    for pack in packs:
        assert len(pack.tokens) <= limit or len(pack.texts) == 1
        for index, last in zip(pack.texts, pack.last, strict=True):
            assert (pack.tokens[last], pack.positions[last]) == (texts[index][-1], len(texts[index]) - 1)


@given(TEXTS)
def test_a_token_attends_only_to_its_own_text_up_to_itself(texts: list[list[int]]) -> None:
    for pack in pack_texts(group_by_prefix(texts), texts, 40):
        attended = {}
        for part in [*pack.attentions, *pack.last_attentions]:
            places = [place for span in part.keys for place in range(span.start, span.stop)]
            queries = part.queries if isinstance(part.queries, list) else range(part.queries.start, part.queries.stop)
            for row, query in enumerate(queries):
                looks = (
                    places if part.mask is None else [p for p, m in zip(places, part.mask[row], strict=True) if m == 0]
                )
                attended[query] = looks[: row + 1] if part.causal else looks
        assert set(attended) == set(range(len(pack.tokens)))
        for index, last in zip(pack.texts, pack.last, strict=True):
            assert [pack.tokens[place] for place in attended[last]] == texts[index]
            assert [pack.positions[place] for place in attended[last]] == list(range(len(texts[index])))


def test_a_pack_holds_a_shared_prefix_once() -> None:
    prompt = list(range(50))
    texts = [[*prompt, 100 + number] for number in range(4)]
    [pack] = pack_texts(group_by_prefix(texts), texts, 1000)
    assert pack.tokens == [*prompt, 100, 101, 102, 103]
    assert pack.positions == [*range(50), 50, 50, 50, 50]


def test_packed_texts_score_the_same_as_alone(scorer: Scorer) -> None:
    texts = [scorer.encode(row, "row") for row in ROWS]
    with torch.inference_mode():
        alone = torch.cat([scorer.model(torch.tensor([text])).logits for text in texts])
    for batch_tokens in (1, 40, 200, 10_000):
        assert torch.allclose(scorer.logits(texts, batch_tokens=batch_tokens), alone, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "packs"),
    [
        (Qwen3Config(num_key_value_heads=1, head_dim=16), True),
        (GemmaConfig(num_key_value_heads=2, head_dim=16), True),
        (
            MistralConfig(num_key_value_heads=2, sliding_window=8),
            False,
        ),  # attends to a window only
        (MiniMaxConfig(num_key_value_heads=2, head_dim=16), False),  # some layers are recurrent
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_decoders_with_full_attention_support_packing(config: object, packs: bool) -> None:
    tokenizer = make_tokenizer()
    config.update(
        {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 128, "num_labels": 4,
         "pad_token_id": tokenizer.pad_token_id}
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").eval()
    assert supports_packing(model) is packs
    scorer = Scorer(model, tokenizer)
    texts = [scorer.encode(row, "row") for row in ROWS]
    with torch.inference_mode():
        alone = torch.cat([model(torch.tensor([text])).logits for text in texts])
    assert torch.allclose(scorer.logits(texts), alone, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"  # restored


def test_scores_in_bfloat16_are_close_to_float32(scorer: Scorer) -> None:
    narrow = Scorer.from_pretrained(reward_model(), device="cpu", dtype="bfloat16")
    texts = [scorer.encode(row, "row") for row in ROWS]
    logits = scorer.logits(texts)
    difference = (narrow.logits(texts) - logits).abs().max()
    assert 0 < difference < 0.03 * logits.abs().max()


def test_threads_can_share_a_scorer(scorer: Scorer) -> None:
    expected = [scorer.score([row])[0].overall for row in ROWS]
    with ThreadPoolExecutor(3) as threads:
        for _ in range(5):
            found = list(threads.map(lambda row: scorer.score([row])[0].overall, ROWS))
            assert found == pytest.approx(expected, abs=1e-5)
