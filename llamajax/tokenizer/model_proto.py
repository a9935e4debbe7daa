"""Makes sentencepiece models from pieces, scores and types, for vocabularies in files of other formats.

Source: sentencepiece_model.proto of github.com/google/sentencepiece.
"""

import re
from collections.abc import Sequence
from typing import Any

# SentencePiece.Type; GGUF's token types are the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def make_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    bos_id: int | None = 1,
    eos_id: int | None = 2,
    pad_id: int | None = None,
    kind: int = BPE,
    dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
    charsmap: bytes = b"",
) -> bytes:
    """Returns a serialized ModelProto.

    Args:
        pieces: V pieces, with ▁ (U+2581) for a space.
        scores: the score of each piece.
        types: the type of each piece, one of the six above.
        bos_id: the id of the piece that begins a text, or None.
        eos_id: the id of the piece that ends a text, or None.
        pad_id: the id of the piece that fills up a batch, or None.
        kind: `BPE` or `UNIGRAM`.
        dummy_prefix: whether a space is put before a text.
        remove_extra_whitespaces: whether several spaces become one.
        charsmap: sentencepiece's table of a normalizer; b"" leaves text unchanged.
    """
    model = proto().ModelProto()
    for piece, score, kind_of_piece in zip(pieces, scores, types, strict=True):
        model.pieces.add(piece=piece, score=score, type=kind_of_piece)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = kind
    trainer.vocab_size = len(pieces)
    trainer.byte_fallback = BYTE in types
    named = {"unk": types.index(UNKNOWN) if UNKNOWN in types else None, "bos": bos_id, "eos": eos_id, "pad": pad_id}
    for name, index in named.items():
        setattr(trainer, f"{name}_id", -1 if index is None else index)
        if index is not None:
            setattr(trainer, f"{name}_piece", pieces[index])
    normalizer.name = "custom" if charsmap else "identity"
    normalizer.precompiled_charsmap = charsmap
    normalizer.add_dummy_prefix = dummy_prefix
    normalizer.remove_extra_whitespaces = remove_extra_whitespaces
    normalizer.escape_whitespaces = True
    return model.SerializeToString(deterministic=True)


def proto() -> Any:
    """The module of sentencepiece's protobuf classes; `Any`, as they are made at import, unseen by type checkers."""
    from sentencepiece import sentencepiece_model_pb2  # imported here, as sentencepiece itself is

    return sentencepiece_model_pb2
