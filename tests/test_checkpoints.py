"""Model folders: where one is found, which are refused, and what is read from them."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, DistilBertConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from metaalign_rl.core import loading
from metaalign_rl.core.checkpoints import (
    disable_dropout,
    drop_own_code,
    find_checkpoint,
    find_policy,
    is_hub_id,
    is_reward_model,
    refuse_own_code,
    require_loadable,
    tensor_names,
    tensors_of,
)
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.loading import require_complete, require_servable

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def checkpoint(folder: Path, architecture: str = "LlamaForCausalLM") -> Path:
    """The least that counts as a checkpoint, its tensors in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    save_file({"b": torch.ones(2)}, folder / "model-1.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "model-2.safetensors")
    weight_map = {"a": "model-2.safetensors", "b": "model-1.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


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
    here = socket.gethostname()
    with pytest.raises(UserError, match=rf"absent: no such model folder on this node \({here}\)"):
        require_loadable(tmp_path / "absent")
    with pytest.raises(UserError, match=f"{tmp_path}: expected a checkpoint, found no config.json"):
        require_loadable(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{tmp_path}: expected {WEIGHTS} or {INDEX}, found neither"):
        require_loadable(tmp_path)


def test_a_hub_id_is_not_a_path() -> None:
    assert is_hub_id("Qwen/Qwen2.5-0.5B") and is_hub_id("gpt2")
    assert not any(map(is_hub_id, ("/shared/model", "./model", "../model", "runs/a/sft", "tests/absent", "~/x")))


# What files alone tell


def pointer(folder: Path, name: str = WEIGHTS) -> None:
    (folder / name).write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 6318840\n")


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/models/base"}))


def quantized(**given: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", quantization_config=given)


def packed(name: str, dtype: torch.dtype) -> Callable[[Path], None]:
    """One layer packed, as by a tool that leaves no word in config.json."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        old = "model.layers.0.mlp.up_proj.weight"
        tensors[old.replace("weight", name)] = tensors.pop(old).to(dtype)
        save_file(tensors, folder / WEIGHTS)

    return change


def cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pointer": (pointer, "found a Git LFS pointer to it; run `git lfs pull`"),
    "a config that is a pointer": (lambda folder: pointer(folder, "config.json"), "run `git lfs pull`"),
    "a tokenizer that is a pointer": (lambda folder: pointer(folder, "tokenizer.json"), "run `git lfs pull`"),
    "an adapter": (adapter, "found only an adapter for /models/base; merge it"),
    "bitsandbytes": (
        quantized(quant_method="bitsandbytes"),
        r"quantized ones \(bitsandbytes\), which cannot be trained",
    ),
    "GPTQ": (quantized(quant_method="gptq", bits=4), r"quantized ones \(gptq\), which cannot be trained"),
    "AWQ": (quantized(quant_method="awq", bits=4), r"quantized ones \(awq\), which cannot be trained"),
    "fp8": (quantized(quant_method="fp8"), r"quantized ones \(fp8\), which cannot be trained"),
    "GPTQ without a word": (packed("qweight", torch.int32), "quantized ones .*qweight in I32"),
    "int8 without a word": (packed("weight", torch.int8), "quantized ones .*weight in I8"),
    "fp8 without a word": (packed("weight", torch.float8_e4m3fn), "quantized ones .*weight in F8_E4M3"),
    "a cut file": (cut, "expected .* bytes, found .*; copy or download it again"),
    "an empty file": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "incomplete one; copy or download it again"),
    "a web page": (lambda folder: (folder / WEIGHTS).write_text("<html>" * 9), "no safetensors file"),
    "a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), "other formats can run code"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete language model of two layers."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be changed."""
    from shutil import copytree

    return copytree(model, tmp_path / "copy")


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_loaded_is_refused_with_its_cause(copied: Path, case: str) -> None:
    change, message = REFUSED[case]
    require_loadable(copied)
    change(copied)
    with pytest.raises(UserError, match=message) as error:
        require_loadable(copied)
    assert "\n" not in str(error.value)


def test_an_adapter_is_named_as_one_also_where_a_policy_is_searched(copied: Path) -> None:
    adapter(copied)
    with pytest.raises(UserError, match="found only an adapter for /models/base; merge it"):
        find_policy(copied)


def test_quantized_weights_can_be_served(copied: Path) -> None:
    quantized(quant_method="gptq")(copied)
    require_servable(copied)


def test_a_file_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="model-2.safetensors: no such file, but .*index.json names it"):
        require_loadable(folder)


# Code in the checkpoint


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"]
)
def test_each_config_that_asks_to_run_code_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path)
    (folder / name).write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}}))
    for refuse in (require_loadable, refuse_own_code):
        with pytest.raises(UserError, match=f"{folder / name}: 'auto_map' asks to run code"):
            refuse(folder)


