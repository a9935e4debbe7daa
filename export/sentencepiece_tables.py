"""A sentencepiece model as tables: its normalizer, its pieces and what may become of them."""

from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from export.patterns import Unsupported, members
from llamajax import Tokenizer, files

_PROTO: Any = sentencepiece_model_pb2  # its classes are made when it is imported: no checker sees them
_MODEL_TYPES = {1: "unigram", 2: "scores"}
_OTHER_TYPES = {3: "word", 4: "char"}
# Letters for the kinds of pieces: normal, unknown, control, user-defined, unused, byte.
_KINDS = {1: "n", 2: "?", 3: "c", 4: "u", 5: "x", 6: "b"}
# Bytes of the longest key, and of all texts, that a normalizer's trie is followed to.
_LONGEST_KEY = 64
_MOST_KEYS = 1 << 20


def sentencepiece_tables(tokenizer: Tokenizer) -> dict[str, Any]:
    """What vocabulary.json says of how a sentencepiece model makes ids.

    Raises:
        Unsupported: for what runners do not do.
    """
    model = _PROTO.ModelProto.FromString(tokenizer.model_bytes)
    kind = _MODEL_TYPES.get(model.trainer_spec.model_type)
    if kind is None:
        raise Unsupported(f"is a sentencepiece model of type {_OTHER_TYPES.get(model.trainer_spec.model_type)}")
    pieces, kinds = [piece.piece for piece in model.pieces], "".join(_KINDS[piece.type] for piece in model.pieces)
    unknown = kinds.find("?")
    named = {token.text for token in tokenizer.words.added} | {""}
    controls = [
        [i, piece, 1]
        for i, (piece, letter) in enumerate(zip(pieces, kinds, strict=True))
        if letter == "c" and piece not in named
    ]
    return {
        "pieces": pieces,
        "pieces_are_bytes": False,
        "normalize": [],
        "split": [_normalizer(model, tokenizer, [piece for piece, k in zip(pieces, kinds, strict=True) if k == "u"])],
        "special_hides": False,
        "controls": controls,
        "model": {
            "kind": kind,
            "kinds": kinds,
            "scores": [piece.score for piece in model.pieces],
            "unknown": unknown if unknown >= 0 else None,
        },
    }


def _normalizer(model: Any, tokenizer: Tokenizer, whole: list[str]) -> dict[str, Any]:
    """The step that stands for sentencepiece's normalizer (normalizer.cc)."""
    spec, prefix = model.normalizer_spec, "never"
    if spec.add_dummy_prefix:  # what the model itself does, unless `Tokenizer` keeps it from doing so
        prefix = (tokenizer.words.space or "first") if tokenizer.drops_first_space else "always"
    return {
        "do": "sentencepiece",
        "prefix": prefix,
        "collapse": spec.remove_extra_whitespaces,
        "escape": spec.escape_whitespaces,
        "suffix": model.trainer_spec.treat_whitespace_as_suffix,
        "charsmap": charsmap(spec.precompiled_charsmap),
        "whole": whole,
    }


def charsmap(blob: bytes) -> dict[str, str]:
    """What a normalizer replaces by what: the longest that begins at a place.

    The blob is the size of a trie in bytes, the trie, and texts that end with a zero byte, which the trie has the places
    of. The trie is a double array of uint32 (darts.h of github.com/s-yata/darts-clone, `DoubleArrayUnit`).

    Raises:
        Unsupported: for a blob that is no such thing.
    """
    if not blob:
        return {}
    size = int.from_bytes(blob[:4], "little")
    units, texts = np.frombuffer(blob[4 : 4 + size // 4 * 4], "<u4").astype(np.int64), blob[4 + size :]
    offset = (units >> 10) << ((units & (1 << 9)) >> 6)
    letters = np.arange(1, 256)
    found: dict[str, str] = {}
    keys, nodes = [b""], np.array([offset[0]]) if size >= 4 else np.array([], np.int64)
    for _ in range(_LONGEST_KEY):
        if not len(nodes):
            return found
        next_nodes = nodes[:, None] ^ letters
        inside = next_nodes < len(units)
        labels = np.where(inside, units[np.where(inside, next_nodes, 0)] & ((1 << 31) | 0xFF), 0)
        rows, columns = np.nonzero(labels == letters)
        at = next_nodes[rows, columns]
        keys = [
            keys[row] + bytes([letter]) for row, letter in zip(rows.tolist(), letters[columns].tolist(), strict=True)
        ]
        nodes = at ^ offset[at]
        for key, node, leaf in zip(keys, nodes.tolist(), (units[at] >> 8 & 1).tolist(), strict=True):
            if leaf and node < len(units):
                begin = int(units[node]) & 0x7FFFFFFF
                found[_text(key)] = _text(texts[begin : texts.find(b"\0", begin)])
        if len(found) + len(keys) > _MOST_KEYS:
            break
    raise Unsupported("has a normalizer whose table has no end")


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Unsupported(f"has a normalizer for what is no text ({files.shortened(str(data))})") from None
