"""How tiles on a CPU keep a second level of scales: a code for each group in a byte, or two codes of 4 bits in one.

At rest the codes of scales are packed as those of weights are, so that a byte holds codes of groups far from each
other, and the place of a group's code depends on the group. In a byte of its own each is where the group's bytes are: a
step of a sum takes it like a scale. That is 0.125 bits a weight more for 6-bit codes of groups of 16, less for others.
Scales and offsets with codes of up to 4 bits each (ggml's Q2_K) share bytes: a byte for each would be 0.5 bits more.
"""

import dataclasses
import types
from typing import Any, TypeGuard

import numpy as np

from quant.packing import merge_groups, pack, plane_bits, split_groups
from quant.qtensor import Plane, QTensor, dequantize
from quant.scheme import SCHEMES, Scheme

# Bits of one of two codes that share a byte: the scale's are the low ones.
PAIR_BITS = 4


def compact(weight: QTensor, xp: types.ModuleType) -> QTensor:
    """A weight with scales for every group and output, of one level or of two with codes in bytes.

    Args:
        weight: of arrays.
        xp: what computes: `jax.numpy`, or `numpy` for a weight of NumPy arrays.

    Returns:
        The weight with other planes of scales, zero points and offsets. Codes of a second level have the schemes int8
        or uint8. If scales and offsets share bytes, `scale` holds them and `offset` has no planes of its own.
    """
    scale, offset = weight.scale, weight.offset
    if _keeps_codes(scale) and _keeps_codes(offset) and _may_pair(scale) and _may_pair(offset):
        low, high = (_codes(plane, weight, xp) for plane in (scale, offset))
        scale = _of_bytes(scale, low | high << xp.uint8(PAIR_BITS), weight, xp)
        offset = dataclasses.replace(_of_bytes(offset, high, weight, xp), planes=())
    else:
        scale = _compact_plane(scale, weight, xp)
        offset = None if offset is None else _compact_plane(offset, weight, xp)
    zero = None if weight.zero is None else _broadcast(weight.zero, weight, xp)
    return dataclasses.replace(weight, scale=scale, zero=zero, offset=offset)


def level_schemes(weight: QTensor) -> tuple[Scheme | None, Scheme | None]:
    """Of the codes of scales and of offsets, where `compact` keeps them as codes: what `expand` needs."""
    scale, offset = weight.scale, weight.offset
    return scale.scheme if _keeps_codes(scale) else None, offset.scheme if _keeps_codes(offset) else None


def plain(weight: QTensor) -> QTensor:
    """What `compact` made, as a QTensor like others: codes of scales and of offsets in bytes of their own."""
    if not is_paired(weight):
        return weight
    assert isinstance(weight.scale, QTensor) and isinstance(weight.offset, QTensor)
    (pairs,) = weight.scale.planes
    scale = dataclasses.replace(weight.scale, planes=(pairs & (2**PAIR_BITS - 1),))
    offset = dataclasses.replace(weight.offset, planes=(pairs >> PAIR_BITS,))
    return dataclasses.replace(weight, scale=scale, offset=offset)


def expand(weight: QTensor, levels: tuple[Scheme | None, Scheme | None]) -> QTensor:
    """Undoes `compact`: the second level in the schemes that it had."""
    weight = plain(weight)
    for name, scheme in zip(("scale", "offset"), levels, strict=True):
        if scheme is not None:
            part: Any = {name: _repacked(getattr(weight, name), scheme)}
            weight = dataclasses.replace(weight, **part)
    return weight


def is_paired(weight: QTensor) -> bool:
    """Whether scales and offsets share bytes."""
    return isinstance(weight.offset, QTensor) and not weight.offset.planes


def _keeps_codes(plane: Plane | None) -> TypeGuard[QTensor]:
    """Whether a plane is of two levels that a loop can make floats of: whole numbers times a scale."""
    if not isinstance(plane, QTensor) or plane.scheme.kind not in ("int", "uint"):
        return False
    rest = (plane.zero, plane.offset, plane.order, plane.outlier)
    return all(part is None for part in rest) and not isinstance(plane.scale, QTensor)


def _may_pair(plane: QTensor) -> bool:
    return plane.scheme.kind == "uint" and plane.scheme.bits <= PAIR_BITS


def _compact_plane(plane: Plane, weight: QTensor, xp: types.ModuleType) -> Plane:
    """Scales or offsets as `compact` returns them, where they share no bytes."""
    if not _keeps_codes(plane):
        return _broadcast(xp.asarray(dequantize(plane)) if isinstance(plane, QTensor) else plane, weight, xp)
    return _of_bytes(plane, _codes(plane, weight, xp), weight, xp)


def _codes(plane: QTensor, weight: QTensor, xp: types.ModuleType) -> Any:
    """Codes of a second level, uint8 for every group and output; those of int8 for all signed ones."""
    codes = _unpacked(plane, xp)
    if plane.scheme.kind == "int":
        codes = codes + xp.uint8(SCHEMES["int8"].bias - plane.scheme.bias)
    return _broadcast(codes, weight, xp)


def _unpacked(plane: QTensor, xp: types.ModuleType) -> Any:
    """`unpack` by NumPy too: nothing is compiled while a model is loaded."""
    codes: Any = None
    first_bit = 0
    for packed, width in zip(plane.planes, plane_bits(plane.scheme.bits), strict=True):
        bytes_CnM = split_groups(packed, plane.group_size * width // 8, plane.axis)
        runs = [bytes_CnM >> xp.uint8(slot * width) & xp.uint8(2**width - 1) for slot in range(8 // width)]
        part_CgM = xp.concatenate(runs, axis=plane.axis) << xp.uint8(first_bit)
        codes, first_bit = part_CgM if codes is None else codes | part_CgM, first_bit + width
    return merge_groups(codes, plane.axis)


def _of_bytes(plane: QTensor, codes: Any, weight: QTensor, xp: types.ModuleType) -> QTensor:
    """A second level with these codes in bytes."""
    scale = _broadcast(plane.scale, weight, xp, groups=plane.scale.shape[plane.axis])
    return dataclasses.replace(plane, planes=(codes,), scale=scale, scheme=SCHEMES[f"{plane.scheme.kind}8"])


def _repacked(plane: QTensor, scheme: Scheme) -> QTensor:
    """A second level with codes as they are at rest."""
    (codes,) = plane.planes
    if scheme.kind == "int":
        codes = codes - np.uint8(SCHEMES["int8"].bias - scheme.bias)
    planes = pack(codes, scheme.bits, plane.group_size, axis=plane.axis)
    return dataclasses.replace(plane, planes=planes, scheme=scheme)


def _broadcast(plane: Any, weight: QTensor, xp: types.ModuleType, groups: int | None = None) -> Any:
    """An array for every output, and so many groups: those of the weight unless given."""
    shape = list(weight.shape)
    shape[weight.axis] = weight.shape[weight.axis] // weight.group_size if groups is None else groups
    return xp.broadcast_to(plane, tuple(shape))
