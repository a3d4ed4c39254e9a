"""Tokenizers with several formats, and hostile texts, for the meta-prompt's tests."""

from collections.abc import Callable

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metaalign_rl.core.meta_prompt import SPECIAL_TOKENS

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (  # [INST] and <<SYS>> are plain text in this format, not tokens
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Special tokens that overlap themselves and each other: the hardest case.
HOSTILE = ("<|end|>", "<|end|><|end|>", "[[[", "<<<a", "<|end|> x")


def make(specials: tuple[str, ...], template: str | None = None, **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a few words, byte fallback and the given special tokens."""
    words = [
        "<unk>",
        *specials,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "hello",
        "▁be",
        "▁brief",
        "▁User",
        "Info",
    ]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, ignore_merges=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(list(specials))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)


def own(*extra: str) -> PreTrainedTokenizerFast:
    return make((*SPECIAL_TOKENS, *extra), eos_token="<eos>", pad_token="<pad>")


def chatml() -> PreTrainedTokenizerFast:
    return make(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), CHATML, eos_token="<|im_end|>")


def llama2() -> PreTrainedTokenizerFast:
    return make(("<s>", "</s>"), LLAMA2, bos_token="<s>", eos_token="</s>")


def vicuna() -> PreTrainedTokenizerFast:
    return make(("<s>", "</s>"), VICUNA, eos_token="</s>")


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "own": own, "hostile": lambda: own(*HOSTILE), "chatml": chatml, "llama2": llama2, "vicuna": vicuna
}  # fmt: skip


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


LITERALS = (
    *SPECIAL_TOKENS, *HOSTILE, "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "USER:", "ASSISTANT:",
    "</System Info>", "< user\tinfo >", "<SYSTEM INFO>", "</ /User\nInfo>", "<UserInfo>",
    "<System▁Info>", "\nsystem\n",
)  # fmt: skip


@st.composite
def pieces(draw: st.DrawFn) -> str:
    """A literal, or its beginning or end, so that adjacent pieces can form one."""
    literal = draw(st.sampled_from(LITERALS))
    cut = draw(st.integers(0, len(literal)))
    return draw(st.sampled_from([literal, literal[:cut], literal[cut:]]))


hostile_texts = st.lists(
    pieces() | st.sampled_from(["·", " ", "<", "hello", "\n"]) | st.text(max_size=3), max_size=6
).map("".join)
