"""The model that SFT starts from: a given checkpoint with the meta-prompt's chat template, or a small new model."""

from pathlib import Path
from typing import TYPE_CHECKING

from metaalign_rl.config.schema import ModelConfig
from metaalign_rl.core import meta_prompt
from metaalign_rl.core.checkpoints import drop_own_code, is_hub_id, require_loadable
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import replace_folder
from metaalign_rl.core.loading import quiet_loading, require_loaded

POSITIONS = 8192  # of a new model; more than a run's max_tokens, so that the model can be trained further

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare_base(config: ModelConfig, demonstrations: list[Row], seed: int, folder: Path) -> None:
    """Write the checkpoint that SFT starts from, with tokenizer and chat template, to `folder`.

    Args:
        demonstrations: their words are the vocabulary of a new model.
        seed: of a new model's weights.

    Raises:
        UserError: the checkpoint at `config.path` cannot be loaded with all of its weights.
    """
    model, tokenizer = _load(config.path) if config.path else _new(config, demonstrations, seed)
    meta_prompt.install(tokenizer)
    drop_own_code(model, tokenizer)

    def fill(target: Path) -> None:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    replace_folder(folder, fill)


def _load(path: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not is_hub_id(path):
        require_loadable(Path(path))
    try:
        with quiet_loading():
            model, loading = AutoModelForCausalLM.from_pretrained(
                path,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # `require_loaded` refuses them
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        kind = "as a folder" if Path(path).is_dir() else "as a hub id"
        raise UserError(f"model.path: cannot load {path!r} {kind}: {reason}; give another checkpoint") from None
    require_loaded(path, model, loading)
    return model, tokenizer


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
