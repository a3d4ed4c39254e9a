"""OpenRLHF's own trainer on our prompts: its parser accepts our options, and its labels are complete rows."""

import ast
import importlib.util
import json
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from reward_toys import language_model, make_row, reward_model

from metaalign_rl.config.learner import LearnerConfig
from metaalign_rl.config.schema import ClusterConfig, Config, ModelConfig, PPOConfig, RewardConfig, RolloutConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.rows import parse_row
from metaalign_rl.learner.openrlhf_modules import openrlhf_module
from metaalign_rl.openrlhf import job
from metaalign_rl.openrlhf.flags import FLAGS, TrainerPaths, flags, unsupported_settings

PATHS = TrainerPaths(Path("policy"), Path("prompts.jsonl"), "http://127.0.0.1:8300/get_reward", Path("out"))
CONFIG = Config(model=ModelConfig(dtype="bfloat16", max_tokens=128), ppo=PPOConfig(steps=3, prompts_per_step=4))


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The arguments that OpenRLHF's trainer parses: runs its own code under `__main__`, without the training."""
    spec = importlib.util.find_spec("openrlhf")
    assert spec is not None and spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0], "cli", "train_ppo_ray.py").read_text()
    script = next(node for node in ast.parse(source).body if isinstance(node, ast.If))
    seen: list[Any] = []
    names = {"__name__": "__main__", "argparse": __import__("argparse"), "train": seen.append}
    names["datetime"] = __import__("datetime").datetime
    for name, module in (("utils", ModuleType("utils")), ("utils.config", openrlhf_module("utils.config"))):
        monkeypatch.setitem(sys.modules, f"openrlhf.{name}", module)
    monkeypatch.setattr(sys, "argv", ["train_ppo_ray.py", *words])
    exec(compile(ast.Module([script], []), "train_ppo_ray.py", "exec"), names)
    return seen[0]


def test_openrlhfs_own_parser_accepts_our_options(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(flags(CONFIG, PATHS), monkeypatch)
    assert args.actor.model_name_or_path == args.critic.model_name_or_path == "policy"
    assert args.reward.remote_url == [PATHS.reward]
    assert (args.rollout.batch_size, args.rollout.n_samples_per_prompt) == (4, 4)
    assert (args.train.batch_size, args.train.micro_batch_size) == (16, 16)
    assert args.actor.eps_clip_low_high == [0.2, 0.2]
    assert args.actor.adam.betas == [0.9, 0.95]
    assert args.actor.lr_scheduler == args.critic.lr_scheduler == "constant"
    assert args.algo.advantage.estimator == "gae"
    assert args.vllm.enforce_eager and not args.train.colocate_all


def test_every_setting_in_the_table_reaches_openrlhf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes each setting and compares it with OpenRLHF's value."""
    learner = LearnerConfig(
        learning_rate=0.1, critic_learning_rate=0.2, betas=(0.5, 0.6), weight_decay=0.3, max_grad_norm=0.4,
        schedule="linear", epochs=5, dual_clip=3.0, entropy_coef=0.7, zero_stage=3, offload_optimizer=True,
        gradient_checkpointing=True, value_clip=None, warmup_steps=2,
    )  # fmt: skip
    ppo = replace(CONFIG.ppo, gamma=0.8, lam=0.9, kl_coef=0.11, save_steps=7, kl="adaptive", kl_target=0.12)
    rollout = RolloutConfig(engines=2, max_new_tokens=9, gpu_memory_utilization=0.13)
    config = replace(CONFIG, learner=learner, ppo=ppo, rollout=rollout)
    args = parsed(flags(config, PATHS), monkeypatch)
    for key, names in FLAGS.items():
        section, _, field = key.partition(".")
        ours = getattr(getattr(config, section), field)
        for name in names:
            found: Any = args
            for part in name.removeprefix("--").split("."):
                found = getattr(found, part)
            assert found == (list(ours) if isinstance(ours, tuple) else ours), name
    assert args.algo.kl.target == 0.12
    assert args.critic.value_clip == float("inf")
    assert args.actor.lr_warmup_ratio == 2 / (3 * 5)


def test_options_after_ours_override_them(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed([*flags(CONFIG, PATHS), "--train.seed", "7"], monkeypatch)
    assert args.train.seed == 7


@pytest.mark.parametrize(("gpus", "shared"), [(4, False), (1, True)])
def test_models_share_gpus_if_there_are_too_few(gpus: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    args = parsed(flags(replace(CONFIG, cluster=ClusterConfig(gpus=gpus)), PATHS), monkeypatch)
    assert (args.train.colocate_all, args.vllm.enable_sleep, args.ds.enable_sleep) == (shared,) * 3


def test_two_learners_cannot_share_their_gpus_with_one_engine() -> None:
    with pytest.raises(UserError, match="cluster.gpus: expected 7, found 2; raise it, or set as many"):
        flags(replace(CONFIG, learner=replace(CONFIG.learner, world_size=2), cluster=ClusterConfig(gpus=2)), PATHS)


def test_a_micro_batch_holds_as_many_samples_as_its_tokens_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = LearnerConfig(minibatch_size=12, micro_batch_tokens=5 * CONFIG.model.max_tokens)
    args: Namespace = parsed(flags(replace(CONFIG, learner=learner), PATHS), monkeypatch)
    assert (args.train.batch_size, args.train.micro_batch_size) == (12, 4)  # 4 divides 12, 5 does not


def test_settings_without_an_option_in_openrlhf_are_listed() -> None:
    assert unsupported_settings(CONFIG) == []
    assert unsupported_settings(replace(CONFIG, learner=replace(CONFIG.learner, world_size=2))) == []
    changed = replace(CONFIG, ppo=replace(CONFIG.ppo, normalize_per_tier=True, steps=9))
    assert unsupported_settings(changed) == ["ppo.normalize_per_tier"]


def test_prompts_are_rendered_by_our_template_and_labels_are_complete_rows() -> None:
    rows = [
        make_row(id="a", system_info="say red", tags={"kind": "color"}, chosen="red", rejected="blue"),
        make_row(id="b", user_info="say blue"),
    ]
    found = job.prompts(CONFIG, rows, language_model())
    assert len(found) == CONFIG.ppo.steps * CONFIG.ppo.prompts_per_step
    labels = {example["label"]: example["input"] for example in found}
    read = {label: parse_row(json.loads(label), "label") for label in labels}
    assert {row.id for row in read.values()} == {"a", "b"}
    for label, row in read.items():
        assert (row.system_info or row.user_info) in labels[label]
        assert row.chosen is None
        assert row.tags == ({"kind": "color"} if row.id == "a" else {})


def test_a_prompt_that_openrlhf_would_truncate_is_an_error() -> None:
    with pytest.raises(UserError, match=r"row 'long': expected at most 96 tokens, found \d+; raise model.max_tokens"):
        job.prompts(CONFIG, [make_row(id="long", system_info="say red " * 60)], language_model())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig()}, "model.dtype: expected bfloat16, which OpenRLHF needs, found float32"),
        (
            {"ppo": PPOConfig(checks_weight=1.0)},
            "ppo.checks_weight: expected 0, found 1.0; here only the reward",
        ),
        (
            {"ppo": PPOConfig(model_weight=0.0, checks_weight=1.0)},
            "ppo.checks_weight: expected 0, found 1.0; here only the reward",
        ),
        ({"reward": RewardConfig(path="x", view="tier_blind")}, "reward.view"),
    ],
)
def test_settings_that_openrlhf_does_not_support_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        job.check(replace(CONFIG, **changes), language_model())


