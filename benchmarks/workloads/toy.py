"""Make a random policy of a given size, prompts, a reward function, and the settings of a run on them."""

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from benchmarks.workloads.common import CPUS, prompt
from metaalign_rl.core.files import write_jsonl, write_text

WORDS = ["".join(letters) for letters in product(ascii_lowercase, ascii_lowercase[:12], ascii_lowercase[:12])]
PROMPT_WORDS = 24
REWARD = """def variety(rows, answers):
    return [len(set(answer.split())) / 100 for answer in answers]
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """The size of a Llama. Its vocabulary has about two tokens for each of `words`: lower case and capitals.

    Attributes:
        key_heads: number of key and value heads, of 64 dimensions; 0 for as many as query heads.
        vocabulary: rows of the embeddings, if more than the tokenizer has.
    """

    hidden: int
    layers: int
    wide: int
    words: int = 500
    key_heads: int = 0
    vocabulary: int = 0

    def flops(self, tokens: int, predicted: int, length: int, vocabulary: int) -> float:
        """Count the operations of a forward pass: 2 per weight and token, and attention over half of `length`.

        Args:
            predicted: tokens for which the output layer is computed.
        """
        layers = self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.wide + self.hidden * length)
        return 2.0 * (layers * tokens + self.hidden * vocabulary * predicted)


def make(folder: Path, shape: Shape, prompts: int, context: int) -> dict[str, Any]:
    """Write `policy/`, `data/prompts.jsonl` and `reward.py`. Return the settings for them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from metaalign_rl.data.world.tokenizer import build_tokenizer

    words = WORDS[: shape.words]
    tokenizer, heads = build_tokenizer(words), shape.hidden // 64
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(shape.vocabulary, len(tokenizer)), hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        intermediate_size=shape.wide, num_attention_heads=heads, num_key_value_heads=shape.key_heads or heads,
        max_position_embeddings=context, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    rng = random.Random(0)
    texts = [" ".join(rng.choices(words, k=PROMPT_WORDS)) for _ in range(prompts)]
    write_jsonl(folder / "data" / "prompts.jsonl", (prompt(number, text) for number, text in enumerate(texts)))
    write_text(folder / "reward.py", REWARD)
    return {
        "run.root": str(folder),
        "run.stages": ["data", "ppo"],
        "cluster.cpus": CPUS,
        "cluster.memory_gib": 4,
        "data.source": "jsonl",
        "data.path": str(folder / "data"),
        "model.path": str(folder / "policy"),
        "model.max_tokens": context,
        "reward.function": f"{folder}/reward.py:variety",
        "ppo.model_weight": 0.0,
        "ppo.function_weight": 1.0,
    }
