"""Converts a tokenizer.json to tables: its steps of normalization and splitting, its pieces and merges.

The library tokenizers reads the file and writes it again, which converts files of its older versions to the current
form. The steps are those of tokenizers/src/normalizers and pre_tokenizers of github.com/huggingface/tokenizers.
"""

import base64
import functools
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from export.patterns import Patterns, Unsupported, all_characters, characters_in, ranges_of
from llamajax import Tokenizer, files
from llamajax import tokenizer as forms

Step = dict[str, Any]
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def tokenizers_tables(tokenizer: Tokenizer, patterns: Patterns) -> dict[str, Any]:
    """The tables of vocabulary.json for encoding with a tokenizer.json.

    Raises:
        Unsupported: for features that runners lack.
    """
    import tokenizers

    library = tokenizers.Tokenizer.from_str(tokenizer.model_bytes.decode())
    data = json.loads(library.to_str())
    model = data["model"]
    for name, wanted in (("type", ("BPE",)), ("dropout", (None, 0.0)), *((name, (None, "")) for name in _AFFIXES)):
        if model.get(name) not in wanted:
            raise Unsupported(f"has a model with {name} {files.shortened(str(model.get(name)))}")
    splits = [
        made for step in forms.steps_of(data["pre_tokenizer"], "pretokenizers") for made in _split(step, patterns)
    ]
    of_bytes = {"do": "bytes"} in splits
    if {"do": "bytes"} in splits[:-1]:
        raise Unsupported("splits text after it has become bytes")
    ids: dict[str, int] = model["vocab"]
    pieces: list[str | None] = [None] * (max(ids.values(), default=-1) + 1)
    for piece, index in ids.items():
        pieces[index] = piece
    left, right = (np.array([ids[pair[side]] for pair in model["merges"]], "<i4") for side in (0, 1))
    unknown = model["unk_token"]
    return {
        "pieces": [_of_bytes(piece) for piece in pieces] if of_bytes else pieces,
        "pieces_are_bytes": of_bytes,
        "normalize": [
            made for step in forms.steps_of(data["normalizer"], "normalizers") for made in _normalize(step, patterns)
        ],
        "split": splits,
        "special_hides": True,
        "controls": [],
        "model": {
            "kind": "merges",
            "left": base64.b64encode(left.tobytes()).decode(),
            "right": base64.b64encode(right.tobytes()).decode(),
            "ignore_merges": model["ignore_merges"],
            "byte_fallback": model["byte_fallback"],
            "fuse_unknown": model["fuse_unk"],
            "unknown": None if unknown is None else ids.get(unknown),
        },
    }


_AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")


def normalizer_of(tokenizer: Tokenizer) -> Callable[[str], str]:
    """The normalizer of a tokenizer.json as a function of text; some added tokens are searched in its result."""
    import tokenizers

    normalizer = tokenizers.Tokenizer.from_str(tokenizer.model_bytes.decode()).normalizer
    return str if normalizer is None else normalizer.normalize_str


def _of_bytes(piece: str | None) -> str | None:
    """A byte-level piece with one character per byte; None if it has other characters, and so no text gives it."""
    if piece is None or not all(character in forms.BYTES for character in piece):
        return None
    return "".join(chr(forms.BYTES[character]) for character in piece)


def _pattern(pattern: Mapping[str, str], patterns: Patterns) -> list[Any]:
    if "String" in pattern:
        return _of_nonempty(pattern["String"], patterns)
    return patterns.of_expression(pattern["Regex"])


def _of_nonempty(text: str, patterns: Patterns) -> list[Any]:
    if not text:
        raise Unsupported("looks for an empty text")
    return patterns.of_text(text)


