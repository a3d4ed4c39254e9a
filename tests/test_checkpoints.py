"""Model folders: where one is found, which are refused, and what is read from them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, DistilBertConfig

from metaalign_rl.core.checkpoints import (
    disable_dropout,
    find_checkpoint,
    find_policy,
    is_reward_model,
    require_loadable,
    tensor_names,
    tensors_of,
)
from metaalign_rl.core.errors import UserError


def checkpoint(folder: Path, architecture: str = "LlamaForCausalLM") -> Path:
    """The least that counts as a checkpoint, its tensors in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    save_file({"b": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "model-2.safetensors")
    return folder


def test_a_runs_folder_means_its_policy_and_a_checkpoints_folder_means_itself(tmp_path: Path) -> None:
    policy = checkpoint(tmp_path / "run" / "policy")
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(policy) == policy
    with pytest.raises(UserError, match=f"{tmp_path}: expected a run's folder with a policy"):
        find_checkpoint(tmp_path)


def test_a_reward_model_is_a_checkpoint_and_no_policy(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "LlamaForSequenceClassification")
    assert is_reward_model(find_checkpoint(model))
    with pytest.raises(UserError, match="expected a policy, found a reward model"):
        find_policy(model)


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    require_loadable(checkpoint(tmp_path / "whole"))
    with pytest.raises(UserError, match="absent: no such model folder"):
        require_loadable(tmp_path / "absent")
    with pytest.raises(UserError, match=f"{tmp_path}: expected a checkpoint, found no config.json"):
        require_loadable(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{tmp_path}: expected \*.safetensors weights, found none"):
        require_loadable(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_each_config_that_asks_to_run_code_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path)
    (folder / name).write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(UserError, match=f"{folder / name}: 'auto_map' asks to run code"):
        require_loadable(folder)


def test_tensors_are_read_from_all_files_of_a_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    assert tensor_names(folder) == {"a", "b"}
    assert {name: tensor.tolist() for name, tensor in tensors_of(folder)} == {"b": [1.0, 1.0], "a": [0.0]}


def test_dropout_is_disabled_also_where_the_saved_config_does_not_name_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.dropout == DistilBertConfig().dropout > 0
    disable_dropout(config)
    assert config.dropout == config.attention_dropout == config.seq_classif_dropout == 0
