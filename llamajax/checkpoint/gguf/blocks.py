"""The types of GGUF's tensors: how many weights a block holds, in how many bytes, and which of these are numbers.

Sizes and fields are those of the structures in ggml's `ggml-common.h`.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np


class BlockType(NamedTuple):
    """A type of tensor, as its bytes are in a file.

    Attributes:
        name: as ggml says it.
        weights: of a block; a row is a whole number of blocks.
        nbytes: of a block.
        numbers: (offset, size) of the numbers of several bytes in a block, whose bytes a big-endian file turns round;
            None where nobody says what such a file holds.
    """

    name: str
    weights: int
    nbytes: int
    numbers: tuple[tuple[int, int], ...] | None = None


# By the number that a file gives. Fifth bits of Q5_0 and Q5_1 are written as one 32-bit number. What IQ1, IQ2 and IQ3
# hold is read by ggml partly as bytes, partly as 16- and 32-bit numbers over them, which is not the same on both kinds
# of machine.
BLOCK_TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, ((0, 4),)),
    1: BlockType("F16", 1, 2, ((0, 2),)),
    2: BlockType("Q4_0", 32, 18, ((0, 2),)),
    3: BlockType("Q4_1", 32, 20, ((0, 2), (2, 2))),
    6: BlockType("Q5_0", 32, 22, ((0, 2), (2, 4))),
    7: BlockType("Q5_1", 32, 24, ((0, 2), (2, 2), (4, 4))),
    8: BlockType("Q8_0", 32, 34, ((0, 2),)),
    9: BlockType("Q8_1", 32, 40),
    10: BlockType("Q2_K", 256, 84, ((80, 2), (82, 2))),
    11: BlockType("Q3_K", 256, 110, ((108, 2),)),
    12: BlockType("Q4_K", 256, 144, ((0, 2), (2, 2))),
    13: BlockType("Q5_K", 256, 176, ((0, 2), (2, 2))),
    14: BlockType("Q6_K", 256, 210, ((208, 2),)),
    15: BlockType("Q8_K", 256, 292),
    16: BlockType("IQ2_XXS", 256, 66),
    17: BlockType("IQ2_XS", 256, 74),
    18: BlockType("IQ3_XXS", 256, 98),
    19: BlockType("IQ1_S", 256, 50),
    20: BlockType("IQ4_NL", 32, 18, ((0, 2),)),
    21: BlockType("IQ3_S", 256, 110),
    22: BlockType("IQ2_S", 256, 82),
    23: BlockType("IQ4_XS", 256, 136, ((0, 2), (2, 2))),
    24: BlockType("I8", 1, 1, ()),
    25: BlockType("I16", 1, 2, ((0, 2),)),
    26: BlockType("I32", 1, 4, ((0, 4),)),
    27: BlockType("I64", 1, 8, ((0, 8),)),
    28: BlockType("F64", 1, 8, ((0, 8),)),
    29: BlockType("IQ1_M", 256, 56),
    30: BlockType("BF16", 1, 2, ((0, 2),)),
    34: BlockType("TQ1_0", 256, 54, ((52, 2),)),
    35: BlockType("TQ2_0", 256, 66, ((64, 2),)),
    39: BlockType("MXFP4", 32, 17, ()),
    40: BlockType("NVFP4", 64, 36, ()),
    41: BlockType("Q1_0", 128, 18, ((0, 2),)),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """What a file says of a tensor.

    Attributes:
        name: of the tensor.
        type: its number, a key of `BLOCK_TYPES`.
        shape: rows first, [out, in] of a matrix; the last axis is the one whose weights stand one behind the other.
        file: number of the part that holds it.
        start: the byte at which it begins there.
    """

    name: str
    type: int
    shape: tuple[int, ...]
    file: int
    start: int

    @property
    def type_name(self) -> str:
        """As ggml says it: Q4_K."""
        return BLOCK_TYPES[self.type].name

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] // BLOCK_TYPES[self.type].weights * BLOCK_TYPES[self.type].nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return math.prod(self.shape[:-1]) * self.row_bytes


def turned(blocks: np.ndarray, type_: BlockType) -> np.ndarray:
    """Blocks of the other byte order, uint8 [rows, bytes]: a copy."""
    order = np.arange(type_.nbytes)
    for offset, size in type_.numbers or ():
        order[offset : offset + size] = order[offset : offset + size][::-1]
    each = blocks.reshape(-1, type_.nbytes)
    return np.take(each, order, axis=1).reshape(blocks.shape)
