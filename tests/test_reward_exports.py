"""The scalar export in tools that load one label: their scores equal the scorer's `overall` logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from reward_toys import language_model, reward_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from reward import Scorer, export_scalar

SYSTEM, USER = "say red", "say blue"
QUESTION = [{"role": "user", "content": "what color is it"}]
ANSWERS = ["red", "blue it is", "again the stone please", ""]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "scalar"
    export_scalar(reward_model(), folder)
    return folder


def overall(scorer: Scorer, answers: list[str], **tiers: str) -> list[float]:
    return [score.overall for score in scorer.score([{"messages": QUESTION, "response": a, **tiers} for a in answers])]


# TRL: the folder as the reward function of GRPO and RLOO, and as the model of the reward trainer.


def logs_of_a_step(kind: str, scalar: Path, watcher: Any, folder: Path) -> dict[str, Any]:
    """The log of one step of a TRL trainer, with the export and a function as rewards."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=6, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, logging_steps=1, chat_template_kwargs={"user_info": USER},
    )  # fmt: skip
    prompt = [{"role": "system", "content": SYSTEM}, *QUESTION]
    data = datasets.Dataset.from_list([{"prompt": prompt}] * 4)
    policy, tokenizer = (auto.from_pretrained(language_model()) for auto in (AutoModelForCausalLM, AutoTokenizer))
    trainer = getattr(trl, f"{kind}Trainer")(
        policy, [str(scalar), watcher], args=config, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    logged: dict[str, Any] = trainer.state.log_history[0]
    return logged


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_trl_gives_its_completions_the_scorers_logits(kind: str, scorer: Scorer, scalar: Path, tmp_path: Path) -> None:
    expected: list[float] = []

    def watcher(completions: Any, **_: Any) -> list[float]:
        answers = [completion[0]["content"] for completion in completions]
        expected.extend(overall(scorer, answers, system_info=SYSTEM, user_info=USER))
        return [0.0] * len(answers)

    logged = logs_of_a_step(kind, scalar, watcher, tmp_path)
    assert len(set(expected)) > 1, "the test needs completions that differ"
    assert logged["rewards/scalar/mean"] == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert logged["rewards/scalar/std"] == pytest.approx(torch.tensor(expected).std().item(), abs=1e-4)


def test_trls_reward_trainer_evaluates_the_export(scorer: Scorer, scalar: Path, tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    pairs = [
        {"prompt": QUESTION, "chosen": [answer(good)], "rejected": [answer(bad)]}
        for good, bad in (ANSWERS[:2], ANSWERS[2:])
    ]
    config = trl.RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_length=128,
        gradient_checkpointing=False,
    )  # fmt: skip
    data = datasets.Dataset.from_list(pairs)
    trainer = trl.RewardTrainer(str(scalar), args=config, train_dataset=data, eval_dataset=data)
    expected = overall(scorer, ANSWERS)
    assert trainer.evaluate()["eval_mean_reward"] == pytest.approx(sum(expected) / 4, abs=1e-4)


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


# RewardBench 0.1.4 is not installed here, and its pipeline needs CUDA. These are its calls, on a CPU.


def rewardbenchs_scores(scalar: Path, texts: list[str]) -> list[float]:
    """The calls of `rewardbench --model FOLDER`: pad on the left, add special tokens, pass all inputs to the model."""
    tokenizer = AutoTokenizer.from_pretrained(scalar, trust_remote_code=False, revision=None)
    tokenizer.padding_side = "left"
    model = AutoModelForSequenceClassification.from_pretrained(scalar, dtype=torch.float32, trust_remote_code=False)
    inputs = tokenizer(texts, truncation=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    assert logits.shape == (len(texts), 1)
    return [score for (score,) in logits.tolist()]


def test_rewardbenchs_calls_give_the_overall_logits(scorer: Scorer, scalar: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(scalar)
    texts = [tokenizer.apply_chat_template([*QUESTION, answer(text)], tokenize=False) for text in ANSWERS]
    assert rewardbenchs_scores(scalar, texts) == pytest.approx(overall(scorer, ANSWERS), abs=1e-4)
