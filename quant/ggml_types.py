"""ggml's tensor types: their numbers and blocks, and the equivalent quantized weights of FORMAT.md.

Numbers are from `enum ggml_type` in ggml.h, blocks from the structures in ggml-common.h; both match gguf 0.19's
constants.py. The fields of a block are listed in memory order.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from quant import ggml_moves as moves
from quant.qtensor import QTensor
from quant.scheme import Scheme

# Tiles of a transposition: rows in bytes, columns. The rows fill whole cache lines. A tile is first copied to rows that
# are not a power of two apart: otherwise all rows would compete for the same cache sets.
_TILE_BYTES, _TILE_COLUMNS, _TILE_GAP = 128, 512, 64


@dataclasses.dataclass(frozen=True)
class Move:
    """Conversion of some fields of a block to some parts of a weight.

    Attributes:
        fields: names of the fields.
        parts: names of the parts as in FORMAT.md: `planes.0`, `scale`, `scale.planes.1`, `offset.scale`, ….
        forward: converts uint8 [N, bytes] of each field to those of the parts; None: the bytes stay the same.
        backward: undoes `forward`; None beside a `forward`: it cannot be undone.
    """

    fields: tuple[str, ...]
    parts: tuple[str, ...]
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class Packed:
    """The quantized weight that is equivalent to the blocks of a type.

    Attributes:
        scheme: name of the codes' scheme.
        fields: bytes of each field of a block, in memory order.
        moves: conversions; every field and every part is in one of them.
        widths: bytes of each part for one block.
        second: name of the scheme of quantized scales; None: scales are floats or bytes.
        scale_dtype: dtype of the scales of the last level.
    """

    scheme: str
    fields: dict[str, int]
    moves: tuple[Move, ...]
    widths: dict[str, int]
    second: str | None = None
    scale_dtype: str = "float16"

    @property
    def offset(self) -> bool:
        """Whether there is an offset, in the same form as the scale."""
        return any(part.startswith("offset") for part in self.widths)

    @property
    def returns(self) -> bool:
        """Whether the weight can be converted back to blocks."""
        return all(move.forward is None or move.backward is not None for move in self.moves)

    def build(self, leaf: Callable[[str], Any]) -> QTensor:
        """Builds the weight [..., M, K] from its parts by name."""

        def level(prefix: str, scheme: str, scale: Any, offset: Any = None) -> QTensor:
            planes = tuple(leaf(name) for name in sorted(self.widths) if name.startswith(f"{prefix}planes."))
            return QTensor(planes, scale, offset=offset, scheme=Scheme.named(scheme), axis=-1)

        def plane(name: str) -> Any:
            return leaf(name) if self.second is None else level(f"{name}.", self.second, leaf(f"{name}.scale"))

        return level("", self.scheme, plane("scale"), plane("offset") if self.offset else None)

    def part_dtype(self, part: str) -> str:
        """Dtype of the array of a part."""
        return "uint8" if "planes." in part else self.scale_dtype


@dataclasses.dataclass(frozen=True)
class Type:
    """A tensor type of ggml.

    Attributes:
        number: number of the type in files.
        name: name in ggml's constants, without `GGML_TYPE_`.
        block: elements per block.
        nbytes: bytes per block.
        packed: the equivalent quantized weight, or None.
        dtype: "float32", "float16" or "bfloat16" for types of floats, else None.
        dequantized: whether the type has no equivalent quantized weight, so that `floats` converts it to float32. Types
            with neither of the three are not types of weights.
    """

    number: int
    name: str
    block: int
    nbytes: int
    packed: Packed | None = None
    dtype: str | None = None
    dequantized: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, counting everything in a block."""
        return 8 * self.nbytes / self.block

    def row_bytes(self, length: int) -> int:
        """Returns the bytes of a row of `length` elements.

        Raises:
            ValueError: if the length is not a multiple of the block.
        """
        if length % self.block:
            raise ValueError(f"rows of {length} in {self.name}: expected a multiple of {self.block}")
        return length // self.block * self.nbytes


