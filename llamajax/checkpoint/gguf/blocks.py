"""Describes tensors of GGUF files, which are blocks of bytes of a ggml type, and swaps the byte order of blocks."""

import dataclasses
import math

import numpy as np

from quant import ggml

# (offset, size) of each number of several bytes within a block, by the type's name: a big-endian file has their bytes
# in reverse order (ggml-common.h). Fifth bits of Q5_0 and Q5_1 are written as one 32-bit number. IQ1, IQ2 and IQ3 are
# not listed: ggml reads the same bytes partly as bytes, partly as 16- and 32-bit numbers, so that they mean different
# things on machines of different byte order.
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
    """A file's description of a tensor.

    Attributes:
        name: name of the tensor.
        kind: its type.
        shape: rows first, [out, in] for a matrix; weights are contiguous along the last axis.
        file: number of the part that holds it.
        start: byte offset at which it begins in that part.
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
    """Returns a copy of blocks, uint8 [rows, bytes], in the other byte order; None if the type has no such order."""
    if kind.name not in _NUMBERS:
        return None
    order = np.arange(kind.nbytes)
    for offset, size in _NUMBERS[kind.name]:
        order[offset : offset + size] = order[offset : offset + size][::-1]
    return np.take(blocks.reshape(-1, kind.nbytes), order, axis=1).reshape(blocks.shape)
