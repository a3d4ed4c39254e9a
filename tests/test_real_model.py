"""SmolLM2-135M-Instruct, a published model: `make smollm2` downloads it. Without it these tests are skipped."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Command
from reward_toys import make_row
from transformers import AutoModelForCausalLM, PreTrainedModel

from metaalign_rl.chat.session import ChatPolicy
from metaalign_rl.config.schema import Config, ModelConfig
from metaalign_rl.core.dataflow import Batch, Request, Reward, Rollout, Row, Sample, Sampling
from metaalign_rl.core.meta_prompt import MetaPrompt, encode_row
from metaalign_rl.core.tokenizers import load_tokenizer
from metaalign_rl.learner.attention import attention_for
from metaalign_rl.learner.batch import batch_of
from metaalign_rl.ppo.mismatch import MismatchGuard
from metaalign_rl.rollout.engine import RolloutEngine
from metaalign_rl.trainers.sft import IGNORED, tokenize
from metaalign_rl.weights import StaleEngine
from metaalign_rl.weights.checksum import Digest

GGUF = ROOT / "build" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = ["What is the capital of France?", "Tell me about the sea.", "How do I cook rice?", "Write a short poem."]
COPIES, TOKENS = 4, 32

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


def test_prepare_says_what_it_changed_and_refuses_a_folder_that_is_in_use(
    cli: Command, prepared: Path, tmp_path: Path
) -> None:
    done = cli("prepare", str(prepared), "--output", str(tmp_path / "again"))
    assert (done.returncode, done.stdout) == (0, f"- nothing to change\nprepared model: {tmp_path / 'again'}\n")
    done = cli("prepare", str(prepared), "--output", str(prepared))
    assert done.returncode != 0
    assert "expected a new or empty folder" in done.stderr


# The mismatch guard in bfloat16, where rounding is largest.


@pytest.fixture(scope="module")
def engine(prepared: Path) -> Iterator[RolloutEngine]:
    environment = dict(os.environ)
    yield RolloutEngine(str(prepared), max_tokens=256, dtype="bfloat16", kv_cache_gib=0.5)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def learner(prepared: Path) -> PreTrainedModel:
    """The learner's model, as `load_policy` loads it."""
    options = {"dtype": torch.bfloat16, "attn_implementation": attention_for(torch.bfloat16)}
    return AutoModelForCausalLM.from_pretrained(prepared, **options).eval()


def draw(engine: RolloutEngine, prepared: Path, version: int, number: int) -> list[Sample]:
    """Responses to every question; the engine says that it is `number` and has `version`."""
    tokenizer = load_tokenizer(prepared)
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                             return_dict=False) for text in QUESTIONS]  # fmt: skip
    requests = [Request(index, prompts[index // COPIES]) for index in range(COPIES * len(prompts))]
    found = [sample for part in engine.generate(requests, Sampling(1.0, TOKENS)) for sample in part]
    return [replace(sample, engine=number, weight_version=version, first_version=version) for sample in found]


@torch.no_grad()
def evaluated(learner: PreTrainedModel, samples: list[Sample]) -> tuple[Batch, list[Rollout]]:
    row = Row(id="r", family="test", relation="system_only", tier="system", system_info="", user_info="", messages=[])
    batch = batch_of(samples, pad_id=0)
    batch.logprobs = torch.zeros(batch.action_mask.shape)
    for place, sample in enumerate(samples):
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        logits = learner(ids).logits[0, len(sample.prompt_ids) - 1 : -1].float()
        logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        batch.logprobs[place, batch.action_mask[place]] = logprobs
    return batch, [Rollout(row, sample, Reward(0.0, None, None)) for sample in samples]


def send(engine: RolloutEngine, learner: PreTrainedModel, version: int) -> None:
    """Give the engine the learner's weights, as a bucket of Ray's object store would."""
    from metaalign_rl.weights.buckets import fill

    digest = Digest()
    engine.start_weight_update()
    for bucket in fill(digest.watch(learner.named_parameters()), 2**26):
        engine.update_weights({"entries": bucket.entries, "data": bucket.data})
    assert engine.finish_weight_update(version) == (version, digest.hexdigest())


def train(learner: PreTrainedModel, samples: list[Sample], steps: int) -> None:
    """Steps of AdamW with float32 master weights, towards the samples."""
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in learner.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, weight_decay=0.0)
    for step in range(steps):
        chosen = samples[step % len(samples)]
        ids = torch.tensor([chosen.prompt_ids + chosen.response_ids])
        learner(ids, labels=ids).loss.backward()
        for master, parameter in zip(masters, learner.parameters(), strict=True):
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        for master, parameter in zip(masters, learner.parameters(), strict=True):
            parameter.data.copy_(master.data)


@pytest.mark.skipif("SLOWEST" not in os.environ, reason="takes many minutes; set SLOWEST=1 to run it")
def test_one_stale_engine_of_two_is_caught_and_an_honest_one_is_not(engine, learner, prepared):
    guard = MismatchGuard(Config(model=ModelConfig(dtype="bfloat16")))
    first = draw(engine, prepared, 0, 0) + draw(engine, prepared, 0, 1)
    rounding = guard.check(*evaluated(learner, first), 0)
    assert 0.01 < rounding < 0.1
    train(learner, first, steps=20)
    stale = draw(engine, prepared, 1, 1)  # it says 1 and still has 0
    send(engine, learner, 1)
    fresh = draw(engine, prepared, 1, 0) + draw(engine, prepared, 1, 1)
    assert guard.check(*evaluated(learner, fresh), 1) < 1.3 * rounding
    with pytest.raises(StaleEngine, match="rollout engine 1 .* version 1"):
        guard.check(*evaluated(learner, fresh[: len(stale)] + stale), 1)