_AS_IT_IS = Move(("qs",), ("planes.0",))
_D = Move(("d",), ("scale",))
_D2 = Move(("d",), ("scale.scale",))
_M = Move(("m",), ("offset",))
_MIN2 = Move(("dmin",), ("offset.scale",), moves.negate_half, moves.negate_half)
_FIFTH = Move(("qh",), ("planes.1",), moves.deal_fifth_bits, moves.gather_fifth_bits)
_NIBBLES = Move(("qs",), ("planes.0",), moves.deal_nibbles_16, moves.deal_nibbles_16)
_QUARTERS = Move(("qs",), ("planes.0",), moves.deal_quarters, moves.gather_quarters)
_K_PARTS = ("scale.planes.0", "scale.planes.1", "offset.planes.0", "offset.planes.1")
_K_SCALES = Move(("scales",), _K_PARTS, moves.split_k_scales, moves.join_k_scales)
_K_WIDTHS = {"scale.scale": 2, "offset.scale": 2, **dict(zip(_K_PARTS, (4, 2, 4, 2), strict=True))}


def _legacy(scheme: str, fields: dict[str, int], *extra: Move, **widths: int) -> Packed:
    """Returns a type with groups of 32 and a float16 scale, in a block of one group."""
    named = {"planes.0": fields["qs"], "scale": 2, **({"offset": 2} if "m" in fields else {})}
    if "qh" in fields:
        named["planes.1"] = 4
    return Packed(scheme, fields, (_D, *([_M] if "m" in fields else []), *extra), named)


_Q2_K = Packed(
    "uint2",
    {"scales": 16, "qs": 64, "d": 2, "dmin": 2},
    (
        *(_D2, _MIN2, _QUARTERS),
        Move(("scales",), ("scale.planes.0", "offset.planes.0"), moves.split_nibbles, moves.join_nibbles),
    ),
    {"planes.0": 64, "scale.planes.0": 8, "scale.scale": 2, "offset.planes.0": 8, "offset.scale": 2},
    "uint4",
)
_Q3_K = Packed(
    "int3",
    {"hmask": 32, "qs": 64, "scales_l": 8, "scales_h": 4, "d": 2},
    (
        *(_D2, _QUARTERS, Move(("scales_l",), ("scale.planes.0",)), Move(("scales_h",), ("scale.planes.1",))),
        Move(("hmask",), ("planes.1",), moves.deal_bits_16, moves.gather_bits_16),
    ),
    {"planes.0": 64, "planes.1": 32, "scale.planes.0": 8, "scale.planes.1": 4, "scale.scale": 2},
    "int6",
)
_Q4_K = Packed(
    "uint4",
    {"d": 2, "dmin": 2, "scales": 12, "qs": 128},
    (_D2, _MIN2, _K_SCALES, _NIBBLES),
    {"planes.0": 128, **_K_WIDTHS},
    "uint6",
)
_Q5_K = Packed(
    "uint5",
    {"d": 2, "dmin": 2, "scales": 12, "qh": 32, "qs": 128},
    (_D2, _MIN2, _K_SCALES, _NIBBLES, Move(("qh",), ("planes.1",), moves.deal_bits_32, moves.deal_bits_32)),
    {"planes.0": 128, "planes.1": 32, **_K_WIDTHS},
    "uint6",
)
_Q6_K = Packed(
    "int6",
    {"ql": 128, "qh": 64, "scales": 16, "d": 2},
    (
        Move(("ql",), ("planes.0",), moves.deal_q6_low, moves.gather_q6_low),
        Move(("qh",), ("planes.1",), moves.deal_quarters, moves.gather_quarters),
        *(Move(("scales",), ("scale.planes.0",), moves.invert_sign, moves.invert_sign), _D2),
    ),
    {"planes.0": 128, "planes.1": 64, "scale.planes.0": 16, "scale.scale": 2},
    "int8",
)
_IQ4_XS = Packed(
    "iq4_nl",
    {"d": 2, "scales_h": 2, "scales_l": 4, "qs": 128},
    (
        *(_D2, _AS_IT_IS, Move(("scales_l",), ("scale.planes.0",), moves.deal_xs_low, moves.gather_xs_low)),
        Move(("scales_h",), ("scale.planes.1",), moves.deal_xs_high, moves.gather_xs_high),
    ),
    {"planes.0": 128, "scale.planes.0": 4, "scale.planes.1": 2, "scale.scale": 2},
    "int6",
)
_TQ1_0 = Packed(
    "ternary",
    {"qs": 48, "qh": 4, "d": 2},
    (Move(("qs", "qh"), ("planes.0",), moves.ternary_of_powers), _D),
    {"planes.0": 64, "scale": 2},
)
_TQ2_0 = Packed(
    "ternary",
    {"qs": 64, "d": 2},
    (Move(("qs",), ("planes.0",), moves.deal_ternary, moves.gather_ternary), _D),
    {"planes.0": 64, "scale": 2},
)
_INT8 = Move(("qs",), ("planes.0",), moves.invert_sign, moves.invert_sign)
_FP4_WIDTHS = ({"planes.0": 16, "scale": 1}, {"planes.0": 32, "scale": 4})