def test_a_checkpoint_with_its_own_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"auto_map": {}}')
    with pytest.raises(UserError, match="auto_map"):
        job.check(CONFIG, tmp_path)


def test_the_reward_server_is_the_one_in_the_config_or_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("METAALIGN_REWARD_TOKEN", "secret")
    with job.reward_server(CONFIG, reward_model()) as url:
        assert url.startswith("http://127.0.0.1:")
        label = json.dumps(make_row(system_info="say red").to_json())
        body = {"query": ["ask red"], "prompts": ["ask"], "labels": [label]}
        reply = httpx.post(f"{url}/get_reward", json=body, headers={"Authorization": "Bearer secret"}, timeout=60)
        assert 0 < reply.json()["rewards"][0] < 1
    named = replace(CONFIG, reward=RewardConfig(url="http://scorer:8300/"))
    with job.reward_server(named, None) as url:
        assert url == "http://scorer:8300"


def test_the_reward_servers_token_is_in_no_argument_of_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAALIGN_REWARD_TOKEN", raising=False)
    assert job.endpoint("http://scorer:8300") == "http://scorer:8300/get_reward"
    monkeypatch.setenv("METAALIGN_REWARD_TOKEN", "secret")
    found = job.endpoint("http://scorer:8300")  # our plugin, which reads the token from the environment
    assert found.endswith("reward/plugins/openrlhf.py")
    assert "secret" not in found


def test_the_trainer_finds_our_packages_and_its_own_openrlhf() -> None:
    """The folder of `metaalign_rl`, not one inside it: `metaalign_rl/openrlhf` would hide the trainer's package."""
    assert job.environment()["PYTHONPATH"].split(":")[-1] == str(ROOT)


def test_on_a_cluster_every_node_must_reach_the_reward_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with (
        pytest.raises(UserError, match="reward.url: expected a server that every node"),
        job.reward_server(CONFIG, Path("model")),
    ):
        pass


def test_the_job_starts_the_trainer_with_our_options_and_returns_its_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = tmp_path / "trainer.py"
    trainer.write_text("import sys\nprint('asked:', *sys.argv[1:])\nsys.exit(3)")
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "data" / "prompts.jsonl").write_text(json.dumps(make_row(id="a").to_json()) + "\n")
    (tmp_path / "config.yaml").write_text(
        f"run: {{name: run, root: {tmp_path}}}\nmodel: {{path: {language_model()}, dtype: bfloat16, max_tokens: 96}}\n"
        "reward: {url: http://scorer:8300}\nlearner: {zero_stage: 2}\n"
    )
    words = ["jobs/openrlhf.py", "--config", f"{tmp_path}/config.yaml", "--trainer", str(trainer), "ppo.steps=1"]
    monkeypatch.setattr(sys, "argv", [*words, "--", "--train.seed", "7"])
    assert job.main() == 3
    said = capfd.readouterr().out
    assert "--reward.remote_url http://scorer:8300/get_reward" in said
    assert said.rstrip().endswith("--train.seed 7")
    assert len((tmp_path / "run" / "openrlhf" / "prompts.jsonl").read_text().splitlines()) == 128
