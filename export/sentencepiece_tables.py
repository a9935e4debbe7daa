"""Converts a sentencepiece model to tables: its normalizer, and its pieces with scores and kinds."""

import base64
import re
from collections.abc import Mapping
from typing import Any

from export.patterns import Patterns, Unsupported, outside
from llamajax import Tokenizer
from llamajax import tokenizer as forms

_MODEL_TYPES = {1: "unigram", 2: "scores"}
_OTHER_TYPES = {3: "word", 4: "char"}
# Letters for the kinds of pieces: normal, unknown, control, user-defined, unused, byte.
_KINDS = {1: "n", 2: "?", 3: "c", 4: "u", 5: "x", 6: "b"}


def sentencepiece_tables(tokenizer: Tokenizer, patterns: Patterns) -> dict[str, Any]:
    """The tables of vocabulary.json for encoding with a sentencepiece model.

    Raises:
        Unsupported: for features that runners lack.
    """
    model = forms.proto().ModelProto.FromString(tokenizer.model_bytes)
    kind = _MODEL_TYPES.get(model.trainer_spec.model_type)
    if kind is None:
        raise Unsupported(f"is a sentencepiece model of type {_OTHER_TYPES.get(model.trainer_spec.model_type)}")
    pieces, kinds = [piece.piece for piece in model.pieces], "".join(_KINDS[piece.type] for piece in model.pieces)
    unknown = kinds.find("?")
    named = {token.text for token in tokenizer.words.added} | {""}
    listed = {token.id for token in tokenizer.words.added}
    controls = [
        [i, piece, 1]
        for i, (piece, letter) in enumerate(zip(pieces, kinds, strict=True))
        if letter in "c?" and piece not in named and i not in listed
    ]
    split = [_normalizer(model, tokenizer, [piece for piece, k in zip(pieces, kinds, strict=True) if k == "u"])]
    if kind == "scores" and _ends_at_spaces(dict(zip(pieces, kinds, strict=True))):
        space = (ord("\u2581"), ord("\u2581"))
        word = [patterns.of_class(space), "+", patterns.of_class(outside(space)), "*"]
        split.append({"do": "split", "pattern": word, "behavior": "isolated", "invert": False})
    return {
        "pieces": pieces,
        "pieces_are_bytes": False,
        "normalize": [],
        "split": split,
        "special_hides": False,
        "controls": controls,
        "model": {
            "kind": kind,
            "kinds": kinds,
            "scores": [piece.score for piece in model.pieces],
            "unknown": unknown if unknown >= 0 else None,
        },
    }


def _ends_at_spaces(kinds: Mapping[str, str]) -> bool:
    """Whether no piece contains a space after another character, so that each word may be encoded by itself."""
    pieces = [piece for piece, kind in kinds.items() if kind in "nux"]
    return kinds.get("\u2581") == "n" and not any(re.search("[^\u2581]\u2581", piece) for piece in pieces)


def _normalizer(model: Any, tokenizer: Tokenizer, whole: list[str]) -> dict[str, Any]:
    """The step that does what sentencepiece's normalizer (normalizer.cc) does."""
    spec, prefix = model.normalizer_spec, "never"
    if spec.add_dummy_prefix:  # the model adds a space, unless `Tokenizer` prevents that
        itself = Tokenizer(tokenizer.model_bytes)
        prefix = (tokenizer.words.space or "first") if itself.drops_first_space else "always"
    return {
        "do": "sentencepiece",
        "prefix": prefix,
        "collapse": spec.remove_extra_whitespaces,
        "escape": spec.escape_whitespaces,
        "suffix": model.trainer_spec.treat_whitespace_as_suffix,
        "charsmap": base64.b64encode(spec.precompiled_charsmap).decode(),
        "whole": whole,
    }
