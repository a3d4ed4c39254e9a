"""`prepare`: what it changes in a model with a published chat template, and which models it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
import torch
from conftest import Command
from gguf import GGUFWriter
from published_templates import published
from reward_toys import make_row
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from metaalign_rl.chat.session import ChatPolicy
from metaalign_rl.core.checkpoints import INDEX, WEIGHTS
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import MetaPrompt
from metaalign_rl.core.prepare import prepare_checkpoint, prepared_policy
from metaalign_rl.core.tokenizers import load_tokenizer, read_tokenizer
from metaalign_rl.trainers.sft import load_model
from reward import Scorer
from reward import model as reward_model
from reward.training.examples import collate, make_example

QUESTION = [{"role": "user", "content": "What is two and two?"}]


def checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast | None = None, spare: int = 0, **config: Any) -> Path:
    """A Llama of two thin layers, as published: by default with Qwen 2.5's template and tied embeddings.

    Args:
        spare: embeddings that no token uses yet.
    """
    tokenizer = tokenizer or published("qwen2_5")
    torch.manual_seed(0)
    shape = LlamaConfig(
        **{"tie_word_embeddings": True, "eos_token_id": tokenizer.eos_token_id} | config,
        vocab_size=len(tokenizer) + spare, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def generation(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text())


def test_the_weights_are_copied_and_generation_stops_at_the_end_of_a_turn(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", spare=16)
    changes = prepare_checkpoint(str(base), tmp_path / "new")
    assert (tmp_path / "new" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "new")
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    assert generation(tmp_path / "new")["eos_token_id"] == ends
    assert "generation stops at <|im_end|>, which ends a turn" in changes
    assert prepare_checkpoint(str(tmp_path / "new"), tmp_path / "again") == []


@pytest.mark.parametrize("padding", [None, "<|im_end|>", "</s>"])
def test_the_padding_token_is_in_no_text(tmp_path: Path, padding: str | None) -> None:
    tokenizer = published("qwen2_5")
    tokenizer.pad_token = padding
    prepare_checkpoint(str(checkpoint(tmp_path / "base", tokenizer)), tmp_path / "new")
    prepared = load_tokenizer(tmp_path / "new")
    assert prepared.pad_token == "<pad>"
    assert len(load_file(tmp_path / "new" / WEIGHTS)["model.embed_tokens.weight"]) == len(prepared)


def test_a_reward_model_is_trained_and_scores_at_the_same_token(tmp_path: Path) -> None:
    tokenizer = published("llama3")
    tokenizer.pad_token = "<|eot_id|>"
    model, prepared = reward_model.build(checkpoint(tmp_path / "base", tokenizer))
    example = make_example(make_row(chosen="Yes, it is.", rejected="No."), prepared, 200)
    batch = collate([example], prepared.pad_token_id)
    with torch.no_grad():
        trained = model.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(trained, Scorer(model, prepared, 200).logits(list(example.texts)), rtol=0, atol=1e-5)


def test_a_base_model_without_a_chat_template_gets_the_projects_own_format(tmp_path: Path) -> None:
    tokenizer = published("qwen2_5")
    tokenizer.chat_template = None
    base = checkpoint(tmp_path / "base", tokenizer)
    changes = prepare_checkpoint(str(base), tmp_path / "new")
    assert any("added <System Info>, <User Info>" in change for change in changes)
    prepared = load_tokenizer(tmp_path / "new")
    assert MetaPrompt("be brief").render(prepared, QUESTION).startswith("<System Info>be brief<User>What is")
    before, after = (load_file(folder / WEIGHTS)["model.embed_tokens.weight"] for folder in (base, tmp_path / "new"))
    torch.testing.assert_close(after[: len(before)], before)
    torch.testing.assert_close(after[-1], before.mean(0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["old.table", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_tensors_that_the_model_does_not_use_are_left_out(tmp_path: Path, name: str) -> None:
    base = checkpoint(tmp_path / "base")
    weights = load_file(base / WEIGHTS)
    save_file(weights | {name: torch.ones(3)}, base / WEIGHTS, {"format": "pt"})
    prepare_checkpoint(str(base), tmp_path / "new")
    assert load_file(tmp_path / "new" / WEIGHTS).keys() == weights.keys()


def test_shards_are_copied_with_their_index_and_nothing_else_is(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", spare=16)
    (base / "consolidated.safetensors").write_bytes(b"other weights")
    (base / "consolidated.safetensors.index.json").write_text("{}")
    prepare_checkpoint(str(base), tmp_path / "one")
    assert [file.name for file in sorted((tmp_path / "one").glob("*.safetensors*"))] == [WEIGHTS]
    (base / WEIGHTS).rename(base / "a.safetensors")
    names = load_file(base / "a.safetensors").keys()
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "a.safetensors")}))
    prepare_checkpoint(str(base), tmp_path / "shards")
    assert [file.name for file in sorted((tmp_path / "shards").glob("*.safetensors*"))] == ["a.safetensors", INDEX]
    AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../base/a.safetensors")}))
    with pytest.raises(UserError, match="expected names of files in its folder"):
        prepare_checkpoint(str(base), tmp_path / "outside")


def test_a_model_with_missing_weights_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    weights = load_file(base / WEIGHTS)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / WEIGHTS, {"format": "pt"})
    with pytest.raises(UserError, match="found none for 1, such as model.layers.1.mlp.up_proj.weight"):
        prepare_checkpoint(str(base), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a complete GGUF file"),
        (b"<html>not found</html>", "expected a complete GGUF file"),
        (b"GGUF\x03\x00\x00\x00\x10\x01", "expected a complete GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer"),
    ],
    ids=["empty", "a web page", "cut off", "a pointer"],
)
def test_a_gguf_file_that_is_not_complete_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"model.gguf: .*{message}"):
        prepare_checkpoint(str(file), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_with_tekken_json_is_read_from_tokenizer_json(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tekken_240911.json", base / "tekken.json")
    prepare_checkpoint(str(base), tmp_path / "new")
    assert load_tokenizer(tmp_path / "new").convert_tokens_to_ids("<|im_end|>") is not None
    (base / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="found only tekken.json"):
        read_tokenizer(base)


def test_the_tokenizer_of_a_reward_model_adds_no_second_first_token(tmp_path: Path) -> None:
    tokenizer = published("llama3")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    model, prepared = reward_model.build(checkpoint(tmp_path / "base", tokenizer))
    reward_model.save(model, prepared, tmp_path / "reward")
    saved = load_tokenizer(tmp_path / "reward")
    text = MetaPrompt("be brief").render(saved, QUESTION, "Four.")
    assert saved(text)["input_ids"] == saved.encode(text, add_special_tokens=False)
    assert saved(text)["input_ids"].count(saved.bos_token_id) == 1


def test_sft_trains_float32_weights_whatever_the_checkpoint_has(tmp_path: Path) -> None:
    assert load_model(checkpoint(tmp_path / "base")).dtype == torch.float32


def test_an_unprepared_model_is_prepared_once_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = checkpoint(tmp_path / "base")
    folder = prepared_policy(base)
    assert "is not prepared; prepared copy" in capsys.readouterr().out
    assert folder.is_relative_to(tmp_path / "cache")
    assert prepared_policy(base) == folder
    assert prepared_policy(folder) == folder
    assert capsys.readouterr().out == ""
    assert isinstance(ChatPolicy(base, max_new_tokens=3).answer(MetaPrompt(), QUESTION).answer, str)


def test_prepare_refuses_a_folder_that_is_in_use(cli: Command, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    done = cli("prepare", str(base), "--output", str(base))
    assert done.returncode != 0
    assert "expected a new or empty folder" in done.stderr
    done = cli("prepare", str(base), "--output", str(tmp_path / "new"))
    assert done.returncode == 0
    assert f"prepared model: {tmp_path / 'new'}\n" in done.stdout


def test_a_gguf_file_without_its_last_tensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="model.gguf: expected a complete GGUF file, found a damaged one"):
        prepare_checkpoint(str(file), tmp_path / "new")


def test_a_gguf_file_that_only_prepare_can_read_is_named_with_the_command(cli: Command, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    for model in (file, tmp_path):
        done = cli("chat", str(model))
        assert done.returncode != 0
        assert f"convert model.gguf first with `metaalign-rl prepare {file} --output DIR`" in done.stderr
    assert "no such file" in cli("prepare", str(tmp_path / "none.gguf"), "--output", str(tmp_path / "new")).stderr