_LIST = (
    Type(0, "F32", 1, 4, dtype="float32"),
    Type(1, "F16", 1, 2, dtype="float16"),
    Type(2, "Q4_0", 32, 18, _legacy("int4", {"d": 2, "qs": 16}, _AS_IT_IS)),
    Type(3, "Q4_1", 32, 20, _legacy("uint4", {"d": 2, "m": 2, "qs": 16}, _AS_IT_IS)),
    Type(6, "Q5_0", 32, 22, _legacy("int5", {"d": 2, "qh": 4, "qs": 16}, _FIFTH, _AS_IT_IS)),
    Type(7, "Q5_1", 32, 24, _legacy("uint5", {"d": 2, "m": 2, "qh": 4, "qs": 16}, _FIFTH, _AS_IT_IS)),
    Type(8, "Q8_0", 32, 34, _legacy("int8", {"d": 2, "qs": 32}, _INT8)),
    Type(9, "Q8_1", 32, 36),
    Type(10, "Q2_K", 256, 84, _Q2_K),
    Type(11, "Q3_K", 256, 110, _Q3_K),
    Type(12, "Q4_K", 256, 144, _Q4_K),
    Type(13, "Q5_K", 256, 176, _Q5_K),
    Type(14, "Q6_K", 256, 210, _Q6_K),
    Type(15, "Q8_K", 256, 292),
    Type(16, "IQ2_XXS", 256, 66, dequantized=True),
    Type(17, "IQ2_XS", 256, 74, dequantized=True),
    Type(18, "IQ3_XXS", 256, 98, dequantized=True),
    Type(19, "IQ1_S", 256, 50, dequantized=True),
    Type(20, "IQ4_NL", 32, 18, _legacy("iq4_nl", {"d": 2, "qs": 16}, _AS_IT_IS)),
    Type(21, "IQ3_S", 256, 110, dequantized=True),
    Type(22, "IQ2_S", 256, 82, dequantized=True),
    Type(23, "IQ4_XS", 256, 136, _IQ4_XS),
    Type(24, "I8", 1, 1),
    Type(25, "I16", 1, 2),
    Type(26, "I32", 1, 4),
    Type(27, "I64", 1, 8),
    Type(28, "F64", 1, 8),
    Type(29, "IQ1_M", 256, 56, dequantized=True),
    Type(30, "BF16", 1, 2, dtype="bfloat16"),
    Type(34, "TQ1_0", 256, 54, _TQ1_0),
    Type(35, "TQ2_0", 256, 66, _TQ2_0),
    Type(39, "MXFP4", 32, 17, Packed("mxfp4", {"d": 1, "qs": 16}, (_D, _AS_IT_IS), _FP4_WIDTHS[0], None, "uint8")),
    Type(40, "NVFP4", 64, 36, Packed("nvfp4", {"d": 4, "qs": 32}, (_D, _AS_IT_IS), _FP4_WIDTHS[1], None, "uint8")),
    Type(41, "Q1_0", 128, 18, dequantized=True),
)
TYPES: dict[str, Type] = {each.name: each for each in _LIST}
# Types of forks of ggml.
_ELSEWHERE: dict[Any, str] = {
    36: "I2_S in microsoft/BitNet's fork of llama.cpp, which ggml does not have; take the model's Hugging Face folder",
}
# A type, or its name or number.
Kind = str | int | Type


