"""The world's tokenizer: its words are single tokens, and other text is encoded as bytes."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from metaalign_rl.core import meta_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PUNCTUATION = (".", ",", "?", "!", "...", ":", "\n")


def build_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A tokenizer with one token for each word of `texts` in lower case, in upper case, and for each byte.

    Decoding returns any encoded text unchanged: unknown words are encoded as UTF-8 bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for piece in text.split() if (word := piece.strip(",.?!:").lower())})
    forms = dict.fromkeys(form for word in words for form in (word, word.upper()))
    special = list(meta_prompt.SPECIAL_TOKENS)
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *PUNCTUATION, *(f"▁{form}" for form in forms)]
    # All pieces have the same score, so the tokenizer uses as few as possible: a word before its letters.
    unigram = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(unigram)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    meta_prompt.install(wrapped)
    return wrapped
