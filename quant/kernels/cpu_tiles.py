"""The second level of scales in a CPU's tiles: one byte per group for its scale's code, or two 4-bit codes in one byte.

At rest, codes of scales are packed like those of weights: a byte holds codes of groups far from each other, and the
place of a group's code depends on the group. In tiles each code has its own byte at the position of its group, so that
a step of a sum reads it like a scale. That takes 0.125 more bits per weight for 6-bit codes of groups of 16, and less
for other types. Scales and offsets with codes of up to 4 bits each (ggml's Q2_K) share bytes: a byte for each would
take 0.5 bits more.
"""

import dataclasses
import types
from typing import Any, TypeGuard

import numpy as np

from quant.packing import merge_groups, pack, plane_bits, split_groups
from quant.qtensor import Plane, QTensor, dequantize
from quant.scheme import SCHEMES, Scheme

# Bits of each of two codes that share a byte: the scale has the low ones.
PAIR_BITS = 4


def compact(weight: QTensor, xp: types.ModuleType) -> QTensor:
    """Expands scales to every group and output, in one level or in two levels with codes in bytes.

    Args:
        weight: weight of JAX or NumPy arrays.
        xp: `jax.numpy`, or `numpy` for a weight of NumPy arrays.

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
    """Returns the schemes of quantized scales and offsets that `compact` keeps as codes; `expand` needs them."""
    scale, offset = weight.scale, weight.offset
    return scale.scheme if _keeps_codes(scale) else None, offset.scheme if _keeps_codes(offset) else None


def plain(weight: QTensor) -> QTensor:
    """Makes the result of `compact` an ordinary QTensor: codes of scales and of offsets get bytes of their own."""
    if not is_paired(weight):
        return weight
    assert isinstance(weight.scale, QTensor) and isinstance(weight.offset, QTensor)
    (pairs,) = weight.scale.planes
    scale = dataclasses.replace(weight.scale, planes=(pairs & (2**PAIR_BITS - 1),))
    offset = dataclasses.replace(weight.offset, planes=(pairs >> PAIR_BITS,))
    return dataclasses.replace(weight, scale=scale, offset=offset)


def expand(weight: QTensor, levels: tuple[Scheme | None, Scheme | None]) -> QTensor:
    """Undoes `compact`: packs the second level in the schemes that it had."""
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
    """Whether a plane has two levels that a loop can decode: integers times a scale."""
    if not isinstance(plane, QTensor) or plane.scheme.kind not in ("int", "uint"):
        return False
    rest = (plane.zero, plane.offset, plane.order, plane.outlier)
    return all(part is None for part in rest) and not isinstance(plane.scale, QTensor)


def _may_pair(plane: QTensor) -> bool:
    return plane.scheme.kind == "uint" and plane.scheme.bits <= PAIR_BITS


def _compact_plane(plane: Plane, weight: QTensor, xp: types.ModuleType) -> Plane:
    """Returns scales or offsets in the form of `compact` if they do not share bytes."""
    if not _keeps_codes(plane):
        return _broadcast(xp.asarray(dequantize(plane)) if isinstance(plane, QTensor) else plane, weight, xp)
    return _of_bytes(plane, _codes(plane, weight, xp), weight, xp)


def _codes(plane: QTensor, weight: QTensor, xp: types.ModuleType) -> Any:
    """Returns codes of a second level, uint8 for every group and output; signed ones become codes of int8."""
    codes = _unpacked(plane, xp)
    if plane.scheme.kind == "int":
        codes = codes + xp.uint8(SCHEMES["int8"].bias - plane.scheme.bias)
    return _broadcast(codes, weight, xp)


def _unpacked(plane: QTensor, xp: types.ModuleType) -> Any:
    """Does `unpack` also in NumPy, so that nothing is compiled while a model is loaded."""
    codes: Any = None
    first_bit = 0
    for packed, width in zip(plane.planes, plane_bits(plane.scheme.bits), strict=True):
        bytes_CnM = split_groups(packed, plane.group_size * width // 8, plane.axis)
        runs = [bytes_CnM >> xp.uint8(slot * width) & xp.uint8(2**width - 1) for slot in range(8 // width)]
        part_CgM = xp.concatenate(runs, axis=plane.axis) << xp.uint8(first_bit)
        codes, first_bit = part_CgM if codes is None else codes | part_CgM, first_bit + width
    return merge_groups(codes, plane.axis)


def _of_bytes(plane: QTensor, codes: Any, weight: QTensor, xp: types.ModuleType) -> QTensor:
    """Returns a second level with these codes in bytes."""
    scale = _broadcast(plane.scale, weight, xp, groups=plane.scale.shape[plane.axis])
    return dataclasses.replace(plane, planes=(codes,), scale=scale, scheme=SCHEMES[f"{plane.scheme.kind}8"])


def _repacked(plane: QTensor, scheme: Scheme) -> QTensor:
    """Returns a second level with its codes packed as at rest."""
    (codes,) = plane.planes
    if scheme.kind == "int":
        codes = codes - np.uint8(SCHEMES["int8"].bias - scheme.bias)
    planes = pack(codes, scheme.bits, plane.group_size, axis=plane.axis)
    return dataclasses.replace(plane, planes=planes, scheme=scheme)


def _broadcast(plane: Any, weight: QTensor, xp: types.ModuleType, groups: int | None = None) -> Any:
    """Broadcasts an array to every output and to `groups` groups; default: the weight's number of groups."""
    shape = list(weight.shape)
    shape[weight.axis] = weight.shape[weight.axis] // weight.group_size if groups is None else groups
    return xp.broadcast_to(plane, tuple(shape))