def _normalize(step: Mapping[str, Any], patterns: Patterns) -> Iterator[Step]:
    """Yields the steps that do what a normalizer does."""
    kind = step["type"]
    if kind == "Prepend":
        yield {"do": "prefix", "text": step["prepend"], "unless": False, "first": False}
    elif kind == "Replace":
        yield {"do": "replace", "pattern": _pattern(step["pattern"], patterns), "text": step["content"]}
    elif kind in _FORMS:
        yield {"do": "form", "name": kind, "pattern": [patterns.of_class(_changing(kind)), "+"]}
    else:
        raise Unsupported(f"normalizes text ({files.shortened(kind)})")


def _split(step: Mapping[str, Any], patterns: Patterns) -> Iterator[Step]:
    """Yields the steps that do what a pre-tokenizer does."""
    kind = step["type"]
    if kind == "Split":
        behavior = _BEHAVIORS.get(step["behavior"])
        if behavior is None:
            raise Unsupported(f"splits text in a way of its own ({files.shortened(step['behavior'])})")
        yield _split_at(_pattern(step["pattern"], patterns), behavior, step["invert"])
    elif kind == "Digits":
        digits = [patterns.of_class(_digits())]
        yield _split_at(digits, "isolated" if step["individual_digits"] else "contiguous")
    elif kind == "ByteLevel":
        if step["add_prefix_space"]:
            yield {"do": "prefix", "text": " ", "unless": True, "first": False}
        if step["use_regex"]:
            yield _split_at(patterns.of_expression(forms.GPT2), "isolated")
        yield {"do": "bytes"}
    elif kind == "Metaspace":
        space = step["replacement"]
        yield {"do": "replace", "pattern": patterns.of_text(" "), "text": space}
        if step["prepend_scheme"] != "never":
            yield {"do": "prefix", "text": space, "unless": True, "first": step["prepend_scheme"] == "first"}
        if step["split"]:
            yield _split_at(patterns.of_text(space), "merged_with_next")
    else:
        raise Unsupported(f"splits text in a way of its own ({files.shortened(kind)})")


_BEHAVIORS = {
    "Removed": "removed",
    "Isolated": "isolated",
    "MergedWithPrevious": "merged_with_previous",
    "MergedWithNext": "merged_with_next",
    "Contiguous": "contiguous",
}


def _split_at(pattern: list[Any], behavior: str, invert: bool = False) -> Step:
    return {"do": "split", "pattern": pattern, "behavior": behavior, "invert": invert}


@functools.cache
def _digits() -> tuple[int, ...]:
    """The characters at which the library's Digits splits."""
    from tokenizers import pre_tokenizers

    runs = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str(all_characters())
    return ranges_of(characters_in("".join(run for run, _ in runs[1::2])))  # the first run is of control characters


@functools.cache
def _changing(form: str) -> tuple[int, ...]:
    """The characters that take part in one of Unicode's normal forms, in the library's version of Unicode.

    Any later version of Unicode normalizes runs of these characters in the same way, because the normalization of an
    assigned character never changes (https://www.unicode.org/policies/stability_policy.html). Other characters stay
    unchanged and separate their neighbours.
    """
    from tokenizers import normalizers

    theirs = {name: getattr(normalizers, name)().normalize_str for name in (form, "NFC", "NFD")}
    ours: Any = unicodedata.normalize  # typed as Any, because the name is no literal
    same = lambda text, name: theirs[name](text) == ours(name, text)  # noqa: E731
    held: set[str] = set()
    for character in all_characters():
        apart = ours("NFD", character)
        if ours(form.replace("C", "D"), character) != character and same(character, form):
            held.add(character)
        if unicodedata.combining(character) and same("\u0345" + character, "NFD") and same(character + "\u0334", "NFD"):
            held.add(character)
        if len(apart) > 1:  # pairs that compose: the character without its last mark, and the mark
            pair = ours("NFC", apart[:-1]) + apart[-1]
            if len(pair) == 2 and same(pair, "NFC") and ours("NFC", pair) == character:
                held.update(pair)
    return ranges_of(characters_in("".join(held)))
