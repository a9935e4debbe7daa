"""Converts ggml's blocks to `QTensor`s and back, in NumPy, without changing codes or scales.

    weight_MK = ggml.unpack("Q4_K", blocks)           # blocks: uint8 [M, bytes of a row]
    kind, blocks = ggml.pack(weight_MK)               # the same bytes
    weight_KM = ggml.transposed(weight_MK)            # as models want it

ggml stores weights as [M, K], with K contiguous and in blocks: `axis` -1. FORMAT.md, "Conversion from other formats",
lists the scheme of each type.
"""

from typing import Any

import ml_dtypes
import numpy as np

from quant.ggml_match import described, explained, fitted, holder, nearest, type_of
from quant.ggml_types import TYPES, Kind, Packed, Type, abstract, named, transposed
from quant.qtensor import QTensor

__all__ = [
    "TYPES",
    "Type",
    "abstract",
    "described",
    "explained",
    "floats",
    "named",
    "nearest",
    "pack",
    "transposed",
    "type_of",
    "unpack",
]

# Bytes of blocks that are converted at once: intermediate results stay in a core's cache.
_CHUNK = 1 << 18


def unpack(kind: Kind, blocks: np.ndarray) -> QTensor:
    """Converts blocks to a weight with the same codes and scales.

    Args:
        kind: a type with `packed`, its name or number.
        blocks: uint8 [..., M, bytes of a row], contiguous.

    Returns:
        A QTensor [..., M, K] of NumPy arrays, `axis` -1.

    Raises:
        ValueError: for another type, or rows that are not whole blocks.
    """
    found = named(kind)
    if found.packed is None:
        raise ValueError(f"blocks of type {found.name}: expected a type that is kept packed; `floats` dequantizes it")
    packed, count = found.packed, _whole_blocks(found, blocks)
    records = _records(packed, np.ascontiguousarray(blocks).reshape(-1, found.nbytes))
    parts = {name: np.empty((len(records), width), np.uint8) for name, width in packed.widths.items()}
    for start in range(0, len(records), step := max(1, _CHUNK // found.nbytes)):
        chunk = slice(start, start + step)
        for move in packed.moves:
            if move.forward is None:
                _opaque(parts[move.parts[0]])[chunk] = records[move.fields[0]][chunk]
                continue
            made = move.forward(*(_field(records[chunk], name) for name in move.fields))
            for name, bytes_ in zip(move.parts, made if isinstance(made, tuple) else (made,), strict=True):
                parts[name][chunk] = bytes_

    def leaf(name: str) -> np.ndarray:
        part = parts[name].reshape(*blocks.shape[:-1], count * packed.widths[name])
        return part.view(np.dtype(packed.part_dtype(name)).newbyteorder("<"))

    return packed.build(leaf).validate()


def pack(weight: Any, kind: Kind | None = None) -> tuple[Type, np.ndarray]:
    """Converts a weight to blocks: undoes `unpack`, bit for bit.

    Args:
        weight: a QTensor [..., M, K], `axis` -1, of NumPy arrays or arrays that NumPy can convert; or an array of
            floats.
        kind: the type, its name or number; default: `type_of(weight)`.

    Returns:
        The type, and uint8 [..., M, bytes of a row].

    Raises:
        ValueError: if no type, or not the given one, can hold the weight.
    """
    found = named(kind) if kind is not None else holder(weight)
    if not isinstance(weight, QTensor) and found == type_of(weight):
        return found, np.ascontiguousarray(weight).view(np.uint8)
    packed = found.packed
    if packed is None or not packed.returns:
        raise ValueError(f"packing to {found.name}: expected a type that quantized weights can be converted to")
    leaves = fitted(weight, found)
    parts = {
        name: np.ascontiguousarray(leaves[name]).view(np.uint8).reshape(-1, width)
        for name, width in packed.widths.items()
    }
    length = weight.shape[-1]
    blocks = np.empty((*weight.shape[:-1], found.row_bytes(length)), np.uint8)
    records = _records(packed, blocks.reshape(-1, found.nbytes))
    for start in range(0, len(records), step := max(1, _CHUNK // found.nbytes)):
        chunk = slice(start, start + step)
        for move in packed.moves:
            if move.forward is None:
                records[move.fields[0]][chunk] = _opaque(parts[move.parts[0]])[chunk]
                continue
            assert move.backward is not None
            made = move.backward(*(parts[name][chunk] for name in move.parts))
            for name, bytes_ in zip(move.fields, made if isinstance(made, tuple) else (made,), strict=True):
                records[name][chunk] = _opaque(np.ascontiguousarray(bytes_))
    return found, blocks


def floats(kind: Kind, blocks: np.ndarray) -> np.ndarray:
    """Converts blocks to an array: floats in their own dtype, types without an equivalent `QTensor` in float32.

    Args:
        kind: the type, its name or number: F32, F16, BF16, Q1_0, IQ1_S, IQ1_M, IQ2_*, IQ3_*.
        blocks: uint8 [..., bytes of a row].

    Returns:
        [..., K]; for types of floats a view.

    Raises:
        ValueError: for another type, rows that are not whole blocks, or if the type needs the `gguf` package, which is
            missing.
    """
    found = named(kind)
    _whole_blocks(found, blocks)
    if found.dtype is not None:
        dtype = np.dtype(ml_dtypes.bfloat16 if found.dtype == "bfloat16" else found.dtype)
        return np.ascontiguousarray(blocks).view(dtype)
    if not found.dequantized:
        raise ValueError(f"floats of type {found.name}: expected floats, or a type without an equivalent QTensor")
    if found.name == "Q1_0":  # a bit of 1 is the scale, a bit of 0 its negative
        records = np.ascontiguousarray(blocks).reshape(-1, found.nbytes)
        scale = np.ascontiguousarray(records[:, :2]).view("<f2").astype(np.float32)
        signs = np.unpackbits(records[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
        return (scale * signs).reshape(*blocks.shape[:-1], -1)
    try:
        import gguf
    except ImportError:
        raise ValueError(f"a tensor of type {found.name} needs the gguf package to be read: pip install gguf") from None
    # Damaged files have infinite scales: callers check for values that are not finite.
    with np.errstate(all="ignore"):
        made = gguf.quants.dequantize(np.ascontiguousarray(blocks), gguf.GGMLQuantizationType(found.number))
    return np.asarray(made, np.float32)


def _whole_blocks(kind: Type, blocks: np.ndarray) -> int:
    """Returns the number of blocks of a row."""
    if blocks.dtype != np.uint8 or blocks.ndim < 1 or blocks.shape[-1] % kind.nbytes:
        raise ValueError(
            f"blocks of type {kind.name}, {blocks.dtype} {blocks.shape}: expected uint8 rows of {kind.nbytes} bytes"
        )
    return blocks.shape[-1] // kind.nbytes


def _records(packed: Packed, blocks: np.ndarray) -> np.ndarray:
    """Views uint8 [N, bytes of a block] as N records of the block's fields."""
    return blocks.view(np.dtype([(name, f"V{width}") for name, width in packed.fields.items()])).reshape(-1)


def _field(records: np.ndarray, name: str) -> np.ndarray:
    """Returns a field of records as contiguous uint8 [N, bytes]."""
    field = np.ascontiguousarray(records[name])
    return field.view(np.uint8).reshape(len(records), -1)


def _opaque(bytes_: np.ndarray) -> np.ndarray:
    """Views uint8 [N, w] as N items of w bytes, which NumPy moves as wholes."""
    return bytes_.view(f"V{bytes_.shape[1]}").reshape(-1)
