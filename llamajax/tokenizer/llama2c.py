r"""Reads llama2.c's tokenizer.bin: the pieces of a sentencepiece model and their scores, in a format of its own.

The file is little endian: the length of the longest piece in 4 bytes, then for each piece its score (float32), its
length (int32) and its bytes. Spaces are written as such; `<s>` and `</s>` as "\n<s>\n" and "\n</s>\n" (`export` in
tokenizer.py of github.com/karpathy/llama2.c). The file does not hold the types of pieces: run.c takes ids 0, 1 and 2
for unknown, BOS and EOS, and 3 to 258 for the bytes, and so does this module.
"""

import struct

from llamajax.tokenizer.engine import EngineError
from llamajax.tokenizer.model_proto import BYTE, CONTROL, NORMAL, UNKNOWN, make_model

_FIRST = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
_LONGEST = 1 << 16


def is_llama2c(data: bytes) -> bool:
    """Whether bytes begin like a tokenizer.bin: a plausible largest length, and a first piece no longer than that."""
    if len(data) < 12:
        return False
    longest, _, first = struct.unpack_from("<ifi", data)
    return 0 < longest <= _LONGEST and 0 < first <= longest


def model_of_llama2c(data: bytes) -> bytes:
    """Returns a sentencepiece model that encodes as run.c does.

    Raises:
        EngineError: if the file is damaged, or its first pieces are not those of LLaMA.
    """
    pieces: list[str] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        try:
            score, length = struct.unpack_from("<fi", data, at)
            if length < 0 or at + 8 + length > len(data):
                raise ValueError(f"{length} bytes from {at + 8} on")
            piece = data[at + 8 : at + 8 + length].decode()
        except (struct.error, ValueError) as error:
            raise EngineError(
                f"a llama2.c tokenizer.bin, damaged in piece {len(pieces)} ({error}): expected the score, length and "
                "UTF-8 of each piece"
            ) from None
        pieces.append(piece.replace(" ", "▁"))
        scores.append(score)
        at += 8 + length
    pieces[:3] = [piece.strip("\n") for piece in pieces[:3]]
    if pieces[: len(_FIRST)] != _FIRST:
        raise EngineError(
            "a llama2.c tokenizer.bin that does not begin with the expected <unk>, <s>, </s> and 256 bytes"
        )
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(pieces) - len(_FIRST))]
    return make_model(pieces, scores, types)
