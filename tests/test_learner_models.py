"""The learner's state and weights, its variants of a model, and the settings that change what an update trains."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from learner_toys import (
    CONFIG,
    VOCABULARY,
    evaluated,
    make_learner,
    make_samples,
    policy_and_reference,
    policy_weights,
    tiny_model,
    with_advantages,
)
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2ForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from metaalign_rl.config.learner import HEAD_LOGITS
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import replace_folder
from metaalign_rl.learner.batch import make_batch
from metaalign_rl.learner.micro_batches import model_inputs
from metaalign_rl.learner.worker import Learner

FILE = "model.safetensors"

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_and_reference(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_step_equals_the_uninterrupted_one(folder, tmp_path, stage):
    config = replace(CONFIG, minibatch_size=5, zero_stage=stage, warmup_steps=10)
    learner = make_learner(folder, config)
    batch = evaluated(learner)
    learner.train(batch)
    learner.save_state(tmp_path / "state")
    expected, noise = learner.train(batch), (random.random(), torch.rand(1).item())
    resumed = make_learner(folder, config)
    resumed.load_state(tmp_path / "state")
    assert resumed.train(batch) == expected
    assert (random.random(), torch.rand(1).item()) == noise
    final, repeated = learner.evaluate(batch), resumed.evaluate(batch)
    assert torch.equal(final.logprobs, repeated.logprobs)
    assert torch.equal(final.values, repeated.values)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_folder_is_replaced_atomically_and_leftovers_of_dead_writers_are_removed(tmp_path):
    for litter in (".state.1.part", ".state.1.old", ".state.2.1.part"):
        (tmp_path / litter).mkdir()
    for name in ("first", "second"):
        replace_folder(tmp_path / "state", lambda folder, name=name: (folder / name).touch())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".state.2.1.part", "state"]
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["second"]


def test_a_folders_files_can_be_read_by_those_who_can_read_other_new_files(tmp_path):
    before = os.umask(0o022)
    try:
        (tmp_path / "usual").touch()
        replace_folder(tmp_path / "state", lambda folder: (folder / "private").touch(0o600))
    finally:
        os.umask(before)
    assert (tmp_path / "state" / "private").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_program_in_a_new_folder_stays_executable_and_a_link_is_left_alone(tmp_path):
    (tmp_path / "elsewhere").touch(0o600)

    def fill(folder):
        (folder / "program").touch(0o755)
        (folder / "link").symlink_to(tmp_path / "elsewhere")

    replace_folder(tmp_path / "state", fill)
    assert (tmp_path / "state" / "program").stat().st_mode & 0o100
    assert (tmp_path / "elsewhere").stat().st_mode & 0o777 == 0o600


def test_the_state_of_another_set_of_engines_is_an_error(folder, tmp_path):
    learner = make_learner(folder)
    learner.save_state(tmp_path / "state")
    learner.critic = None
    with pytest.raises(UserError, match="resume with the same config"):
        learner.load_state(tmp_path / "state")


def test_a_saved_policy_is_a_transformers_checkpoint(folder, tmp_path):
    learner = make_learner(folder)
    batch = evaluated(learner)
    learner.train(batch)
    learner.save_policy(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors").keys()
    assert names == load_file(folder / "policy" / "model.safetensors").keys()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        logits = model(batch.sequences).logits
        expected = learner.policy.module.model.model(batch.sequences).last_hidden_state
        expected = torch.nn.functional.linear(expected, learner.policy.module.model.lm_head.weight)
    torch.testing.assert_close(logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == "{{ messages }}"


def test_a_critic_starts_from_a_reward_model_with_a_new_head(folder):
    tiny_model(folder / "reward", seed=3, kind=Qwen2ForSequenceClassification, num_labels=4)
    batch = evaluated(make_learner(folder, critic="reward"))
    assert batch.values[batch.action_mask].abs().max() < 0.5


def test_the_critic_is_optional(folder):
    learner = Learner(CONFIG, 0, 1, f"file://{folder}/rendezvous1", dtype="float32", seed=0)
    learner.setup(folder / "policy", None, folder / "reference")
    batch = learner.evaluate(make_batch(make_samples(), pad_id=0))
    assert batch.values is None
    metrics = learner.train(replace(batch, advantages=torch.ones(batch.action_mask.shape)))
    assert "value_loss" not in metrics


def test_weights_for_the_engines_have_the_names_of_the_checkpoint(folder):
    from metaalign_rl.learner.deepspeed_engine import stream_weights

    learner = make_learner(folder)
    expected = load_file(folder / "policy" / "model.safetensors")
    for gathered_bytes in (1, 5_000, 10**9):
        found = dict(stream_weights(learner.policy.module.model, gathered_bytes))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("stage", [2, 3])
def test_tied_embeddings_are_one_tensor_in_updates_and_checkpoints(folder, tmp_path, stage):
    from metaalign_rl.learner.deepspeed_engine import stream_weights

    tiny_model(folder / "tied", seed=4, tie_word_embeddings=True)
    learner = make_learner(folder, replace(CONFIG, zero_stage=stage), policy="tied")
    learner.train(evaluated(learner))
    sent = {name: tensor.clone() for name, tensor in stream_weights(learner.policy.module.model, 10**9)}
    names = load_file(folder / "tied" / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert sent.keys() == names
    learner.save_policy(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == names
    for name, tensor in sent.items():
        torch.testing.assert_close(saved[name], tensor)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.tie_word_embeddings


def test_tensors_that_transformers_merged_are_sent_as_in_the_checkpoint(tmp_path):
    from metaalign_rl.learner.deepspeed_engine import stream_weights

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 8, "intermediate_size": 8, "head_dim": 8}
    config = Qwen3MoeConfig(
        vocab_size=20, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=4, **sizes
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    found = dict(stream_weights(model, gathered_bytes=1))
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in expected
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


def test_attention_in_float32_changes_a_bfloat16_model_only_by_rounding(folder, tmp_path):
    from metaalign_rl.learner.models import load_policy  # imports deepspeed, which a learner prepares

    inputs = model_inputs(make_batch(make_samples(), pad_id=0), share_prompts=False)
    policy = load_policy(folder / "policy", torch.bfloat16)
    here = policy(inputs)[0]
    policy.model.set_attn_implementation("sdpa")
    assert (here - policy(inputs)[0]).abs().max() < 0.05
    exact = load_policy(folder / "policy", torch.float32)(inputs)[0]
    assert (here - exact).abs().mean() < 0.02
    load_policy(folder / "policy", torch.bfloat16).model.save_pretrained(tmp_path)
    assert "sdpa" not in (tmp_path / "config.json").read_text()  # vLLM and transformers choose their own


# Sampling at a temperature, the critic's head and warm-up, and an empty batch


@pytest.mark.parametrize("chunk", [HEAD_LOGITS, 7 * VOCABULARY])
def test_at_a_temperature_log_probabilities_and_entropy_are_those_of_the_scaled_logits(folder, monkeypatch, chunk):
    monkeypatch.setattr("metaalign_rl.learner.models.HEAD_LOGITS", chunk)
    samples, options = make_samples(3), {"temperature": 0.5}
    learner = make_learner(folder, options=options)
    batch = learner.evaluate(make_batch(samples, pad_id=0))
    for column, name in (("logprobs", "policy"), ("ref_logprobs", "reference")):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        for row, (prompt, response) in enumerate(samples):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits / 0.5, -1)[range(len(response)), response]
            found = getattr(batch, column)[row][batch.action_mask[row]]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    cool, warm = (one.train(evaluated(one))["entropy"] for one in (learner, make_learner(folder)))
    assert cool < warm - 0.1


def test_a_bfloat16_critic_has_values_in_float32(folder):
    from metaalign_rl.learner.models import load_critic  # imports deepspeed, which a learner prepares

    inputs = model_inputs(make_batch(make_samples(400), pad_id=0), share_prompts=False)
    half, full = (load_critic(folder / "policy", dtype, seed=0) for dtype in (torch.bfloat16, torch.float32))
    with torch.no_grad():
        values, exact = half(inputs), full(inputs)
    assert values.dtype == torch.float32
    assert len(values.unique()) > 0.95 * len(exact.unique())
    assert torch.corrcoef(torch.stack([values, exact]))[0, 1] > 0.99


def test_the_head_of_a_bfloat16_critic_is_trained(folder):
    learner = make_learner(folder, replace(CONFIG, zero_stage=2), options={"dtype": "bfloat16"})
    head, batch = learner.critic.module.model.score.weight, evaluated(learner)
    before = head.detach().clone()
    losses = [learner.train(batch)["value_loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
    assert not torch.equal(head, before)


def test_in_the_warm_up_of_the_critic_the_policy_does_not_move(folder):
    config = replace(CONFIG, warmup_steps=10)
    learner = make_learner(folder, config, options={"critic_warmup": 2})
    batch, start = evaluated(learner), policy_weights(learner).clone()
    for _ in range(2):
        metrics = learner.train(batch)
        assert {"value_loss", "critic_grad_norm"} <= metrics.keys()
        assert not {"policy_loss", "grad_norm"} & metrics.keys()
        assert torch.equal(policy_weights(learner), start)
    assert (metrics["lr"], metrics["critic_lr"]) == pytest.approx((1e-4, 3e-4))  # its own schedule has not begun
    assert "policy_loss" in learner.train(batch)
    assert not torch.equal(policy_weights(learner), start)


def test_in_the_warm_up_of_the_critic_the_learner_computes_log_probabilities_to_check_the_engines(folder):
    samples = make_samples()
    config = replace(CONFIG, old_logprobs="engine")
    learner = make_learner(folder, config, options={"critic_warmup": 1})
    said = make_batch(samples, 0, [[-9.0] * len(response) for _, response in samples])
    own = make_learner(folder).evaluate(said).logprobs
    found = learner.evaluate(said)
    torch.testing.assert_close(found.logprobs, own)
    learner.train(with_advantages(found))
    assert torch.equal(learner.evaluate(said).logprobs, said.rollout_logprobs)
    learner.train(with_advantages(learner.evaluate(said)))
    rows, logprobs = learner.first_logprobs()
    torch.testing.assert_close(logprobs[rows], own[rows])


def test_the_policy_s_schedule_may_be_shorter_than_the_critic_s(folder):
    config = replace(CONFIG, schedule="linear", total_steps=4)
    learner = make_learner(folder, config, options={"critic_warmup": 2, "policy_steps": 2})
    batch = evaluated(learner)
    rates = [learner.train(batch) for _ in range(4)]
    assert [found["critic_lr"] for found in rates] == pytest.approx([7.5e-4, 5e-4, 2.5e-4, 0])
    assert [found["lr"] for found in rates] == pytest.approx([1e-3, 1e-3, 5e-4, 0])


def test_an_update_on_no_responses_changes_nothing(folder):
    learner = make_learner(folder)
    batch, start = evaluated(learner), policy_weights(learner).clone()
    assert learner.train(batch.select([])) == {"lr": 1e-3, "critic_lr": 1e-3}
    assert torch.equal(policy_weights(learner), start)
    assert learner.version == 1


# LoRA

ADAPTED = replace(CONFIG, lora_rank=4, lora_alpha=8.0, learning_rate=1e-2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_are_trained_and_the_policy_without_them_is_the_reference(folder, tmp_path, stage):
    learner = make_learner(folder, replace(ADAPTED, zero_stage=stage), reference="policy")
    batch = evaluated(learner)
    torch.testing.assert_close(batch.logprobs, make_learner(folder).evaluate(batch).logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.logprobs, batch.ref_logprobs, atol=1e-6, rtol=0)
    losses = [learner.train(batch)["policy_loss"] for _ in range(5)]
    assert losses[-1] < losses[0] - 0.01
    after = learner.evaluate(batch)
    assert (after.logprobs - batch.logprobs).abs().max() > 0.01
    torch.testing.assert_close(after.ref_logprobs, batch.ref_logprobs, atol=1e-6, rtol=0)
    learner.save_policy(tmp_path / "merged")  # a plain checkpoint that computes the same
    merged = load_file(tmp_path / "merged" / FILE)
    assert merged.keys() == load_file(folder / "policy" / FILE).keys()
    assert sorted(path.name for path in (tmp_path / "merged").glob("*.json")) == sorted(
        path.name for path in (folder / "policy").glob("*.json")
    )
    plain = make_learner(folder, policy=str(tmp_path / "merged")).evaluate(batch)
    torch.testing.assert_close(plain.logprobs, after.logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_step_with_adapters_equals_the_uninterrupted_one(folder, tmp_path, stage):
    config = replace(ADAPTED, zero_stage=stage)
    learner = make_learner(folder, config, reference="policy")
    batch = evaluated(learner)
    learner.train(batch)
    learner.save_state(tmp_path / "state")
    expected = learner.train(batch)
    resumed = make_learner(folder, config, reference="policy")
    resumed.load_state(tmp_path / "state")
    assert resumed.train(batch) == expected
    final, repeated = learner.evaluate(batch), resumed.evaluate(batch)
    assert torch.equal(final.logprobs, repeated.logprobs)
    assert torch.equal(final.ref_logprobs, repeated.ref_logprobs)


def test_the_state_with_adapters_does_not_hold_the_other_weights(folder, tmp_path):
    sizes = {}
    for name, config in (("full", CONFIG), ("adapters", ADAPTED)):
        make_learner(folder, config, reference="policy").save_state(tmp_path / name)
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name / "policy").rglob("*"))
    assert sizes["adapters"] < 0.5 * sizes["full"]


def test_engines_get_merged_weights_in_buckets_of_any_size(folder):
    from metaalign_rl.learner.deepspeed_engine import stream_weights

    learner = make_learner(folder, ADAPTED, reference="policy")
    learner.train(evaluated(learner))
    whole = dict(stream_weights(learner.policy.module.model, 10**9))
    start = load_file(folder / "policy" / FILE)
    assert whole.keys() == start.keys()
    moved = {name for name in start if not torch.equal(whole[name], start[name])}
    assert moved == {name for name in start if name.endswith("_proj.weight")}
    for name, tensor in stream_weights(learner.policy.module.model, 1):
        assert torch.equal(tensor, whole[name])


def test_a_missing_or_unsafe_model_folder_is_an_error_that_names_it(folder, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such model folder"):
        make_learner(folder, policy="nowhere")
    tiny_model(tmp_path / "remote", seed=1)
    config = json.loads((tmp_path / "remote" / "config.json").read_text())
    (tmp_path / "remote" / "config.json").write_text(
        json.dumps(config | {"model_type": "own", "auto_map": {"AutoModel": "x.Y"}})
    )
    with pytest.raises(UserError, match="auto_map"):
        make_learner(folder, policy=str(tmp_path / "remote"))
