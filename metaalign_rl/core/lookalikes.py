"""Characters that look like ASCII characters, or that cannot be seen, for the chat template's comparison of texts."""

import unicodedata
from collections.abc import Iterator
from functools import cache

# Letters of other scripts that NFKC keeps apart, next to the ASCII letters that they look like (Unicode TR 39 lists
# more). Both cases are given where both exist.
_CONFUSABLE = {
    "a": "аαɑ", "b": "ЬƄ", "c": "сϲ", "d": "ԁ", "e": "еε", "g": "ɡց", "h": "һհ", "i": "іıιɩ", "j": "ј", "k": "кκ",
    "l": "ӏɭ", "m": "мµμ", "n": "ոп", "o": "оοօ", "p": "рρ", "q": "ԛ", "r": "гɾ", "s": "ѕƽ", "t": "тτ", "u": "υս",
    "v": "ѵν", "w": "ԝω", "x": "хχ", "y": "уγ", "z": "ʐ",
    "A": "АΑ", "B": "ВΒ", "C": "СϹ", "E": "ЕΕ", "G": "Ԍ", "H": "НΗ", "I": "ІΙӀ", "J": "Ј", "K": "КΚ", "M": "МΜ",
    "N": "Ν", "O": "ОΟՕ", "P": "РΡ", "S": "Ѕ", "T": "ТΤ", "U": "Ս", "V": "Ѵ", "W": "Ԝ", "X": "ХΧ", "Y": "УΥ", "Z": "Ζ",
    "<": "‹«〈⟨〈≺˂ᐸ《", ">": "›»〉⟩〉≻˃ᐳ》", "|": "ǀ∣│┃│∥ⵏ", "/": "⁄∕",
    "_": "‗", "-": "‐‑‒–—―−⁃", "[": "【〔⟦", "]": "】〕⟧",
    " ": "▁␣", "#": "⌗", ":": "ː꞉∶",
}  # fmt: skip
_INVISIBLE = (
    (0x00AD, 0x00AD), (0x0300, 0x036F), (0x061C, 0x061C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F),
    (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8),
)  # fmt: skip
_COMPATIBLE = (range(0x00A0, 0xD800), range(0xE000, 0x10000), range(0x1D400, 0x1D800), range(0x1F100, 0x1F200))


def invisible() -> str:
    """The characters of the Basic Multilingual Plane that leave no mark, or only one on their neighbour."""
    return "".join(chr(code) for first, last in _INVISIBLE for code in range(first, last + 1))


@cache
def lookalikes() -> tuple[str, str]:
    """Two strings of equal length: characters, and for each the ASCII character that it looks like."""
    pairs = sorted(dict(_pairs()).items())
    return "".join(other for other, _ in pairs), "".join(ascii_ for _, ascii_ in pairs)


def _pairs() -> Iterator[tuple[str, str]]:
    hidden = invisible()
    for codes in _COMPATIBLE:
        for other in map(chr, codes):
            plain = unicodedata.normalize("NFKC", other)
            if len(plain) == 1 and plain.isascii() and other not in hidden:
                yield other, plain
    for plain, others in _CONFUSABLE.items():
        yield from ((other, plain) for other in others)
