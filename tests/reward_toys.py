"""Toys for the reward model's tests: a small vocabulary, tiny models, and a rule that they learn in seconds."""

from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from tempfile import mkdtemp

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.meta_prompt import SPECIAL_TOKENS, install

WORDS = (
    "say",
    "red",
    "blue",
    "what",
    "color",
    "is",
    "it",
    "now",
    "tell",
    "me",
    "please",
    "again",
    "stone",
    "the",
)
BYTES = [f"<0x{value:02X}>" for value in range(256)]
QUESTIONS = ("what color is it", "what color is it now", "tell me the color please", "again what color")


def make_tokenizer():
    """A tokenizer with words as single tokens, other text as bytes, and the meta-prompt's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = [(text, 0.0) for text in (*SPECIAL_TOKENS, *BYTES)]
    vocabulary += [(f"▁{word}", -1.0) for word in WORDS]
    core = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", model_max_length=128
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[2:])})
    install(tokenizer)
    return tokenizer


@cache
def language_model() -> Path:
    """The folder of a random causal language model, in place of an SFT model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    # Not Qwen2: there transformers 5 replaces the saved tokenizer by its own class.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = Path(mkdtemp(prefix="reward-toys-")) / "language-model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def encoder(kind: str = "ModernBert") -> Path:
    """The folder of a random encoder. `kind`: the name of a model class in transformers, such as Bert."""
    import torch
    import transformers

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = Path(mkdtemp(prefix="reward-toys-")) / kind
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def reward_model() -> Path:
    """The folder of a random reward model, whose scores differ by more than rounding."""
    import torch

    from reward.model import build, head, save

    torch.manual_seed(0)
    model, tokenizer = build(language_model())
    torch.nn.init.normal_(head(model).weight)
    folder = language_model().parent / "reward-model"
    save(model, tokenizer, folder)
    return folder


def make_row(**values) -> Row:
    """A row with default values, except for the given fields."""
    return Row(
        **{
            "id": "row",
            "family": "priority",
            "relation": "neutral",
            "tier": "dialog",
            "system_info": "",
            "user_info": "",
            "messages": [{"role": "user", "content": "what color is it"}],
            **values,
        }
    )


def color_pairs(count: int, seed: int = 0) -> list[Row]:
    """Labelled pairs, in flips of two rows. Each tier may ask for a color; the system's color counts first."""
    random = Random(seed)
    requests = [pair for pair in product(("", "red", "blue"), repeat=2) if any(pair)]
    rows = []
    for number in range(count // 2):
        system, user = random.choice(requests)
        question = random.choice(QUESTIONS)
        flipped = tuple({"red": "blue", "blue": "red", "": ""}[color] for color in (system, user))
        for side, (s, u) in enumerate(((system, user), flipped)):
            rows.append(_color_pair(f"{seed}-{number}-{side}", f"{seed}-{number}", s, u, question))
    return rows


def _color_pair(name: str, flip: str, system: str, user: str, question: str) -> Row:
    tier, right = ("system", system) if system else ("user", user)
    wrong = {"red": "blue", "blue": "red"}[right]
    conflict = bool(system and user and system != user)
    asked = {tier: color for tier, color in (("system", system), ("user", user)) if color}

    def labels(answer: str) -> dict[str, bool]:
        return {**{tier: answer == color for tier, color in asked.items()}, "dialog": True, "overall": answer == right}

    return make_row(
        id=name,
        relation="conflict" if conflict else "agree" if system and user else f"{tier}_only",
        tier=tier,
        system_info=f"say {system}" if system else "",
        user_info=f"say {user}" if user else "",
        messages=[{"role": "user", "content": question}],
        chosen=right,
        rejected=wrong,
        labels={"chosen": labels(right), "rejected": labels(wrong)},
        tags={"flip": flip, "flip_kind": "tier" if conflict else "preference"},
    )
