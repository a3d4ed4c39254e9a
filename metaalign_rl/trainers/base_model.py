"""The model that SFT starts from: a given checkpoint with the meta-prompt's chat template, or a small new model."""

from pathlib import Path
from typing import TYPE_CHECKING

from metaalign_rl.config.schema import ModelConfig
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import replace_folder
from metaalign_rl.core.prepare import prepare_checkpoint
from metaalign_rl.core.tokenizers import prepare_model, prepare_tokenizer

POSITIONS = 8192  # positions of a new model; more than a run's max_tokens, so that it can be trained further

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_base(config: ModelConfig, demonstrations: list[Row], seed: int, folder: Path) -> None:
    """Write the checkpoint that SFT starts from, with tokenizer and chat template, to `folder`.

    Args:
        demonstrations: their words are the vocabulary of a new model.
        seed: seed of a new model's weights.

    Raises:
        UserError: the checkpoint at `config.path` cannot be used; see `prepare_checkpoint`.
    """
    if config.path:
        try:
            prepare_checkpoint(config.path, folder)
        except UserError as error:
            raise UserError(f"model.path: {error}") from None
    else:
        _write_new(config, demonstrations, seed, folder)


def _write_new(config: ModelConfig, demonstrations: list[Row], seed: int, folder: Path) -> None:
    model, tokenizer = _new(config, demonstrations, seed)
    prepare_tokenizer(tokenizer)
    prepare_model(model, tokenizer)

    def fill(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    replace_folder(folder, fill)


def _new(
    config: ModelConfig, demonstrations: list[Row], seed: int
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from metaalign_rl.data.world.tokenizer import build_tokenizer

    tokenizer = build_tokenizer(text for row in demonstrations for text in _texts(row))
    torch.manual_seed(seed)
    # Not Qwen2: transformers 5 replaces any saved tokenizer of a Qwen2 model by its own class, which loses the words.
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=2 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        # The usual 0.02 is for wide models. A narrow one learns slowly from it.
        initializer_range=config.hidden_size**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(shape)
    _relate_letter_cases(model, tokenizer.get_vocab())
    return model, tokenizer


def _relate_letter_cases(model: "PreTrainedModel", vocabulary: dict[str, int]) -> None:
    """Initialise each capitalised word as its lower-case word plus one common shift, so that both learn together."""
    import torch

    lower = {index: vocabulary[word.lower()] for word, index in vocabulary.items() if word.lower() in vocabulary}
    capitals = [index for index in lower if lower[index] != index]
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        with torch.no_grad():
            shift = torch.randn_like(layer.weight[0]) * model.config.initializer_range
            layer.weight[capitals] = layer.weight[[lower[index] for index in capitals]] + shift


def _texts(row: Row) -> list[str]:
    return [row.system_info, row.user_info, *(message["content"] for message in row.messages), row.response or ""]
