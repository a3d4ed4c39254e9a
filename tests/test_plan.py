"""The plan: shapes, memory and time by estimate, and the layout that follows from them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metaalign_rl.cli import main
from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import ClusterConfig, Config, ModelConfig, PPOConfig, RolloutConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.units import GIB
from metaalign_rl.plan import check, layout, memory, speed
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
    """PPO of a known size on H100s."""
    config = replace(config, learner=replace(config.learner, **learner))
    shape = find_shape(size).untied()
    return Case(config=config, policy=shape, reward=shape, device=find_device("h100"), work=work_of(config))


# Shapes


@pytest.mark.parametrize(
    ("size", "parameters"),
    # as the models' own pages give them, in billions
    [("0.5B", 0.494), ("1B", 1.236), ("1.5B", 1.544), ("3B", 3.086), ("7B", 7.616), ("8B", 8.030), ("14B", 14.77),
     ("32B", 32.76), ("70B", 70.55), ("72B", 72.71)],
)  # fmt: skip
def test_known_shapes_have_the_real_models_parameters(size: str, parameters: float) -> None:
    assert KNOWN[size].parameters == pytest.approx(parameters * 1e9, rel=0.002)


def test_a_shape_counts_what_transformers_makes(tmp_path: Path) -> None:
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
def test_a_layer_keeps_what_autograd_keeps_of_it(dtype: str) -> None:
    """The bytes that a real model saves for its backward pass, within 5 %."""
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


def test_a_model_that_is_not_estimated_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model 6B: no such checkpoint; give its folder, or a size: 0.5B, "):
        find_shape("6B")
    (tmp_path / "config.json").write_text(json.dumps({"num_local_experts": 8, "hidden_size": 4}))
    with pytest.raises(UserError, match="a mixture of experts; only dense decoders"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4}))
    with pytest.raises(UserError, match="has no 'num_attention_heads'"):
        find_shape(str(tmp_path))


# Memory


def test_zero_3_of_a_7b_on_8_gpus_is_what_the_paper_says() -> None:
    """16 bytes a weight in bfloat16, an eighth of them on each of 8 devices: 7.616e9 * 16 / 8 = 15.23e9 bytes."""
    states = memory.model_states(7.616e9, ranks=8, stage=3, dtype="bfloat16")
    assert sum(states.values()) == pytest.approx(15.23e9, rel=1e-3)
    found = memory.learner_memory(case("7B", world_size=8))
    assert sum(found[part] for part in states) == pytest.approx(15.23e9, rel=1e-3)


def test_the_papers_figure_1() -> None:
    """arXiv:1910.02054, figure 1: a 7.5B model on 64 devices takes 120, 31.4, 16.6 and 1.9 GB by stage."""
    totals = [sum(memory.model_states(7.5e9, 64, stage, "bfloat16").values()) / 1e9 for stage in range(4)]
    assert totals == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.1)


def test_keys_and_values_of_a_token() -> None:
    """Qwen2.5-7B: 2 * 28 layers * 4 heads * 128 numbers of 2 bytes = 56 KiB."""
    assert KNOWN["7B"].kv_bytes("bfloat16") == 57_344
    one, two = (case("7B", replace(WORK, rollout=replace(WORK.rollout, tensor_parallel=n))) for n in (1, 2))
    assert memory.kv_tokens(two) > 2 * memory.kv_tokens(
        one
    )  # each has half the heads, and half the weights beside them


SIZES, RANKS = st.sampled_from(sorted(KNOWN)), st.integers(1, 128)
DTYPES = st.sampled_from(["float32", "bfloat16"])


@settings(max_examples=50, deadline=None)
@given(SIZES, RANKS, RANKS, st.integers(1, 3), st.booleans(), st.sampled_from([512, 4096, 65_536]))
def test_more_gpus_never_need_more_memory_a_device(
    size: str, some: int, more: int, stage: int, checkpointing: bool, tokens: int
) -> None:
    def total(ranks: int) -> float:
        config = replace(WORK, learner=replace(WORK.learner, world_size=ranks), sft=replace(WORK.sft, batch_size=128))
        changed = {"zero_stage": stage, "gradient_checkpointing": checkpointing, "micro_batch_tokens": tokens}
        return sum(memory.learner_memory(case(size, config, **changed)).values())

    some, more = sorted((some, more))
    assert total(more) <= total(some) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(SIZES, RANKS, DTYPES)
def test_a_higher_zero_stage_never_needs_more(size: str, ranks: int, dtype: str) -> None:
    config = replace(WORK, learner=replace(WORK.learner, world_size=ranks), sft=replace(WORK.sft, batch_size=128))
    config = replace(config, model=replace(config.model, dtype=dtype))
    totals = [sum(memory.learner_memory(case(size, config, zero_stage=stage)).values()) for stage in (1, 2, 3)]
    assert totals == sorted(totals, reverse=True)
    if ranks > 1:  # alone, ZeRO's copy of float32 weights comes on top
        states = [sum(memory.model_states(KNOWN[size].parameters, ranks, stage, dtype).values()) for stage in range(4)]
        assert states == sorted(states, reverse=True)


@settings(max_examples=20, deadline=None)
@given(SIZES, st.integers(1, 64))
def test_checkpointing_and_offloading_only_ever_save(size: str, ranks: int) -> None:
    config = replace(WORK, learner=replace(WORK.learner, world_size=ranks), sft=replace(WORK.sft, batch_size=128))
    plain = memory.learner_memory(case(size, config))
    saving = memory.learner_memory(case(size, config, gradient_checkpointing=True, offload_optimizer=True))
    assert all(saving[part] <= plain[part] for part in plain)
    assert saving["optimizer states"] == 0


def test_the_parts_of_a_plan_sum_to_its_totals() -> None:
    from metaalign_rl.plan.page import figures

    found = figures(case("7B"), {})
    learner = memory.learner_memory(case("7B"))
    assert sum(found["memory_gib"]["learner"].values()) * GIB == pytest.approx(sum(learner.values()))
    parts = ("rollout", "reward", "reference", "learn", "transfer")
    assert found["seconds"]["step"] == pytest.approx(sum(found["seconds"][part] for part in parts))
    assert found["seconds"]["rollout"] == pytest.approx(
        found["seconds"]["rollout/prefill"] + found["seconds"]["rollout/decode"]
    )


# Time


def test_training_takes_6_operations_a_weight_and_token() -> None:
    """One epoch over 512 answers of 2,048 tokens on 8 GPUs at the rate of the table, attention and critic apart."""
    found = case(
        "7B", replace(WORK, learner=replace(WORK.learner, world_size=8)), zero_stage=3, micro_batch_tokens=2048
    )
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
def test_more_of_each_is_faster(size: str) -> None:
    few, many = (
        replace(WORK, learner=replace(WORK.learner, world_size=n), rollout=replace(WORK.rollout, engines=n))
        for n in (2, 8)
    )
    before, after = speed.step_seconds(case(size, few)), speed.step_seconds(case(size, many))
    assert after["learn"] < before["learn"]
    assert after["reference"] < before["reference"]
    assert after["rollout"] < before["rollout"]


# Layouts


@pytest.mark.parametrize(("size", "gpus"), [("0.5B", 1), ("1.5B", 2), ("7B", 8), ("7B", 64), ("14B", 32), ("32B", 64)])
def test_a_proposed_layout_is_a_config_that_fits(size: str, gpus: int) -> None:
    devices = Devices(gpus, nodes=-(-gpus // 8))
    before = replace(case(size), nodes=devices.nodes)
    words = layout.propose(before, devices)
    planned = layout.apply(before, words)
    assert layout.fits(planned)
    used = planned.config.learner.world_size, planned.config.rollout.engines * planned.config.rollout.tensor_parallel
    assert (max(used) if planned.config.shares_devices else sum(used) + 1) <= gpus
    assert planned.config.rollout.tensor_parallel <= devices.a_node
    assert not planned.config.shares_devices or used[0] == used[1]


def test_what_cannot_fit_is_refused_with_what_it_would_need() -> None:
    with pytest.raises(UserError, match=r"8 x NVIDIA H100 SXM cannot hold it: a learner needs \d+ GiB at ZeRO-3"):
        layout.propose(case("70B"), Devices(8, 1))


def test_every_device_of_the_table_says_whether_it_was_measured() -> None:
    assert {name for name in names() if find_device(name).measured} == {"cpu"}
    assert all(find_device(name).source for name in names())
    with pytest.raises(UserError, match="--gpu h1000: unknown device; did you mean 'h100'"):
        find_device("h1000")


# Nodes


def test_bundles_that_find_no_node_are_named_with_what_each_node_lacks() -> None:
    nodes = [Node("a", 16, 4, 64), Node("b", 16, 2, 64)]
    engines = [NamedBundle("engine 0", 1, 4), NamedBundle("engine 1", 1, 4)]
    learner = NamedBundle("learner 0", 1, 1)
    ((missing, reason),) = unplaced([learner, *engines], nodes)
    assert missing == engines[1]
    assert reason == "a lacks 4 GPUs; b lacks 2 GPUs"
    assert not unplaced([learner, engines[0], replace(learner, who="learner 1")], nodes)
    assert unplaced([NamedBundle("learner 0", 17, 1)], nodes)[0][1] == "a lacks 1 CPU; b lacks 1 CPU"


# A run


def test_the_estimate_beside_what_a_run_measured(tmp_path: Path) -> None:
    from metaalign_rl.config import loader as config_files

    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.yaml").write_text(config_files.dump(Config()))
    steps = [
        {"step": n, "response_tokens": 7.0, "seconds_rollout": 1.0, "seconds_reward": 0.5, "seconds_reference": 0.4,
         "seconds_learn": learn, "seconds_transfer": 0.04}
        for n, learn in enumerate((9.0, 2.0, 2.0), start=1)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    found = check.compare(run, "cpu", prompt_tokens=40)
    assert found["rollout and reward"]["measured"] == 1.5
    assert found["learn"]["measured"] == 2.0  # the median: a first step that is slow does not count
    case_ = case_of(Config())
    assert case_ is not None
    estimated = speed.step_seconds(replace(case_, work=work_of(Config(), 40, 7)))
    assert found["learn"]["ratio"] == pytest.approx(estimated["learn"] / 2.0)
    assert found["step"]["estimated"] == pytest.approx(estimated["step"])
    assert "learn" in check.render(found)
    with pytest.raises(UserError, match="no metrics.jsonl there"):
        check.compare(tmp_path, "cpu")


def test_the_page_of_the_docs_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "plan.md").read_text()
    command, example = page.partition("$ metaalign-rl ")[2].partition("\n```")[0].replace("\\\n", "").split("\n", 1)
    words = [word.replace("configs/", f"{ROOT}/configs/") for word in command.split()]
    assert main.main(words) == 0
    assert capsys.readouterr().out.rstrip() == example
