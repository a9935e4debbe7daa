"""Makes and checks the tables with which runners convert text to ids and back, as the tokenizer does.

Runners have no sentencepiece and no tokenizers: their class `Text` uses tables (`export.sentencepiece_tables`,
`export.tokenizers_tables`). If it cannot reproduce a tokenizer exactly, vocabulary.json has a `refusal`, and a runner
takes only ids. When a bundle is written, texts are encoded in both ways; runners repeat this for the golden texts.
"""

import dataclasses
import functools
import importlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from export.patterns import Patterns, Unsupported, all_characters, characters_in, ranges_of
from export.sentencepiece_tables import sentencepiece_tables
from export.tokenizers_tables import normalizer_of, tokenizers_tables
from llamajax import Tokenizer, files

VERSION = 2

# Texts on which tokenizers differ: spaces, texts that look like tokens, letters of several code points, rare signs.
TEXTS = (
    "",
    " ",
    "    ",
    "\n",
    "Once upon a time",
    " Once upon a time, ",
    "  two  spaces,   three    four  ",
    "one\ttab\n\ntwo lines \r\n and \u00a0other\u2003spaces\u3000here\u200b.",
    "12 red apples, 3.14159 and 1,000,000",
    "Don't! (Really?) \"Yes\" - it's [fine] {here}; a/b\\c @ #1 $5 50% ^ & * _under_ ~ `code`",
    "def f(x):\n    return x ** 2  # squared\n",
    "caf\u00e9 cafe\u0301 na\u00efve \u00c5ngstr\u00f6m \u212b",
    "\ufb01ne \uff21\uff22\uff23 \u2460 \u00bd \u2126 \u1e9b\u0323",
    "日本語 中文 한국어 русский ελ \u05e2 \u0639",
    "\U0001f98a \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "<s>a</s> <unk> <0x41> [INST] hi [/INST] <|im_end|> <|endoftext|>",
    "\u2581a \u2581\u2581 b\u2581",
    "\x00\x01\x7f\ufffd\ufeff",
    "a" * 100,
    "abababab" * 8 + " " * 40 + "x",
    "I'm, we'LL, they'Ve; it'\u017f O'Neil 'tis rock'n'roll ''d",
    "1234567890 12345,678 \u0663\u0664\u0665 \u00b2\u00b3 x2y3z",
    "a \n b  \n\n  c\r\n\r\n\td \n",
    "if (x != 0) { y += --z; } // ...?!\n\n",
    "HTTPServer camelCase UPPER lower \u01c5 \u1f88",
    "e\u0301\u0327 o\u0308\u0304 \u1100\u1161\u11a8 \uac00\u11a8 \u0958 \u2126\u212b",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627",
    "\u3053\u3093\u306b\u3061\u306f\u30ab\u30bf\u30ab\u30ca\uff01\u3002\u300c\u5b57\u300d",
)
_FROM_PIECES = 12
_MOST_WHOLE = 16
# Number of random texts that are compared when a bundle is written, and not kept.
_DRAWN = 400
_UNNAMED = "\ufffd".encode()
# Bits of an added token, as in runners/text.py.
_BITS = {"special": 1, "lstrip": 2, "rstrip": 4, "single_word": 8}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the form for runners.

    Attributes:
        values: the content of vocabulary.json; `refusal` is the reason why a runner cannot encode text by it, or None.
        texts: the golden texts, each with its ids by the tokenizer itself.
    """

    values: dict[str, Any]
    texts: list[dict[str, Any]]


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The tables of a tokenizer: pieces, merges or scores, and the steps that normalize and split text."""
    patterns = Patterns()
    values: dict[str, Any] = {
        "version": VERSION,
        "refusal": None,
        "bos": tokenizer.bos_id if tokenizer.add_bos else None,
        "eos": tokenizer.eos_id if tokenizer.add_eos else None,
        "stop": list(tokenizer.stop_ids),
        "first_space": tokenizer.drops_first_space,
    }
    try:
        if tokenizer.form == "sentencepiece":
            tables = sentencepiece_tables(tokenizer, patterns)
        else:
            tables = tokenizers_tables(tokenizer, patterns)
        added = _added(tokenizer, tables.pop("controls"), tables.pop("special_hides"), patterns)
        values |= {"added": added, **tables, "classes": patterns.classes}
    except Unsupported as error:
        values |= {"refusal": f"its tokenizer {error}", "pieces": [], "pieces_are_bytes": False}
    values |= _bytes_of_ids(tokenizer, values)
    around = _around_pieces(tokenizer, values)
    drawn = [*_texts_of_pieces(tokenizer, _FROM_PIECES), *around]
    texts: list[dict[str, Any]] = [{"text": text, "ids": tokenizer.encode(text)} for text in (*TEXTS, *drawn)]
    texts += [{"text": text, "ids": tokenizer.encode(text, special=True), "special": True} for text in around]
    if values["refusal"] is None:
        values["refusal"] = _difference(values, tokenizer, [*TEXTS, *drawn, *_texts_of_pieces(tokenizer, _DRAWN)])
    return Vocabulary(values, texts)


