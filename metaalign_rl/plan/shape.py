"""The shape of a dense decoder, and the parameters, operations and bytes that follow from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaalign_rl.config.schema import ModelConfig
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.files import read_json

BYTES = {"float32": 4, "bfloat16": 2}
WORLD_VOCABULARY = 800  # words of the built-in world, about the vocabulary of a new model's tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A decoder with gated feed-forward layers and grouped-query attention, such as Llama and Qwen.

    Attributes:
        hidden: width of the residual stream.
        layers: number of layers.
        heads, kv_heads: query heads; key and value heads.
        head_dim: width of a head.
        intermediate: width of the feed-forward layers.
        vocabulary: number of tokens.
        tied: the output layer shares the embedding's weights.
        bias: the query, key and value projections have biases.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Number of all weights."""
        return self.body + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def body(self) -> int:
        """Number of weights without embedding and output layer: each token is multiplied with all of them."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * queries + 2 * keys) + (queries + 2 * keys if self.bias else 0)
        return self.layers * (attention + 3 * self.hidden * self.intermediate + 2 * self.hidden) + self.hidden

    @property
    def backbone(self) -> int:
        """Number of weights without the output layer, as in a critic or a reward model without its small head."""
        return self.body + self.vocabulary * self.hidden

    def adapter(self, rank: int) -> int:
        """Number of weights of adapters (LoRA) of this rank in all linear layers of the backbone."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        return rank * self.layers * (attention + 3 * (self.hidden + self.intermediate))

    def attention_flops(self, context: int) -> float:
        """Attention's floating-point operations per token, in a forward pass over `context` tokens.

        Scores and weighted values take 2 operations each, per head, dimension and earlier token. A token has
        `context` / 2 earlier tokens on average.
        """
        return 4 * self.layers * self.heads * self.head_dim * context / 2

    def kv_bytes(self, dtype: str) -> int:
        """Bytes of a token's keys and values: 2 * layers * kv_heads * head_dim numbers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES[dtype]

    def layer_activations(self, dtype: str) -> int:
        """Bytes that one layer saves per token for the backward pass, as computed by transformers.

        Counted like arXiv:2205.05198, section 4.1, but for this architecture, without dropout, and with attention that
        saves no scores. It is the sum of the saved tensors of the RMSNorms (in float32), the projections, the
        attention and the gate.
        """
        size = BYTES[dtype]
        norms = 2 * self.hidden * (4 + 2 * size)
        attention = 5 * self.heads * self.head_dim * size  # query, key, value (repeated for each head), output twice
        return norms + attention + 4 * self.intermediate * size


def _known(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, **more: Any
) -> Shape:
    more = {"head_dim": hidden // heads, **more}
    return Shape(hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, intermediate=intermediate,
        vocabulary=vocabulary, **more)  # fmt: skip


# Shapes by size, from the published config.json of the models.
KNOWN = {
    "0.5B": _known(896, 24, 14, 2, 4864, 151_936, tied=True, bias=True),  # Qwen2.5-0.5B
    "1B": _known(2048, 16, 32, 8, 8192, 128_256, tied=True),  # Llama-3.2-1B
    "1.5B": _known(1536, 28, 12, 2, 8960, 151_936, tied=True, bias=True),  # Qwen2.5-1.5B
    "3B": _known(2048, 36, 16, 2, 11_008, 151_936, tied=True, bias=True),  # Qwen2.5-3B
    "7B": _known(3584, 28, 28, 4, 18_944, 152_064, bias=True),  # Qwen2.5-7B
    "8B": _known(4096, 32, 32, 8, 14_336, 128_256),  # Llama-3-8B
    "14B": _known(5120, 48, 40, 8, 13_824, 152_064, bias=True),  # Qwen2.5-14B
    "32B": _known(5120, 64, 40, 8, 27_648, 152_064, bias=True),  # Qwen2.5-32B
    "70B": _known(8192, 80, 64, 8, 28_672, 128_256),  # Llama-3-70B
    "72B": _known(8192, 80, 64, 8, 29_568, 152_064, bias=True),  # Qwen2.5-72B
}


def find_shape(name: str) -> Shape:
    """The shape of a known size, such as 7B, or of a checkpoint.

    Args:
        name: a size, or a checkpoint's folder or config.json.

    Raises:
        UserError: it is neither of them, or not a dense decoder.
    """
    if name.upper() in KNOWN:
        return KNOWN[name.upper()]
    path = Path(name)
    if not path.exists():
        raise UserError(f"--model {name}: no such checkpoint; give its folder, or a size: {', '.join(KNOWN)}")
    return read_shape(path if path.is_file() else path / "config.json")


def new_shape(model: ModelConfig) -> Shape:
    """The shape of the new model that the stage sft makes; see `metaalign_rl.trainers.base_model`."""
    return _known(model.hidden_size, model.layers, model.heads, model.heads, 2 * model.hidden_size, WORLD_VOCABULARY)


def read_shape(path: Path) -> Shape:
    """The shape in a Hugging Face config.json.

    Raises:
        UserError: no such file, or a model that is not a dense decoder.
    """
    config = read_json(path)
    config = config.get("text_config", config)
    if any("expert" in key and config[key] for key in config):
        raise UserError(f"{path}: expected a dense decoder, found a mixture of experts, which cannot be estimated")
    try:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return Shape(
            hidden=hidden,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            tied=config.get("tie_word_embeddings", False),
            bias=config.get("attention_bias", config.get("model_type") == "qwen2"),
        )
    except KeyError as error:
        raise UserError(f"{path}: expected a dense decoder with {error}, found none; it cannot be estimated") from None
