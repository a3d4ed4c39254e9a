"""Tokenizers with the chat templates of published models, which TRL ships, and vocabularies made here."""

import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(find_spec("trl").submodule_search_locations[0]) / "chat_templates"
LISTS_OF_PARTS = ("idefics3", "llava_next", "smolvlm")  # their messages must be lists of texts and pictures
FILES = (path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
NAMES = sorted(set(FILES) - set(LISTS_OF_PARTS))
FAMILIES = ("qwen2_5", "llama3", "gemma", "gemma3", "phi3", "deepseekv3", "qwen3")
TEXT = "\n\n".join(path.read_text() for path in sorted((Path(__file__).parents[1] / "docs").glob("*.md"))[:8])
LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
_TOKEN = re.compile(r"<[|\uff5c][^|\uff5c<>{}'\"]+[|\uff5c]>|</?[a-z][a-z_]*>|\[/?[A-Z][A-Z_]+\]|<\|?[a-z_]+\|?>")


def _byte_level(split: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _sentence_piece(legacy: bool) -> Tokenizer:
    """As Llama 2's and Mistral's: `legacy` puts a space before every part of a text between special tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=1100, special_tokens=["<unk>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(TEXT.replace(" ", "▁").split("\n"), trainer)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = [decoders.Strip(" ", 1, 0)] if legacy else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


VOCABULARIES: dict[str, Callable[[], Tokenizer]] = {
    "gpt2": lambda: _byte_level(None),
    "llama3": lambda: _byte_level(LLAMA3_SPLIT),
    "sentencepiece": lambda: _sentence_piece(False),
    "sentencepiece legacy": lambda: _sentence_piece(True),
}


@cache
def _vocabulary(name: str) -> str:
    return VOCABULARIES[name]().to_str()


def published(template: str, vocabulary: str = "gpt2") -> PreTrainedTokenizerFast:
    """A tokenizer with the template of that name, or with the text of one; its tokens in brackets are special."""
    file = FOLDER / f"{template}.jinja"
    text = file.read_text() if len(template) < 50 and file.is_file() else template
    backend = Tokenizer.from_str(_vocabulary(vocabulary))
    known = backend.get_vocab()
    backend.add_special_tokens(sorted({"<s>", "</s>", *_TOKEN.findall(text)} - known.keys()))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=text, **names)
