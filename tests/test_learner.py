"""The learner: updates by DeepSpeed on a tiny model."""

import json
import multiprocessing
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from learner_toys import (
    CONFIG,
    VOCABULARY,
    evaluated,
    make_learner,
    make_samples,
    poison,
    policy_and_reference,
    policy_weights,
    tiny_model,
    with_advantages,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
)

from metaalign_rl.config.schema import Config, RunConfig
from metaalign_rl.core.dataflow import Batch
from metaalign_rl.core.errors import UserError
from metaalign_rl.learner.batch import make_batch
from metaalign_rl.learner.divergence import Diverged
from metaalign_rl.learner.micro_batches import model_inputs
from metaalign_rl.learner.worker import Learner
from metaalign_rl.runtime.rendezvous import rendezvous

FILE = "model.safetensors"
CAPPED = {"correction": "token", "correction_mode": "clip", "correction_bounds": (0.0, 2.0)}

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy_and_reference(tmp_path_factory.mktemp("models"))


# Updates


def test_log_probabilities_are_those_of_transformers(folder):
    samples = make_samples(3)
    batch = make_learner(folder).evaluate(make_batch(samples, pad_id=0))
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    for row, (prompt, response) in enumerate(samples):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response])).logits[0, :-1]
        expected = torch.log_softmax(logits, -1)[range(len(prompt) - 1, len(logits)), response]
        torch.testing.assert_close(batch.logprobs[row][batch.action_mask[row]], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_output_layer_in_chunks_does_not_change_an_update(folder, monkeypatch, stage):
    config = replace(CONFIG, zero_stage=stage, entropy_coef=0.1)
    whole, parts = make_learner(folder, config), make_learner(folder, config)
    batch = evaluated(whole)
    expected = [whole.train(batch) for _ in range(2)]
    monkeypatch.setattr("metaalign_rl.learner.models.HEAD_LOGITS", 7 * VOCABULARY)
    for name in ("logprobs", "ref_logprobs"):
        torch.testing.assert_close(getattr(evaluated(parts), name), getattr(batch, name))
    for metrics in expected:
        assert parts.train(batch) == pytest.approx(metrics, rel=1e-4, abs=1e-6)


def test_memory_for_logits_does_not_grow_with_the_response(folder, monkeypatch):
    from metaalign_rl.learner.models import load_policy  # imports deepspeed, which a learner prepares

    policy, kept = load_policy(folder / "policy", torch.float32), []
    monkeypatch.setattr("metaalign_rl.learner.models.HEAD_LOGITS", 7 * VOCABULARY)
    inputs = model_inputs(make_batch(make_samples(), pad_id=0), share_prompts=False)
    assert len(inputs.tokens) > 4 * 7

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            is_weight = isinstance(found, Tensor) and found.numel() == policy.model.lm_head.weight.numel()
            if isinstance(found, Tensor) and found.shape[-1:] == (VOCABULARY,) and not is_weight:
                kept.append(found.numel() // VOCABULARY)
            return found

    with Largest():
        logprobs, entropy = policy(inputs, entropy=True, entropy_gradient=True)
        (logprobs.sum() + entropy.sum()).backward()
    assert max(kept) == 7


@pytest.mark.parametrize("changes", [{"final_logit_softcapping": 2.0}, {}])
def test_a_model_s_own_treatment_of_its_logits_is_kept(tmp_path, changes):
    """Gemma 2 caps its logits after the output layer."""
    from metaalign_rl.learner.models import load_policy

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=VOCABULARY, num_hidden_layers=2, num_key_value_heads=2, **sizes, **changes)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    ((prompt, response),) = samples = [([3, 4], [5, 6, 7])]
    found, _ = load_policy(tmp_path, torch.float32)(model_inputs(make_batch(samples, pad_id=0), share_prompts=False))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([prompt + response])).logits[0]
    torch.testing.assert_close(found, logits.log_softmax(-1)[[1, 2, 3], response], atol=1e-5, rtol=0)


def test_sharing_a_pass_over_the_prompt_does_not_change_an_update(folder):
    prompts = [prompt for prompt, _ in make_samples(4)]
    samples = [(prompts[index % 4], response) for index, (_, response) in enumerate(make_samples(12))]
    batch = make_batch(samples, pad_id=0)
    assert len(model_inputs(batch, share_prompts=True).input_ids) == 4
    alone, shared = make_learner(folder), make_learner(folder, replace(CONFIG, share_prompts=True))
    one, other = with_advantages(alone.evaluate(batch)), with_advantages(shared.evaluate(batch))
    for name in ("logprobs", "ref_logprobs", "values"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=0)
    for _ in range(2):
        assert shared.train(one) == pytest.approx(alone.train(one), rel=1e-3, abs=1e-5)


