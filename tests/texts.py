"""Texts that tokenizers disagree about: llama.cpp's vectors, and random Unicode."""

import random
import unicodedata
from pathlib import Path

_WORDS = (
    *("Hello", "don't", "I'LL", "we've", "12345", "3.14", "1,000,000", "camelCase", "__init__", "def f(x):", "a_b"),
    *(" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "   \n ", "\u00a0", "\u3000", "\u200b", "\0", "\x7f", "\ufeff"),
    *("naïve", "cafe\u0301", "日本語", "カタカナ", "한국어", "русский", "مرحبا", "हिन्दी", "ไทย", "ελ", "ﬁ", "Ǆ", "ʰ"),
    *("😀", "👩‍👩‍👧", "🇩🇪", "❤️", "①", "½", "Ⅷ", "٣", "...", "!!!", "//", "{}", "▁", "▁▁", "Ġ", "Ċ"),
    *("<s>", "</s>", "<unk>", "<0x41>", "<|im_end|>", "<|eot_id|>", "[INST]", "<|endoftext|>"),
)
# Ends of ranges where assigned characters are dense: ASCII, Latin to Cyrillic, scripts of the world, all planes.
_BOUNDS = (0x80, 0x500, 0x3000, 0x20000)


def vectors(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    """Returns llama.cpp's vectors of a vocabulary: texts, and their ids without BOS."""
    base = shared / "data" / "tokenizer_vectors" / f"ggml-vocab-{name}.gguf"
    *cases, end = (base.parent / f"{base.name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (base.parent / f"{base.name}.out").read_text("utf-8").splitlines()
    assert end == "" and len(cases) == len(lines) > 40
    return [(text, [int(word) for word in line.split()]) for text, line in zip(cases, lines, strict=True)]


def random_texts(count: int, seed: int = 0) -> list[str]:
    """Draws `count` texts, of words that tokenizers disagree about or of characters from all of Unicode."""
    draw = random.Random(seed)
    return [_of_words(draw) if draw.random() < 0.5 else _of_characters(draw) for _ in range(count)]


def _of_words(draw: random.Random) -> str:
    return "".join(draw.choice(_WORDS) + draw.choice(("", "", " ")) for _ in range(draw.randrange(12)))


def _of_characters(draw: random.Random) -> str:
    characters: list[str] = []
    while draw.random() < 0.94:
        character = chr(draw.randrange(draw.choice(_BOUNDS)))
        # Only assigned characters: libraries know Unicode of different years.
        if unicodedata.category(character) not in ("Cs", "Cn", "Co"):
            characters.append(character)
    return "".join(characters)
