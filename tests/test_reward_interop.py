"""The reward model in other trainers: their own code loads or calls it, and gets the scorer's numbers."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, free_port
from reward_toys import language_model, make_row, reward_model

from metaalign_rl.core.dataflow import LABELS, Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import MetaPrompt
from metaalign_rl.learner.openrlhf_modules import openrlhf_module
from reward import Scorer, combine, export_scalar
from reward.plugins import environment
from reward.plugins import openrlhf as openrlhf_plugin
from reward.plugins import verl as verl_plugin
from reward.plugins.trl import make_reward_func

ROW = make_row(system_info="say red", user_info="say blue", tier="system", relation="conflict", response="red it is")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.from_pretrained(reward_model(), device="cpu", dtype="float32")


@pytest.fixture
def environment_names_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment variables from which plugins take the reward model."""
    monkeypatch.setenv("METAALIGN_REWARD_MODEL", str(reward_model()))
    monkeypatch.setenv("METAALIGN_REWARD_DTYPE", "float32")
    monkeypatch.delenv("METAALIGN_REWARD_URL", raising=False)
    environment.scorer_from_environment.cache_clear()


def label_of(row: Row) -> str:
    """The row without an answer, as in a data set's label column."""
    return json.dumps({name: value for name, value in row.to_json().items() if name != "response"})


def rendered(scorer: Scorer, row: Row, response: str | None = None) -> str:
    return MetaPrompt(row.system_info, row.user_info).render(scorer.tokenizer, row.messages, response)


def expected(scorer: Scorer, row: Row) -> float:
    return combine(scorer.score([row])[0], row, "overall")


# OpenRLHF.


