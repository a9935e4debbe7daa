"""What a runner needs to turn text into ids and back as the tokenizer does, and whether it then does.

Runners have no sentencepiece: their class `Text` does byte-pair encoding itself. What it cannot do exactly (unigram
models, tokenizers that normalize text) has a `refusal` in vocabulary.json: a runner then takes ids alone. A table of
texts is encoded both ways, here when a bundle is written and again by each runner that runs the golden prompts.
"""

import base64
import dataclasses
import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from llamajax import Tokenizer, files

# What tokenizers disagree about: spaces, what looks like a token, several code points for one letter, what is rare.
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
)
_FROM_PIECES = 12
_MOST_WHOLE = 16
_PROTO: Any = sentencepiece_model_pb2  # its classes are made when it is imported: no checker sees them
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as runners have it.

    Attributes:
        values: what vocabulary.json says; `refusal` is why a runner cannot encode text by it, or None.
        texts: the golden texts, each with the ids that the tokenizer itself makes of it.
    """

    values: dict[str, Any]
    texts: list[dict[str, Any]]


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """The pieces of a tokenizer, in base64, their scores, which may be merged, and what else decides the ids."""
    model = _PROTO.ModelProto.FromString(tokenizer.model_bytes)
    kind = _PROTO.ModelProto.SentencePiece
    of_kind = lambda *kinds: [i for i, piece in enumerate(model.pieces) if piece.type in kinds]  # noqa: E731
    merged = set(of_kind(kind.NORMAL, kind.USER_DEFINED))
    unknown = of_kind(kind.UNKNOWN)
    # In two tables: those of the second are looked for between those of the first.
    added = [
        {token.text: token.id for token in tokenizer.words.added if token.normalized is late} for late in (False, True)
    ]
    values = {
        "bos": tokenizer.bos_id if tokenizer.add_bos else None,
        "eos": tokenizer.eos_id if tokenizer.add_eos else None,
        "stop": list(tokenizer.stop_ids),
        "dummy_prefix": tokenizer.drops_first_space,
        "prefix_parts": tokenizer.words.space == "always",
        "collapse_spaces": model.normalizer_spec.remove_extra_whitespaces,
        "pieces": [base64.b64encode(tokenizer.token_bytes(i)).decode() for i in range(tokenizer.vocab_size)],
        "scores": [piece.score for piece in model.pieces],
        "merges": [int(i in merged) for i in range(len(model.pieces))],
        "single_bytes": of_kind(kind.BYTE),
        "never_split": of_kind(kind.USER_DEFINED),
        "added": [tokens for tokens in added if tokens],
        "unknown": unknown[0] if unknown else None,
        "refusal": _refusal(model, tokenizer),
    }
    whole = [*(token.text for token in tokenizer.words.added), *(model.pieces[i].piece for i in values["never_split"])]
    around = [f"a{text}b {text} c{text}{text} " for text in whole[:_MOST_WHOLE]]
    texts = [{"text": text, "ids": tokenizer.encode(text)} for text in (*TEXTS, *around, *_texts_of_pieces(tokenizer))]
    if values["refusal"] is None:
        values["refusal"] = _difference(values, texts)
    return Vocabulary(values, texts)


def _refusal(model: Any, tokenizer: Tokenizer) -> str | None:
    """What in a sentencepiece model, or among added tokens, runners do not do, or None."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type != 2:
        return f"its tokenizer is a sentencepiece model of type {_MODEL_TYPES.get(trainer.model_type, 'unknown')}"
    if normalizer.precompiled_charsmap:
        return f"its tokenizer normalizes text ({files.shortened(normalizer.name)})"
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        return "its tokenizer treats spaces in a way of its own"
    if any(piece.type == _PROTO.ModelProto.SentencePiece.UNUSED for piece in model.pieces):
        return "its tokenizer has unused pieces"
    for token in tokenizer.words.added:
        if token.lstrip or token.rstrip or token.single_word:
            return f"its tokenizer has a token that depends on what is around it, {files.shortened(token.text)}"
    return None


def _texts_of_pieces(tokenizer: Tokenizer) -> list[str]:
    """Texts that the pieces of a vocabulary give, drawn at random: of any length, in any order."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, tokenizer.vocab_size, (_FROM_PIECES, 16)).tolist()
    return [b"".join(map(tokenizer.token_bytes, row)).decode(errors="ignore") for row in ids]


def _difference(values: dict[str, Any], texts: list[dict[str, Any]]) -> str | None:
    """The first text for which the runners' `Text` gives other ids than the tokenizer, or None."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocabulary.json").write_text(json.dumps(values))
        # By name: what runners share is for older Pythons, and no part of what is type-checked.
        runner = importlib.import_module("export.runners.runner").Text(_Folder(Path(folder)))
    for entry in texts:
        if runner.encode(entry["text"]) != entry["ids"]:
            return f"its tokenizer encodes {files.shortened(entry['text'])} in a way of its own"
    return None


@dataclasses.dataclass(frozen=True)
class _Folder:
    """As much of a bundle as `Text` asks for."""

    path: Path

    def file(self, name: str) -> Path:
        """A file of it."""
        return self.path / name
