"""The plan: shapes of models, estimates of memory and time, and the proposed layout."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaalign_rl.cli import main
from metaalign_rl.config import loader as config_files
from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import ClusterConfig, Config, ModelConfig, PPOConfig, RolloutConfig, RunConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.units import GIB
from metaalign_rl.plan import check, layout, memory, speed, stages
from metaalign_rl.plan.case import case_of
from metaalign_rl.plan.layout import Devices
from metaalign_rl.plan.rates import find_device, names
from metaalign_rl.plan.shape import KNOWN, find_shape, new_shape, read_shape
from metaalign_rl.plan.work import Case, work_of
from metaalign_rl.preflight.bin_packing import NamedBundle, Node, unplaced

ROOT = Path(__file__).resolve().parents[1]
WORK = Config(
    cluster=ClusterConfig(gpus=8),
    model=ModelConfig(max_tokens=2048, dtype="bfloat16"),
    rollout=RolloutConfig(max_new_tokens=512, gpu_memory_utilization=0.9),
    learner=LearnerConfig(zero_stage=3, minibatch_size=128),
    ppo=PPOConfig(prompts_per_step=128, samples_per_prompt=4),
)


def case(size: str = "7B", config: Config = WORK, **learner: Any) -> Case:
    """PPO with a model of a known size on H100s."""
    config = replace(config, learner=replace(config.learner, **learner))
    shape = find_shape(size)
    return Case(config=config, policy=shape, reward=shape, device=find_device("h100"), work=work_of(config))


# Shapes


@pytest.mark.parametrize(
    ("size", "parameters"),
    # in billions, from the models' own pages
    [("0.5B", 0.494), ("1B", 1.236), ("1.5B", 1.544), ("3B", 3.086), ("7B", 7.616), ("8B", 8.030), ("14B", 14.77),
     ("32B", 32.76), ("70B", 70.55), ("72B", 72.71)],
)  # fmt: skip
def test_known_shapes_have_the_parameters_of_the_real_models(size: str, parameters: float) -> None:
    assert KNOWN[size].parameters == pytest.approx(parameters * 1e9, rel=0.002)


def test_a_shape_has_as_many_parameters_as_the_model_in_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 96, "vocab_size": 100}  # fmt: skip
    for config, model in ((LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)):
        for tied in (False, True):
            made = config(**sizes, tie_word_embeddings=tied)
            made.save_pretrained(tmp_path)
            with torch.device("meta"):
                real = sum(parameter.numel() for parameter in model(made).parameters())
            assert read_shape(tmp_path / "config.json").parameters == real


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_s_activations_are_those_that_autograd_saves(dtype: str) -> None:
    """Within 5 % of the bytes that a real model saves for its backward pass."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = new_shape(ModelConfig(hidden_size=128, layers=3, heads=4))
    sizes = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    body = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=800)).to(getattr(torch, dtype)).model
    weights = {parameter.untyped_storage().data_ptr() for parameter in body.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        return kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        body(input_ids=torch.randint(0, 800, (4, 128)), use_cache=False)
    saved = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    assert memory.activations(shape, 4 * 128, dtype, checkpointing=False) == pytest.approx(saved, rel=0.05)


def test_a_model_that_cannot_be_estimated_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model 6B: no such checkpoint; give its folder, or a size: 0.5B, "):
        find_shape("6B")
    (tmp_path / "config.json").write_text(json.dumps({"num_local_experts": 8, "hidden_size": 4}))
    with pytest.raises(UserError, match="expected a dense decoder, found a mixture of experts"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(UserError, match="expected a dense decoder with 'num_attention_heads', found none"):
        find_shape(str(tmp_path))


# Memory


def test_zero_3_of_a_7b_model_on_8_gpus_agrees_with_the_paper() -> None:
    """16 bytes per weight in bfloat16, an eighth of them on each of 8 devices: 7.616e9 * 16 / 8 = 15.23e9 bytes."""
    states = memory.model_states(7.616e9, ranks=8, stage=3, dtype="bfloat16")
    assert sum(states.values()) == pytest.approx(15.23e9, rel=1e-3)
    found = memory.learner_memory(case("7B", world_size=8))
    assert sum(found[part] for part in states) == pytest.approx(15.23e9, rel=1e-3)


def test_memory_by_zero_stage_agrees_with_figure_1_of_the_paper() -> None:
    """arXiv:1910.02054, figure 1: a 7.5B model on 64 devices needs 120, 31.4, 16.6 and 1.9 GB by stage."""
    totals = [sum(memory.model_states(7.5e9, 64, stage, "bfloat16").values()) / 1e9 for stage in range(4)]
    assert totals == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.1)


def test_the_bytes_of_a_token_in_the_kv_cache() -> None:
    """Qwen2.5-7B: 2 * 28 layers * 4 heads * 128 numbers of 2 bytes = 56 KiB."""
    assert KNOWN["7B"].kv_bytes("bfloat16") == 57_344
    one, two = (case("7B", replace(WORK, rollout=replace(WORK.rollout, tensor_parallel=n))) for n in (1, 2))
    # Each device has half the heads and half the weights.
    assert memory.kv_tokens(two) > 2 * memory.kv_tokens(one)


def test_with_lora_only_adapters_have_gradients_and_there_is_no_reference() -> None:
    full, lora = (memory.learner_memory(case("7B", lora_rank=rank, world_size=8)) for rank in (0, 16))
    assert KNOWN["7B"].adapter(16) == 40_370_176  # as peft counts them for Qwen2.5-7B
    assert "reference" not in lora
    assert lora["optimizer states"] < 0.01 * full["optimizer states"]
    assert lora["weights"] == pytest.approx(full["weights"], rel=0.01)


SIZES, RANKS = st.sampled_from(sorted(KNOWN)), st.integers(1, 128)
DTYPES = st.sampled_from(["float32", "bfloat16"])


@settings(max_examples=50, deadline=None)
@given(SIZES, RANKS, RANKS, st.integers(1, 3), st.booleans(), st.sampled_from([512, 4096, 65_536]))
def test_more_gpus_never_need_more_memory_per_device(
    size: str, some: int, more: int, stage: int, checkpointing: bool, tokens: int
) -> None:
    def total(ranks: int) -> float:
        config = replace(WORK, sft=replace(WORK.sft, batch_size=ranks))
        changed = {"zero_stage": stage, "gradient_checkpointing": checkpointing, "micro_batch_tokens": tokens}
        return sum(memory.learner_memory(case(size, config, world_size=ranks, **changed)).values())

    some, more = sorted((some, more))
    assert total(more) <= total(some) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(SIZES, RANKS, DTYPES)
def test_a_higher_zero_stage_never_needs_more_memory(size: str, ranks: int, dtype: str) -> None:
    config = replace(WORK, learner=replace(WORK.learner, world_size=ranks), sft=replace(WORK.sft, batch_size=ranks))
    config = replace(config, model=replace(config.model, dtype=dtype))
    totals = [sum(memory.learner_memory(case(size, config, zero_stage=stage)).values()) for stage in (1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    if ranks > 1:  # on one rank, ZeRO adds its float32 copy of the weights
        states = [sum(memory.model_states(KNOWN[size].parameters, ranks, stage, dtype).values()) for stage in range(4)]
        assert states == sorted(states, reverse=True)


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(1, 64))
def test_checkpointing_and_offloading_never_need_more_memory(size: str, ranks: int) -> None:
    config = replace(WORK, learner=replace(WORK.learner, world_size=ranks), sft=replace(WORK.sft, batch_size=ranks))
    plain = memory.learner_memory(case(size, config))
    saving = memory.learner_memory(case(size, config, gradient_checkpointing=True, offload_optimizer=True))
    assert all(saving[part] <= plain[part] for part in plain)
    assert saving["optimizer states"] == 0


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(1, 64), st.sampled_from((1, 2)))
def test_states_in_main_memory_leave_engines_more_room_and_cost_time(size: str, ranks: int, stage: int) -> None:
    config = replace(WORK, sft=replace(WORK.sft, batch_size=ranks))
    staying = case(size, config, world_size=ranks, zero_stage=stage)
    moving = case(size, config, world_size=ranks, zero_stage=stage, offload_states=True)
    moved = memory.resting_memory(staying) - memory.resting_memory(moving)
    trained = staying.policy.parameters + staying.has_critic * staying.policy.backbone
    assert moved == pytest.approx(12 * trained / ranks)  # Adam's two moments and the float32 weights
    hosts = [memory.host_memory(each)["learners"] for each in (staying, moving)]
    assert hosts[1] - hosts[0] == pytest.approx(ranks * moved)
    assert speed.learn_seconds(moving) > speed.learn_seconds(staying)
    assert memory.learner_memory(moving) == memory.learner_memory(staying), "while it learns, nothing changes"


def test_the_parts_of_a_plan_add_up_to_its_totals() -> None:
    from metaalign_rl.plan.page import to_json

    found = to_json(case("7B"), {})
    learner = memory.learner_memory(case("7B"))
    assert sum(found["memory_gib"]["learner"].values()) * GIB == pytest.approx(sum(learner.values()))
    parts = ("rollout", "reward", "reference", "learn", "transfer")
    assert found["seconds"]["step"] == pytest.approx(sum(found["seconds"][part] for part in parts))
    assert found["seconds"]["rollout"] == pytest.approx(
        found["seconds"]["rollout/prefill"] + found["seconds"]["rollout/decode"]
    )


# Time


def test_training_takes_6_operations_per_weight_and_token() -> None:
    """One epoch over 512 responses of 2,048 tokens on 8 GPUs at the rate of the table, with attention and critic."""
    found = case("7B", world_size=8, zero_stage=3, micro_batch_tokens=2048)
    alone = replace(found, device=replace(found.device, seconds=dict.fromkeys(found.device.seconds, 0.0)))
    tokens, body = 512 * 2048, found.policy.body
    heads = 2 * body * tokens + found.policy.attention_flops(2048) * tokens
    output = 2 * found.policy.vocabulary * found.policy.hidden * 512 * 512
    seconds = 3 * (2 * heads + output) / found.device.train["bfloat16"] / 8  # policy and critic; the policy's logits
    update = 2 * (found.policy.parameters + found.policy.backbone) * 18 / 8 * 4 / found.device.bandwidth
    assert speed.learn_seconds(alone) == pytest.approx(seconds + update, rel=1e-6)


def test_decoding_one_sequence_is_bound_by_reading_the_weights() -> None:
    one = replace(WORK, ppo=replace(WORK.ppo, prompts_per_step=1, samples_per_prompt=1))
    found = case("7B", one)
    least = 512 * 2 * found.policy.parameters / found.device.bandwidth
    assert least < speed.rollout_seconds(found)["decode"] < 1.6 * least


@pytest.mark.parametrize("size", ["0.5B", "7B"])
def test_more_learners_and_engines_are_faster(size: str) -> None:
    few, many = (case(size, replace(WORK, rollout=replace(WORK.rollout, engines=n)), world_size=n) for n in (2, 8))
    before, after = speed.step_seconds(few), speed.step_seconds(many)
    assert after["learn"] < before["learn"]
    assert after["reference"] < before["reference"]
    assert after["rollout"] < before["rollout"]


# Layouts


@pytest.mark.parametrize(("size", "gpus"), [("0.5B", 1), ("1.5B", 2), ("7B", 8), ("7B", 64), ("14B", 32), ("32B", 64)])
def test_a_proposed_layout_is_a_valid_config_that_fits(size: str, gpus: int) -> None:
    devices = Devices(gpus, nodes=-(-gpus // 8))
    before = replace(case(size), nodes=devices.nodes)
    words = layout.propose(before, devices)
    planned = layout.apply(before, words)
    assert layout.fits(planned)
    used = planned.config.learner.world_size, planned.config.rollout.engines * planned.config.rollout.tensor_parallel
    assert (max(used) if planned.config.shares_devices else sum(used) + 1) <= gpus
    assert planned.config.rollout.tensor_parallel <= devices.gpus_per_node
    assert not planned.config.shares_devices or used[0] == used[1]


@pytest.mark.parametrize(("size", "gpus"), [("0.5B", 1), ("7B", 8), ("7B", 64)])
def test_a_proposal_covers_sft_and_the_reward_models_training(size: str, gpus: int) -> None:
    before = replace(case(size), nodes=-(-gpus // 8))
    planned = layout.apply(before, layout.propose(before, Devices(gpus, nodes=before.nodes)))
    assert stages.estimated_stages(planned.config) == ["sft", "reward", "ppo"]
    for stage in ("sft", "reward"):
        assert stages.training_memory(planned, stage) <= layout.MAX_FILL * 79 * GIB
    config = planned.config
    assert config.sft.batch_size % (config.learner.world_size * config.sft.gradient_accumulation) == 0
    assert config.reward.devices <= max(1, gpus)


def test_a_training_that_fits_no_gpu_is_named_in_the_plan() -> None:
    """Reward training keeps all weights in float32 on each GPU: 14B need 56 GB."""
    from metaalign_rl.plan.page import render

    before = replace(case("14B"), nodes=4)
    words = layout.propose(before, Devices(32, nodes=4))
    page = render(layout.apply(before, words), words)
    assert "The stage reward does not fit: it needs" in page
    assert "The stage sft does not fit" not in page


@pytest.mark.parametrize(
    ("name", "size", "gpu"),
    [("nodes_colocated", "7B", "h100"), ("nodes_disaggregated", "7B", "h100"), ("one_node", "7B", "h100"),
     ("one_gpu", "0.5B", "a100-40gb")],
)  # fmt: skip
def test_every_stage_of_a_shipped_config_fits_by_the_plan_s_own_formulas(name: str, size: str, gpu: str) -> None:
    config = config_files.load(Config, ROOT / "configs" / f"{name}.yaml", [])
    shape, device = find_shape(size), find_device(gpu)
    found = Case(config=config, policy=shape, reward=shape, device=device, work=work_of(config))
    assert device.memory_gib is not None
    for stage in ("sft", "reward"):
        assert stages.training_memory(found, stage) <= layout.MAX_FILL * device.memory_gib * GIB


def test_checkpointing_and_accumulation_lower_the_memory_of_both_trainings() -> None:
    for stage, section in (("sft", "sft"), ("reward", "reward")):
        plain = stages.training_memory(case("0.5B"), stage)
        for changes in ({"gradient_checkpointing": True}, {"gradient_accumulation": 4}):
            config = replace(WORK, **{section: replace(getattr(WORK, section), **changes)})
            assert stages.training_memory(case("0.5B", config), stage) < plain


def test_adapters_of_the_reward_model_need_few_states() -> None:
    config = replace(WORK, reward=replace(WORK.reward, lora_rank=16))
    full, adapters = (stages.reward_training_memory(case("7B", one)) for one in (WORK, config))
    assert adapters["weights"] == full["weights"]
    assert adapters["optimizer states"] < 0.02 * full["optimizer states"]


def test_a_model_that_fits_no_layout_is_an_error_with_the_memory_it_needs() -> None:
    with pytest.raises(UserError, match=r"8 x NVIDIA H100 SXM are too small: a learner needs \d+ GiB at ZeRO-3"):
        layout.propose(case("70B"), Devices(8, 1))


def test_every_device_in_the_table_says_whether_it_was_measured() -> None:
    assert {name for name in names() if find_device(name).measured} == {"cpu"}
    assert all(find_device(name).source for name in names())
    with pytest.raises(UserError, match="--gpu h1000: unknown device; did you mean 'h100'"):
        find_device("h1000")


# Nodes


def test_bundles_that_fit_no_node_are_listed_with_what_each_node_lacks() -> None:
    nodes = [Node("a", 16, 4, 64), Node("b", 16, 2, 64)]
    engines = [NamedBundle("engine 0", 1, 4), NamedBundle("engine 1", 1, 4)]
    learner = NamedBundle("learner 0", 1, 1)
    ((missing, reason),) = unplaced([learner, *engines], nodes)
    assert missing == engines[1]
    assert reason == "a lacks 4 GPUs; b lacks 2 GPUs"
    assert not unplaced([learner, engines[0], replace(learner, who="learner 1")], nodes)
    assert unplaced([NamedBundle("learner 0", 17, 1)], nodes)[0][1] == "a lacks 1 CPU; b lacks 1 CPU"


# A run


def test_the_estimate_is_compared_with_a_run(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    run.mkdir()
    # The run's folder is on both sides: the estimate reads the model's shape from a checkpoint in it, if there is one.
    config = Config(run=RunConfig(root=str(tmp_path), name="mine"))
    (run / "config.yaml").write_text(config_files.dump(config))
    steps = [
        {"step": n, "response_tokens": 7.0, "seconds_rollout": 1.0, "seconds_reward": 0.5, "seconds_reference": 0.4,
         "seconds_learn": learn, "seconds_transfer": 0.04}
        for n, learn in enumerate((9.0, 2.0, 2.0), start=1)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    found = check.compare(run, "cpu", prompt_tokens=40)
    assert found["rollout and reward"]["measured"] == 1.5
    assert found["learn"]["measured"] == 2.0  # the median, so that a slow first step does not count
    case_ = case_of(config)
    assert case_ is not None
    estimated = speed.step_seconds(replace(case_, work=work_of(config, 40, 7)))
    assert found["learn"]["ratio"] == pytest.approx(estimated["learn"] / 2.0)
    assert found["step"]["estimated"] == pytest.approx(estimated["step"])
    assert "learn" in check.render(found)
    with pytest.raises(UserError, match="no metrics.jsonl there"):
        check.compare(tmp_path, "cpu")


def test_the_memory_of_a_command_is_that_of_all_its_processes() -> None:
    import os
    import subprocess
    import sys

    from benchmarks import plan_memory

    child = "import time; data = b'x' * 2**25; print(1, flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"PLAN_MEMORY": "mine"}
    with subprocess.Popen([sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = plan_memory.marked(b"PLAN_MEMORY=mine")
        assert sum(map(plan_memory.pss, found)) > 2**25
        for folder in found:
            os.kill(int(folder.name), 9)
    assert len(found) == 2
    assert plan_memory.pss(found[0]) == 0


def test_the_docs_show_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "plan.md").read_text()
    command, example = page.partition("$ metaalign-rl ")[2].partition("\n```")[0].replace("\\\n", "").split("\n", 1)
    words = [word.replace("configs/", f"{ROOT}/configs/") for word in command.split()]
    assert main.main(words) == 0
    assert capsys.readouterr().out.rstrip() == example