class OneAnswer:
    """Replaces OpenRLHF's vLLM engine, which is not needed to get a reward."""

    def __init__(self, tokens: list[int]) -> None:
        self._output = SimpleNamespace(token_ids=tokens, finish_reason="stop", logprobs=None)

    async def generate(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(outputs=[self._output])


def openrlhfs_reward(scorer: Scorer, endpoint: str) -> dict[str, Any]:
    """The output of OpenRLHF's own executor for the row's answer, followed by the end token."""
    executor = openrlhf_module("utils.agent").SingleTurnAgentExecutor(endpoint)
    tokenizer = scorer.tokenizer
    answer = tokenizer.encode(f"{ROW.response}<eos>", add_special_tokens=False)
    sampling = SimpleNamespace(max_tokens=8, logprobs=None)
    run = executor.execute(rendered(scorer, ROW), label_of(ROW), sampling, 128, tokenizer, OneAnswer(answer))
    output: dict[str, Any] = asyncio.run(run)
    return output


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A real server with a token."""
    port = free_port()
    words = ["serve", "--model", str(reward_model()), "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-c", "import sys; from reward.cli import main; sys.exit(main())", *words]
    env = os.environ | {"METAALIGN_REWARD_TOKEN": "secret"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert f":{port}" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}"
        process.kill()


def test_openrlhf_gets_rewards_from_the_server(scorer: Scorer, server: str) -> None:
    output = openrlhfs_reward(scorer, f"{server.replace('//', '//any:secret@')}/get_reward")
    assert output["reward"] == output["scores"] == [pytest.approx(expected(scorer, ROW), abs=1e-5)]
    assert set(output["extra_logs"]) == set(LABELS)


def test_openrlhf_gets_rewards_from_a_server_whose_token_is_in_the_environment(
    scorer: Scorer, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAALIGN_REWARD_URL", server)
    monkeypatch.setenv("METAALIGN_REWARD_TOKEN", "secret")
    environment.scorer_from_environment.cache_clear()
    assert openrlhf_plugin.__file__ is not None
    output = openrlhfs_reward(scorer, openrlhf_plugin.__file__)
    environment.scorer_from_environment.cache_clear()
    assert output["reward"].tolist() == [pytest.approx(expected(scorer, ROW), abs=1e-5)]
    assert set(output["extra_logs"]) == set(LABELS)


def test_openrlhf_calls_the_reward_function_in_our_file(scorer: Scorer, environment_names_model: None) -> None:
    assert openrlhf_plugin.__file__ is not None
    output = openrlhfs_reward(scorer, openrlhf_plugin.__file__)
    assert output["reward"].tolist() == [pytest.approx(expected(scorer, ROW), abs=1e-5)]
    assert set(output["extra_logs"]) == set(LABELS)


def test_openrlhfs_loader_loads_the_scalar_export(
    scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The loader imports flash-attn to pack samples. A CPU does not have it, and it is not used here.
    packing = ModuleType("ring_attn_utils")
    packing.gather_and_pad_tensor = packing.unpad_and_slice_tensor = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "_openrlhf_models.ring_attn_utils", packing)
    export_scalar(reward_model(), tmp_path / "scalar")
    load = openrlhf_module("models.model").get_llm_for_sequence_regression
    model = load(str(tmp_path / "scalar"), "reward", param_dtype="bf16", attn_implementation="sdpa").float().eval()
    ids = torch.tensor([scorer.encode(ROW, "row")])
    with torch.no_grad():
        (reward,) = model(ids, torch.ones_like(ids)).tolist()
    rounded = Scorer.from_pretrained(reward_model(), device="cpu", dtype="bfloat16")  # rounds the weights too
    rounded.model.float()
    assert reward == pytest.approx(rounded.score([ROW])[0].overall, abs=1e-4)


# TRL.


def test_trls_grpo_trains_with_the_reward_function(scorer: Scorer, tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rewards: list[float] = []
    reward_func = make_reward_func(scorer)

    def watched(**columns: Any) -> list[float]:
        rewards.extend(found := reward_func(**columns))
        return found

    data = datasets.Dataset.from_list([{"prompt": rendered(scorer, ROW), "row": label_of(ROW)}] * 4)
    config = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, num_generations=4,
        max_completion_length=4, use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, tokenizer = (auto.from_pretrained(language_model()) for auto in (AutoModelForCausalLM, AutoTokenizer))
    trl.GRPOTrainer(policy, watched, args=config, train_dataset=data, processing_class=tokenizer).train()
    assert len(rewards) == 4
    assert all(0 <= reward <= 1 for reward in rewards)


def test_trls_completions_and_rows_may_be_objects(scorer: Scorer) -> None:
    reward_func = make_reward_func(scorer)
    completion = [{"role": "assistant", "content": "red it is"}]
    found = reward_func(completions=[completion, "red it is"], row=[ROW.to_json(), label_of(ROW)], prompts=["", ""])
    assert found == [pytest.approx(expected(scorer, ROW), abs=1e-5)] * 2


def test_trls_rows_survive_a_data_sets_column(scorer: Scorer) -> None:
    """A column has the same fields in every row, with nulls where a row has no value."""
    datasets = pytest.importorskip("datasets")
    one = {**ROW.to_json(), "tags": {"kind": "case"}}
    other = {name: value for name, value in one.items() if name not in ("system_info", "user_info")}
    column = list(datasets.Dataset.from_list([{"row": one}, {"row": other | {"tags": {"split": "train"}}}])["row"])
    assert column[1]["tags"]["kind"] is None
    found = make_reward_func(scorer)(completions=["red it is"] * 2, row=column)
    assert found[0] == pytest.approx(expected(scorer, ROW), abs=1e-5)
    assert found[1] == pytest.approx(make_reward_func(scorer)(completions=["red it is"], row=[other])[0], abs=1e-5)


def test_trls_completion_is_the_text_of_the_assistants_last_message(scorer: Scorer) -> None:
    reward_func = make_reward_func(scorer)

    def reward(*completion: dict[str, Any]) -> float:
        return reward_func(completions=[list(completion)], row=[ROW.to_json()])[0]

    plain = reward({"role": "assistant", "content": "red it is"})
    parts = [{"type": "text", "text": "red "}, {"type": "text", "text": "it is"}]
    assert reward({"role": "assistant", "content": parts}) == plain
    calls = [{"role": "assistant", "content": "red it is"}, {"role": "tool", "content": "4"}]
    assert reward(*calls, {"role": "assistant", "content": "red it is"}) == plain
    empty = reward({"role": "assistant", "content": ""})
    assert reward({"role": "assistant", "content": None, "tool_calls": []}) == empty
    for wrong, message in (
        (calls, r"completions\[0\]: expected the assistant's message last, found tool"),
        ([], "found no message"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "only text can be scored"),
    ):
        with pytest.raises(UserError, match=message):
            reward(*wrong)


# verl 0.9.1 needs another version of transformers, so it is not installed here. These are the calls of its reward loop.


def call_as_verl(answer: str) -> dict[str, float]:
    return verl_plugin.compute_score(
        data_source="metaalign", solution_str=answer, ground_truth=label_of(ROW), extra_info={"num_turns": None},
        reward_router_address="127.0.0.1:1", reward_model_tokenizer=None,
    )  # fmt: skip


def test_verl_gets_a_score_and_the_labels_probabilities(scorer: Scorer, environment_names_model: None) -> None:
    found = call_as_verl(" red it is")
    assert found["score"] == pytest.approx(expected(scorer, ROW), abs=1e-5)
    assert set(found) == {"score", *LABELS}


def test_verls_threads_load_the_model_once(environment_names_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    load, paths = Scorer.from_pretrained, []

    def slowly(path: str, dtype: str | None) -> Scorer:
        paths.append(path)
        time.sleep(0.1)
        return load(path, dtype=dtype)

    monkeypatch.setattr(Scorer, "from_pretrained", slowly)
    answers = ["red", "blue it is"] * 8
    with ThreadPoolExecutor(16) as pool:
        found = [one["score"] for one in pool.map(call_as_verl, answers)]
    assert len(paths) == 1
    assert found == pytest.approx(found[:2] * 8, abs=1e-6)


# Errors.


def test_an_error_names_a_label_that_is_not_a_row(environment_names_model: None) -> None:
    with pytest.raises(UserError, match=r"labels\[0\]: expected the row as a JSON object, found 'gold'"):
        openrlhf_plugin.reward_func(["pa"], ["p"], ["gold"])
    with pytest.raises(UserError, match="ground_truth of math: expected the row"):
        verl_plugin.compute_score("math", "4", "4")


@pytest.mark.parametrize("tier", [{}, {"tier": None}])
def test_mode_tier_needs_the_rows_tier(
    environment_names_model: None, monkeypatch: pytest.MonkeyPatch, tier: dict[str, None]
) -> None:
    monkeypatch.setenv("METAALIGN_REWARD_MODE", "tier")
    label = json.dumps({"messages": [{"role": "user", "content": "hi"}], "system_info": "say red", **tier})
    with pytest.raises(UserError, match=r"labels\[0\]: field 'tier': expected one of system, user, dialog"):
        openrlhf_plugin.reward_func(["pa"], ["p"], [label])
    with pytest.raises(UserError, match="field 'tier'"):
        verl_plugin.compute_score("x", "red", label)


def test_an_error_names_the_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("METAALIGN_REWARD_MODEL", "METAALIGN_REWARD_URL"):
        monkeypatch.delenv(name, raising=False)
    environment.scorer_from_environment.cache_clear()
    with pytest.raises(UserError, match="set METAALIGN_REWARD_MODEL"):
        verl_plugin.compute_score("x", "y", label_of(ROW))
    monkeypatch.setenv("METAALIGN_REWARD_MODE", "tiers")
    with pytest.raises(UserError, match="did you mean 'tier'"):
        environment.mode_from_environment()