def _added(tokenizer: Tokenizer, controls: Sequence[Any], special_hides: bool, patterns: Patterns) -> dict[str, Any]:
    """The table of added tokens, and the classes of white space and word characters that matter beside some tokens."""
    tables: dict[bool, list[list[Any]]] = {False: list(controls), True: []}
    theirs = tokenizer.form == "tokenizers"
    # Tokens that are searched after normalization are searched in their normalized form.
    normalized = normalizer_of(tokenizer) if theirs and any(token.normalized for token in tokenizer.added) else str
    for token in tokenizer.added:
        bits = sum(bit for name, bit in _BITS.items() if getattr(token, name))
        text = normalized(token.text) if token.normalized else token.text
        if text:
            tables[token.normalized].append([token.id, text, bits])
    words = any(token.single_word for token in tokenizer.added)
    return {
        "early": tables[False],
        "late": tables[True],
        "blank": _WHITE_SPACE + ("" if theirs else "\x1c\x1d\x1e\x1f"),
        "word": patterns.of_class(_word_characters(theirs)) if words else None,
        "special_hides": special_hides,
    }


# Unicode's property White_Space.
_WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


@functools.cache
def _word_characters(of_library: bool) -> tuple[int, ...]:
    """The characters that a single-word token may not touch, for the library or for `llamajax.tokenizer`."""
    if not of_library:
        return ranges_of(characters_in("".join(c for c in all_characters() if c.isalnum() or c == "_")))
    from tokenizers import pre_tokenizers

    # The library's pre-tokenizer Whitespace splits between words and other characters by the same expression \w.
    runs = pre_tokenizers.Whitespace().pre_tokenize_str
    words = [run for run, _ in runs(all_characters()) if len(runs("a" + run[0])) == 1]
    return ranges_of(characters_in("".join(words)))


def _bytes_of_ids(tokenizer: Tokenizer, values: dict[str, Any]) -> dict[str, Any]:
    """The tables of `Text.bytes_of`: pieces, and the bytes, as Latin-1, of ids whose piece is not their text."""
    pieces = (values["pieces"] + [None] * tokenizer.vocab_size)[: max(tokenizer.vocab_size, len(values["pieces"]))]
    texts = {}
    for index, piece in enumerate(pieces):
        data = tokenizer.token_bytes(index) if index < tokenizer.vocab_size else _UNNAMED
        if piece is None or data != (
            piece.encode("latin-1") if values["pieces_are_bytes"] else piece.replace("\u2581", " ").encode()
        ):
            texts[str(index)] = data.decode("latin-1")
    spaced = (i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)[:1] == b" ")
    return {"pieces": pieces, "texts": texts, "spelt": [i for i in spaced if tokenizer.is_spelt(i)]}


def _around_pieces(tokenizer: Tokenizer, values: dict[str, Any]) -> list[str]:
    """Texts that contain added tokens, or pieces that are never split."""
    steps = values.get("split", [])
    whole = [token.text for token in tokenizer.added] + [piece for step in steps for piece in step.get("whole", [])]
    return [f"a{text}b {text} c{text}{text} " for text in whole[:_MOST_WHOLE]]


def _texts_of_pieces(tokenizer: Tokenizer, count: int) -> list[str]:
    """Texts of random pieces of the vocabulary."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, tokenizer.vocab_size, (count, 16)).tolist()
    return [b"".join(map(tokenizer.token_bytes, row)).decode(errors="ignore") for row in ids]


def _difference(values: dict[str, Any], tokenizer: Tokenizer, texts: Sequence[str]) -> str | None:
    """The first text for which the runners' `Text` gives other ids than the tokenizer, or None."""
    runner = text_of(values)
    for text in texts:
        for special in (False, True):
            if runner.encode(text, special) != tokenizer.encode(text, special=special):
                return f"its tokenizer encodes {files.shortened(text)} in a way of its own"
    return None


def text_of(values: dict[str, Any]) -> Any:
    """The runners' `Text` of a vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocabulary.json").write_text(json.dumps(values))
        # Imported by name, because the runners' code is for older Pythons and is not type-checked.
        return importlib.import_module("export.runners.text").Text(_Folder(Path(folder)))


@dataclasses.dataclass(frozen=True)
class _Folder:
    """The part of a bundle that `Text` uses."""

    path: Path

    def file(self, name: str) -> Path:
        """Path of a file in the folder."""
        return self.path / name