def test_the_engine_s_log_probabilities_can_replace_the_learner_s_pass(folder):
    """The update then gives the learner's own, from before its first step."""
    judge = make_learner(folder)
    samples = make_samples()
    batch = judge.evaluate(make_batch(samples, pad_id=0))
    said = [row[mask].tolist() for row, mask in zip(batch.logprobs, batch.action_mask, strict=True)]
    trusting = make_learner(folder, replace(CONFIG, old_logprobs="engine", epochs=2))
    pass_ = trusting.policy.module.register_forward_pre_hook(lambda *_: pytest.fail("a pass of the policy"))
    taken = trusting.evaluate(make_batch(samples, 0, said))
    off = trusting.evaluate(make_batch(samples, 0, [[value - 0.5 for value in row] for row in said]))
    pass_.remove()
    for name in ("logprobs", "ref_logprobs", "values"):
        torch.testing.assert_close(getattr(taken, name), getattr(batch, name), atol=1e-5, rtol=0)
    fresh = make_learner(folder, replace(trusting.config, minibatch_size=5))
    for learner, given, count in ((trusting, taken, 12), (fresh, off, 4)):
        learner.train(with_advantages(given))
        rows, logprobs = learner.first_logprobs()
        assert len(set(rows)) == count
        mask = batch.action_mask[rows]
        torch.testing.assert_close(logprobs[rows][mask], batch.logprobs[rows][mask], atol=1e-5, rtol=0)