def named(kind: Kind) -> Type:
    """Returns the type with a name, such as `Q4_K`, or a number; returns a `Type` unchanged.

    Raises:
        ValueError: for an unknown name or number.
    """
    if isinstance(kind, Type):
        return kind
    found = TYPES.get(kind) if isinstance(kind, str) else next((t for t in _LIST if t.number == kind), None)
    if found is None:
        hint = f": {_ELSEWHERE[kind]}" if kind in _ELSEWHERE else ""
        known = ", ".join(f"{t.name} ({t.number})" for t in _LIST)
        raise ValueError(f"ggml type {kind!r}{hint}: expected one of {known}")
    return found


def abstract(kind: Kind, shape: tuple[int, ...]) -> Any:
    """Returns what `unpack` or `floats` returns for a tensor of a type, with `jax.ShapeDtypeStruct` for arrays.

    Args:
        kind: the type, its name or number.
        shape: shape of the weight, [..., M, K].

    Raises:
        ValueError: for a type that weights are not stored in, or rows that are not whole blocks.
    """
    found = named(kind)
    found.row_bytes(shape[-1] if shape else 1)
    packed = found.packed
    if packed is None:
        if found.dtype is None and not found.dequantized:
            raise ValueError(f"a weight of type {found.name}: expected one that weights are stored in")
        return jax.ShapeDtypeStruct(tuple(shape), found.dtype or "float32")
    count = shape[-1] // found.block

    def leaf(name: str) -> jax.ShapeDtypeStruct:
        dtype = np.dtype(packed.part_dtype(name))
        return jax.ShapeDtypeStruct((*shape[:-1], count * packed.widths[name] // dtype.itemsize), dtype)

    return packed.build(leaf)


def transposed(weight: Any) -> Any:
    """Swaps the last two axes of every array of a weight, and `axis` with them: from ggml's form to models' and back.

    The weight is a QTensor or an array; arrays are NumPy arrays, or abstract, which only changes their shapes.
    """
    moved = jax.tree.map(_transpose, weight)
    return moved.along(-3 - weight.axis) if isinstance(weight, QTensor) else moved


def _transpose(x: Any) -> Any:
    """Transposes [..., A, B] to a contiguous [..., B, A]."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)
    x = np.asarray(x)
    made = np.empty((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)
    height = _TILE_BYTES // x.dtype.itemsize
    buffer = np.empty((*x.shape[:-2], height, _TILE_COLUMNS + _TILE_GAP // x.dtype.itemsize), x.dtype)
    for top in range(0, x.shape[-2], height):
        for left in range(0, x.shape[-1], _TILE_COLUMNS):
            part = x[..., top : top + height, left : left + _TILE_COLUMNS]
            tile = buffer[..., : part.shape[-2], : part.shape[-1]]
            tile[...] = part
            made[..., left : left + _TILE_COLUMNS, top : top + height] = np.swapaxes(tile, -1, -2)
    return made
