"""SmolLM2-135M-Instruct, a published model: `make smollm2` downloads it. Without it these tests are skipped."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from reward_toys import make_row

from metaalign_rl.chat.session import ChatPolicy
from metaalign_rl.core.meta_prompt import MetaPrompt, encode_row
from metaalign_rl.core.tokenizers import load_tokenizer
from metaalign_rl.trainers.sft import IGNORED, tokenize

GGUF = ROOT / "build" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

# The weights are 98 MB, so the repository does not hold them. .ci/run downloads them; a laptop may lack them.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GGUF.is_file(), reason="needs SmolLM2-135M-Instruct; run `make smollm2` to download it"),
]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder after `prepare`, which also converts it."""
    from metaalign_rl.core.prepare import prepare_checkpoint

    folder = tmp_path_factory.mktemp("smollm2") / "base"
    prepare_checkpoint(str(GGUF), folder)
    return folder


def test_the_prepared_model_keeps_its_size_and_stops_at_the_end_of_a_turn(prepared: Path) -> None:
    config, generation = (
        json.loads((prepared / f"{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert config["tie_word_embeddings"]
    assert config["vocab_size"] == 49152
    tokenizer = load_tokenizer(prepared)
    assert generation["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.pad_token not in ("<|im_end|>", "<|im_start|>")


def test_the_labels_are_the_response_and_its_end_of_turn(prepared: Path) -> None:
    tokenizer = load_tokenizer(prepared)
    row = make_row(system_info="be brief", user_info="use short words", response="Four.")
    sample = tokenize(row, tokenizer, 512)
    labels = [token for token in sample["labels"] if token != IGNORED]
    assert tokenizer.decode(labels) == "Four.<|im_end|>"
    prompt = encode_row(tokenizer, row, max_tokens=512)
    assert sample["input_ids"][: len(prompt)] == prompt


def test_chat_answers_and_ends_its_turn(prepared: Path) -> None:
    policy = ChatPolicy(prepared, max_new_tokens=40)
    reply = policy.answer(
        MetaPrompt("Answer in one short sentence."), [{"role": "user", "content": "What is the capital of France?"}]
    )
    assert "Paris" in reply.answer
    assert "<|im_start|>" not in reply.answer
    assert "user" not in reply.answer