def test_a_stale_auto_map_of_an_architecture_that_transformers_has_is_dropped(copied: Path) -> None:
    """It is native: the class comes from transformers, and what is saved no longer names the code."""
    edit(copied / "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (copied / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    require_loadable(copied)
    require_complete(copied)
    with pytest.raises(UserError, match="asks to run code"):
        refuse_own_code(copied)  # for programs that would run it
    loaded = LlamaForCausalLM.from_pretrained(copied)

    class Tokenizer:
        init_kwargs = {"auto_map": {}}  # noqa: RUF012

    drop_own_code(loaded, Tokenizer)
    loaded.save_pretrained(copied / "saved")
    assert "auto_map" not in json.loads((copied / "saved" / "config.json").read_text())
    assert Tokenizer.init_kwargs == {}


# All weights


def rename(prefix: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


INCOMPLETE = {
    "compiled": (rename("_orig_mod."), "found none for .*saved compiled: save model._orig_mod"),
    "with its adapter": (rename("base_model.model."), "saved with its adapter: call merge_and_unload"),
    "in a wrapper": (rename("module."), "saved inside of a wrapper: save model.module"),
    "of another model": (rename("encoder."), "but others, such as encoder"),
    "a lost layer": (without("layers.1."), r"found none for 9, such as model.layers.1.*the checkpoint is incomplete"),
    "a lost tensor": (without("layers.0.mlp.up_proj"), "found none for 1, such as model.layers.0.mlp.up_proj.weight"),
    "a lost output layer": (without("lm_head"), "found none for 1, such as lm_head.weight"),
    "a lost embedding": (without("embed_tokens"), "found none for 1, such as model.embed_tokens.weight"),
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_weights_that_transformers_would_fill_at_random_are_refused(copied: Path, case: str) -> None:
    change, message = INCOMPLETE[case]
    require_complete(copied)
    save_file(change(load_file(copied / WEIGHTS)), copied / WEIGHTS, metadata={"format": "pt"})
    require_loadable(copied)
    with pytest.raises(UserError, match=message) as error:
        require_complete(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("difference", [-1, 1, 7])
def test_a_vocab_size_that_does_not_fit_the_weights_is_refused(copied: Path, difference: int) -> None:
    edit(copied / "config.json", vocab_size=50 + difference)
    with pytest.raises(UserError, match=rf"shape \({50 + difference}, 16\), as config.json says, found \(50, 16\)"):
        require_complete(copied)


def test_tied_embeddings_need_no_output_layer_in_the_file(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, tie_word_embeddings=True)).save_pretrained(tmp_path)
    assert "lm_head.weight" not in tensor_names(tmp_path)
    require_complete(tmp_path)


def test_a_reward_model_without_its_head_is_refused(copied: Path, tmp_path: Path) -> None:
    whole = LlamaForSequenceClassification.from_pretrained(copied, num_labels=4)
    whole.config.pad_token_id = 0
    whole.save_pretrained(tmp_path / "whole")
    require_complete(tmp_path / "whole", "SequenceClassification")
    with pytest.raises(UserError, match="found none for 1, such as score.weight"):
        require_complete(copied, "SequenceClassification")


def test_the_comparison_reads_no_weights(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is on the meta device, whatever its size."""
    seen = []
    monkeypatch.setattr(loading, "require_loaded", lambda place, model, info: seen.append(model.device))
    require_complete(copied)
    assert seen == [torch.device("meta")]


def test_a_new_head_is_allowed_and_a_new_backbone_is_not() -> None:
    class Model:
        base_model_prefix = "bert"

    def info(*missing: str) -> dict[str, Any]:
        return {"missing_keys": set(missing), "mismatched_keys": set(), "unexpected_keys": set()}

    loading.require_loaded("x", Model(), info("classifier.weight", "bert.pooler.dense.weight"), new_head=True)
    with pytest.raises(UserError, match="x: expected all weights of Model, found none for 1, such as bert.layer"):
        loading.require_loaded("x", Model(), info("bert.layer.weight"), new_head=True)


# Tensors


def test_tensors_are_read_from_all_files_of_a_folder(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    assert tensor_names(folder) == {"a", "b"}
    assert {name: tensor.tolist() for name, tensor in tensors_of(folder)} == {"b": [1.0, 1.0], "a": [0.0]}


@pytest.mark.parametrize("has_index", [False, True])
def test_other_files_of_weights_are_not_the_models(tmp_path: Path, has_index: bool) -> None:
    folder = checkpoint(tmp_path)
    expected = {"a", "b"}
    if not has_index:
        (folder / INDEX).unlink()
        save_file({"c": torch.ones(1)}, folder / WEIGHTS)
        expected = {"c"}
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "model.fp16.safetensors"):
        save_file({f"of {name}": torch.ones(1)}, folder / name)
    assert tensor_names(folder) == {name for name, _ in tensors_of(folder)} == expected


def test_dropout_is_disabled_also_where_the_saved_config_does_not_name_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "distilbert"}')
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.dropout == DistilBertConfig().dropout > 0
    disable_dropout(config)
    assert config.dropout == config.attention_dropout == config.seq_classif_dropout == 0