def test_samples_that_share_a_prompt_stay_in_one_minibatch(folder):
    samples = [(prompt, response) for prompt, response in make_samples(4) for _ in range(3)]
    learner = make_learner(folder, replace(CONFIG, share_prompts=True))
    order = learner._shuffled(make_batch(samples, pad_id=0)).tolist()
    assert sorted(order) == list(range(12)) != order
    assert all(len({row // 3 for row in order[start : start + 3]}) == 1 for start in range(0, 12, 3))


def test_an_update_raises_the_probability_of_responses_with_positive_advantage(folder):
    learner = make_learner(folder)
    batch = evaluated(learner)
    metrics = [learner.train(batch) for _ in range(5)]
    after = learner.evaluate(batch)
    ratio = (after.logprobs - batch.logprobs).exp()
    assert (ratio * batch.advantages)[batch.action_mask].mean() > 0.01
    assert metrics[0]["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["policy_loss"] < metrics[0]["policy_loss"] - 0.01
    assert metrics[-1]["value_loss"] < metrics[0]["value_loss"]


def test_dropout_is_off_also_with_gradient_checkpointing(folder):
    tiny_model(folder / "dropout", seed=1, attention_dropout=0.5)
    learner = make_learner(folder, replace(CONFIG, gradient_checkpointing=True), policy="dropout", critic="dropout")
    metrics = learner.train(evaluated(learner))
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_micro_batches_and_zero_stages_do_not_change_an_update(folder, stage):
    whole, parts = (
        make_learner(folder),
        make_learner(folder, replace(CONFIG, micro_batch_tokens=30, zero_stage=stage)),
    )
    start, batch = policy_weights(whole), evaluated(whole)
    for _ in range(2):
        expected, found = whole.train(batch), parts.train(batch)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    if stage < 3:
        moved = policy_weights(whole) - start
        assert (policy_weights(parts) - policy_weights(whole)).norm() < 0.01 * moved.norm()


def test_minibatches_and_epochs_are_optimizer_steps(folder):
    learner = make_learner(folder, replace(CONFIG, minibatch_size=5, epochs=2, warmup_steps=100))
    metrics = learner.train(evaluated(learner))  # 12 samples: 3 minibatches, twice
    assert metrics["lr"] == pytest.approx(1e-3 * 7 / 100)
    assert learner.version == 1


def test_the_entropy_bonus_and_the_off_policy_correction_enter_the_loss(folder):
    rollout = {"rollout_logprobs": [[-20.0] * len(response) for _, response in make_samples()]}
    plain, capped = (
        make_learner(folder),
        make_learner(folder, replace(CONFIG, **CAPPED)),
    )
    bonus = make_learner(folder, replace(CONFIG, entropy_coef=10.0))
    batch = evaluated(plain, **rollout)
    assert capped.train(batch)["grad_norm"] == pytest.approx(2 * plain.train(batch)["grad_norm"], rel=1e-4)
    for _ in range(5):
        metrics = bonus.train(batch)
    assert metrics["entropy"] > plain.train(batch)["entropy"]


@pytest.mark.parametrize("name", ["advantages", "returns"])
def test_a_batch_with_non_finite_numbers_is_an_error(folder, name):
    learner = make_learner(folder)
    batch = evaluated(learner)
    getattr(batch, name)[0, 3:5] = float("nan")
    with pytest.raises(Diverged, match=rf"update 1: {name} are not finite at 2 of \d+ tokens; resume from"):
        learner.train(batch)
    assert learner.version == 0


@pytest.mark.parametrize("stage", [0, 2])
def test_a_non_finite_loss_stops_training_before_the_step(folder, stage):
    learner = make_learner(folder, replace(CONFIG, zero_stage=stage, minibatch_size=6))
    batch = evaluated(learner)
    learner.train(batch)
    with torch.no_grad():
        next(learner.critic.module.parameters())[:] = float("inf")
    before = policy_weights(learner).clone()
    with pytest.raises(Diverged, match="update 2, epoch 1, minibatch 1 of 2: value_loss is nan"):
        learner.train(batch)
    assert torch.equal(policy_weights(learner), before)
    assert learner.version == 1


STAGES = [("float32", 0), ("float32", 1), ("float32", 2), ("float32", 3), *(("bfloat16", stage) for stage in (1, 2, 3))]


@pytest.mark.parametrize(("dtype", "stage"), STAGES)
def test_a_non_finite_gradient_stops_training_before_the_step(folder, dtype, stage):
    learner = make_learner(folder, replace(CONFIG, zero_stage=stage), options={"dtype": dtype})
    batch = evaluated(learner)
    learner.train(batch)
    before = learner.evaluate(batch).logprobs
    poison(learner.policy, float("nan"))
    with pytest.raises(Diverged, match="update 2.*: grad_norm is inf; resume from"):
        learner.train(batch)
    assert learner.version == 1
    assert torch.equal(learner.evaluate(batch).logprobs, before)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_non_finite_gradient_of_the_critic_is_seen_with_offloaded_optimizers(folder, stage):
    learner = make_learner(folder, replace(CONFIG, zero_stage=stage, offload_optimizer=True))
    batch = evaluated(learner)
    poison(learner.critic, float("inf"))
    with pytest.raises(Diverged, match="critic_grad_norm is inf"):
        learner.train(batch)


def test_a_step_that_deepspeed_drops_is_no_version(folder, monkeypatch):
    learner = make_learner(folder, replace(CONFIG, zero_stage=2), options={"dtype": "bfloat16"})
    batch = evaluated(learner)
    poison(learner.policy, float("inf"))
    monkeypatch.setattr("metaalign_rl.learner.optimizer_step.gradient_norm", lambda engine: 1.0)
    with pytest.raises(Diverged, match="DeepSpeed dropped the step of the policy"):
        learner.train(batch)
    assert learner.version == 0


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_weights_that_are_not_finite_are_never_saved(folder, tmp_path, stage):
    learner = make_learner(folder, replace(CONFIG, zero_stage=stage))
    weight = next(learner.policy.module.parameters())
    getattr(weight, "ds_tensor", weight).data.view(-1)[0] = float("nan")
    for save in (learner.save_state, learner.save_policy):
        with pytest.raises(Diverged, match="update 0: the weights .* of the policy are not finite, so nothing is"):
            save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_gradient_spike_stops_training_before_the_step(folder, stage):
    learner = make_learner(folder, replace(CONFIG, zero_stage=stage, spike_limit=50.0))
    batch = evaluated(learner)
    learner.train(batch)
    before = learner.evaluate(batch).logprobs
    batch.advantages *= 1000
    with pytest.raises(Diverged, match=r"update 2.*: grad_norm is .* above learner.spike_limit=50 times"):
        learner.train(batch)
    assert torch.equal(learner.evaluate(batch).logprobs, before)


@pytest.mark.parametrize("stage", [1, 2])
def test_states_in_main_memory_between_updates_do_not_change_them(folder, tmp_path, stage):
    config = replace(CONFIG, zero_stage=stage)
    plain, moving = make_learner(folder, config), make_learner(folder, replace(config, offload_states=True))
    assert moving.policy.optimizer.offloaded_states
    batch = evaluated(plain)
    assert moving.train(batch) == plain.train(batch)
    assert moving.policy.optimizer.offloaded_states
    moving.save_state(tmp_path / "state")
    resumed = make_learner(folder, moving.config)
    resumed.load_state(tmp_path / "state")
    assert resumed.train(batch) == moving.train(batch) == plain.train(batch)
    assert torch.equal(resumed.evaluate(batch).logprobs, plain.evaluate(batch).logprobs)


@pytest.mark.parametrize("changes", [{"zero_stage": 3}, {"zero_stage": 0}, {"offload_optimizer": True}])
def test_states_move_only_where_deepspeed_can(changes):
    with pytest.raises(UserError, match="offload_states"):
        replace(CONFIG, offload_states=True, **changes)


# Ranks


def test_each_group_gets_a_new_rendezvous_file_and_old_ones_are_removed(tmp_path):
    config = Config(run=RunConfig(root=str(tmp_path)))
    first, second = (Path(rendezvous(config).removeprefix("file://")) for _ in range(2))
    assert first != second
    second.touch()
    assert Path(rendezvous(config).removeprefix("file://")).parent == second.parent
    assert second.is_relative_to(tmp_path)
    assert not second.exists()


VARIANTS: dict[str, tuple[dict[str, object], float]] = {  # settings, and the coefficient of the KL in the loss
    "plain": ({}, 0.0),
    "everything": ({"loss_aggregation": "samples", "correction": "sequence"}, 0.1),
    "adapters": ({"lora_rank": 4, "learning_rate": 1e-2}, 0.0),
}
CASES = [(0, "plain"), (1, "everything"), (2, "everything"), (3, "plain"), (2, "adapters"), (3, "adapters")]


def variant(folder: Path, name: str, rank: int = 0, world_size: int = 1, **changes: object) -> Learner:
    """A learner with the settings of a variant. With adapters, the policy without them is the reference."""
    config = replace(CONFIG, **VARIANTS[name][0], **changes)
    return make_learner(folder, config, rank, world_size, reference="policy" if config.lora_rank else "reference")


def run_rank(folder: Path, batch: Batch, rank: int) -> None:
    """Two updates of each case on one of two ranks; rank 0 leaves policy and metrics in `folder`."""
    from metaalign_rl.learner.deepspeed_engine import stream_weights

    torch.set_num_threads(1)
    for stage, name in CASES:
        kl_coef, place = VARIANTS[name][1], folder / f"{name}-{stage}"
        learner = variant(folder, name, rank, 2, zero_stage=stage, micro_batch_tokens=30)
        again = learner.evaluate(batch)
        metrics = [learner.train(batch, kl_coef) for _ in range(2)]
        learner.save_state(place / "state")
        learner.save_policy(place / "updated")
        expected = learner.train(batch, kl_coef)
        learner.load_state(place / "state")
        assert learner.train(batch, kl_coef) == expected
        streamed = {name: t.clone() for name, t in stream_weights(learner.policy.module.model, 5_000)}
        learner.save_policy(place / "streamed")
        for key, tensor in load_file(place / "streamed" / FILE).items():
            torch.testing.assert_close(streamed[key], tensor, rtol=0, atol=0)
        if rank == 0:
            torch.testing.assert_close(again.logprobs, batch.logprobs)
            torch.testing.assert_close(again.values, batch.values)
            (place / "metrics.json").write_text(json.dumps(metrics))


@pytest.mark.slow
def test_two_ranks_compute_the_same_update_as_one_at_every_zero_stage(folder):
    draw = random.Random(1)
    rollout = [[draw.uniform(-5, -3) for _ in response] for _, response in make_samples()]
    batch, start = evaluated(make_learner(folder), rollout_logprobs=rollout), load_file(folder / "policy" / FILE)
    expected = {}
    for name, (_, kl_coef) in VARIANTS.items():
        alone = variant(folder, name)
        expected[name] = [alone.train(batch, kl_coef) for _ in range(2)]
        alone.save_policy(folder / name)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["deepspeed", "reward.training.train"])  # as test_reward_ranks.py has it
    ranks = [processes.Process(target=partial(run_rank, folder, batch, rank)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0, 0]
    for stage, name in CASES:
        metrics = json.loads((folder / f"{name}-{stage}" / "metrics.json").read_text())
        for found, wanted in zip(metrics, expected[name], strict=True):
            assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        updated, one = (load_file(folder / made / FILE) for made in (f"{name}-{stage}/updated", name))
        moved = sum((one[key] - start[key]).norm() for key in start)
        assert sum((one[key] - updated[key]).norm() for key in start) < 0.01 * moved
