"""The model that SFT starts from: a user's checkpoint with the meta-prompt's template, or a small new one."""

from pathlib import Path
from typing import TYPE_CHECKING

from metaalign_rl.config.schema import ModelConfig
from metaalign_rl.core import meta_prompt
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import replace_folder

POSITIONS = 8192  # of a new model: more than a run's max_tokens, for whoever trains it on

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_base(config: ModelConfig, demonstrations: list[Row], seed: int, folder: Path) -> None:
    """Write the checkpoint that SFT starts from, with tokenizer and chat template, to `folder`.

    Raises:
        UserError: `config.path` cannot be loaded.
    """
    model, tokenizer = _load(config.path) if config.path else _new(config, demonstrations, seed)
    meta_prompt.install(tokenizer)

    def fill(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    replace_folder(folder, fill)


def _load(path: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
        return model, AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"model.path: cannot load {path!r}, taken for {'a folder' if Path(path).is_dir() else 'a hub id'}: {reason}"
        ) from None


def _new(
    config: ModelConfig, demonstrations: list[Row], seed: int
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from metaalign_rl.data.world.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(text for row in demonstrations for text in _texts(row))
    torch.manual_seed(seed)
    # Not Qwen2: for it transformers 5 replaces any saved tokenizer by its own kind, and the words would be lost.
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        initializer_range=config.hidden_size
        ** -0.5,  # the usual 0.02 is for wide models; a narrow one learns slowly from it
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(shape)
    _relate_cases(model, tokenizer.get_vocab())
    return model, tokenizer


def _relate_cases(model: "PreTrainedModel", vocabulary: dict[str, int]) -> None:
    """Start each word in capitals as the small word plus one common shift: what is learnt of one helps the other."""
    import torch

    small = {index: vocabulary[word.lower()] for word, index in vocabulary.items() if word.lower() in vocabulary}
    capitals = [index for index in small if small[index] != index]
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        with torch.no_grad():
            shift = torch.randn_like(layer.weight[0]) * model.config.initializer_range
            layer.weight[capitals] = layer.weight[[small[index] for index in capitals]] + shift


def _texts(row: Row) -> list[str]:
    return [row.system_info, row.user_info, *(message["content"] for message in row.messages), row.response or ""]
