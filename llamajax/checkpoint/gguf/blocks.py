"""Tensors of GGUF files: blocks of bytes of a type of ggml's, and their bytes in the other order."""

import dataclasses
import math

import numpy as np

from quant import ggml

# Which bytes of a block are one number, (offset, size) by the type's name: those that a big-endian file turns round
# (ggml-common.h). Fifth bits of Q5_0 and Q5_1 are written as one 32-bit number. What is not here, IQ1, IQ2 and IQ3,
# ggml reads partly as bytes, partly as 16- and 32-bit numbers over them: not the same on both kinds of machine.
_NUMBERS: dict[str, tuple[tuple[int, int], ...]] = {
    **{"F32": ((0, 4),), "F16": ((0, 2),), "BF16": ((0, 2),)},
    **{"F64": ((0, 8),), "I64": ((0, 8),), "I32": ((0, 4),), "I16": ((0, 2),), "I8": ()},
    **{"Q4_0": ((0, 2),), "Q4_1": ((0, 2), (2, 2)), "Q8_0": ((0, 2),), "Q1_0": ((0, 2),)},
    **{"Q5_0": ((0, 2), (2, 4)), "Q5_1": ((0, 2), (2, 2), (4, 4))},
    **{"Q2_K": ((80, 2), (82, 2)), "Q3_K": ((108, 2),), "Q6_K": ((208, 2),)},
    **{"Q4_K": ((0, 2), (2, 2)), "Q5_K": ((0, 2), (2, 2))},
    **{"IQ4_NL": ((0, 2),), "IQ4_XS": ((0, 2), (2, 2))},
    **{"TQ1_0": ((52, 2),), "TQ2_0": ((64, 2),), "MXFP4": (), "NVFP4": ()},
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a file says of a tensor.

    Attributes:
        name: of the tensor.
        kind: its type.
        shape: rows first, [out, in] of a matrix; the last axis is the one whose weights stand one behind the other.
        file: number of the part that holds it.
        start: the byte at which it begins there.
    """

    name: str
    kind: ggml.Type
    shape: tuple[int, ...]
    file: int
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.kind.row_bytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape[:-1]) * self.row_bytes


def turned(blocks: np.ndarray, kind: ggml.Type) -> np.ndarray | None:
    """Blocks of the other byte order, uint8 [rows, bytes]: a copy; None where nobody says what it is."""
    if kind.name not in _NUMBERS:
        return None
    order = np.arange(kind.nbytes)
    for offset, size in _NUMBERS[kind.name]:
        order[offset : offset + size] = order[offset : offset + size][::-1]
    return np.take(blocks.reshape(-1, kind.nbytes), order, axis=1).reshape(blocks.shape)
