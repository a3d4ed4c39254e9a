"""The reward model's checkpoint in vLLM's engine, and requests of vLLM's clients to our server."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fastapi.testclient import TestClient
from reward_toys import reward_model

from metaalign_rl.core.dataflow import LABELS
from metaalign_rl.core.files import read_json, write_json
from metaalign_rl.core.meta_prompt import MetaPrompt
from reward import Scorer
from reward.serving.app import ServingConfig, create_app

pytestmark = pytest.mark.slow
Values = list[list[float]]  # [texts, labels]
QUESTION = [{"role": "user", "content": "what color is it"}]
ROWS = [
    {"system_info": system, "user_info": user, "messages": QUESTION, "response": response}
    for system, user in (("say red", "say blue"), ("", "say red"), ("", ""))
    for response in ("red", "blue it is now", "")
]
CLASSIFY = """
import json, sys
from metaalign_rl.runtime.vllm_setup import prepare_vllm
prepare_vllm()
from vllm import LLM, PoolingParams
folder, texts, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
engine = LLM(folder, runner="pooling", dtype="float32", max_model_len=128, enforce_eager=True)
found = {
    name: [one.outputs.probs for one in engine.classify(texts, pooling_params=parameters, use_tqdm=False)]
    for name, parameters in (("raw", PoolingParams(use_activation=False)), ("activated", None))
}
json.dump(found, open(output, "w"))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model with one attention head: vLLM's CPU kernels refuse narrower ones."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    shutil.copytree(reward_model(), folder)
    config = read_json(folder / "config.json")
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": config["hidden_size"]}
    write_json(folder / "config.json", {**config, **heads})
    return folder


@pytest.fixture(scope="module")
def scorer(model: Path) -> Scorer:
    return Scorer.from_pretrained(model, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def texts(scorer: Scorer) -> list[str]:
    """The rows rendered with the template."""
    return [
        MetaPrompt(row["system_info"], row["user_info"]).render(scorer.tokenizer, row["messages"], row["response"])  # type: ignore[arg-type]
        for row in ROWS
    ]


@pytest.fixture(scope="module")
def vllm_values(model: Path, texts: list[str]) -> dict[str, Values]:
    """The output of vLLM's `LLM.classify`: `raw` without its activation, `activated` by default."""
    output = model.parent / "found.json"
    command = [sys.executable, "-c", CLASSIFY, str(model), json.dumps(texts), str(output)]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Values] = json.loads(output.read_text())
    return found


def close(found: Values, expected: Values) -> bool:
    return all(one == pytest.approx(other, abs=1e-4) for one, other in zip(found, expected, strict=True))


def test_vllm_computes_the_scorers_logits(scorer: Scorer, vllm_values: dict[str, Values]) -> None:
    expected = [list(score.logits.values()) for score in scorer.score(ROWS)]
    assert close(vllm_values["raw"], expected)


def test_vllm_applies_a_sigmoid_per_label_and_no_softmax_across_them(
    scorer: Scorer, vllm_values: dict[str, Values]
) -> None:
    expected = [list(score.probabilities.values()) for score in scorer.score(ROWS)]
    assert close(vllm_values["activated"], expected)
    assert any(abs(sum(probabilities) - 1) > 0.1 for probabilities in expected), (
        "the test needs probabilities that a softmax cannot give"
    )


@pytest.mark.parametrize("activated", [True, False])
def test_our_server_accepts_vllms_request_and_gives_vllms_reply(
    activated: bool, scorer: Scorer, texts: list[str], vllm_values: dict[str, Values]
) -> None:
    from vllm.entrypoints.pooling.classify.protocol import ClassificationCompletionRequest, ClassificationResponse

    request = ClassificationCompletionRequest(
        model="toy", input=texts, use_activation=activated, add_special_tokens=False, user="me", request_id="1"
    )
    with TestClient(create_app(scorer, ServingConfig("toy"))) as client:
        reply = client.post("/classify", json=request.model_dump(exclude_unset=True)).json()
    read = ClassificationResponse.model_validate(reply)
    assert not read.model_extra
    assert not any(one.model_extra for one in (*read.data, read.usage))
    assert {one.label for one in read.data} <= set(LABELS)
    assert close([one.probs for one in read.data], vllm_values["activated" if activated else "raw"])
