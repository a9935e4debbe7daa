"""Packs codes of 2 to 8 bits into `uint8` planes, and unpacks them. FORMAT.md specifies the layout byte by byte.

Dimension key: `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group, `n` bytes of a group in
one plane. Shapes are written for `axis=-2`, [..., K, M]; with `axis=-1` they are [..., M, K] and everything else holds.

`pack` and `unpack` use shifts, masks and reshapes of whole axes: they work under jit and vmap on any leading axes, and
lower to elementwise code that vectorises over M. They work on integers, so they have no derivatives.
"""

import functools
import operator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

FORMAT_VERSION = 1

# Code bits -> the bits of each plane, low-order bits first. The bits of a plane must divide 8: codes of 3, 5 and 6 bits
# have two planes and codes of 7 bits three, so that no code crosses a byte.
PLANE_BITS: dict[int, tuple[int, ...]] = {8: (8,), 7: (4, 2, 1), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}


def plane_bits(bits: int) -> tuple[int, ...]:
    """Returns the bits of each plane that codes of `bits` bits are split into, low-order bits first.

    Raises:
        ValueError: for a number of bits that the format does not support.
    """
    if bits not in PLANE_BITS:
        raise ValueError(f"codes of {bits} bits: expected one of {sorted(PLANE_BITS)}")
    return PLANE_BITS[bits]


def check_group(length: int, group_size: int, bits: int) -> None:
    """Checks that groups divide an axis, and that a group fills whole bytes of each plane.

    Raises:
        ValueError: if not.
    """
    if group_size < 1 or length % group_size:
        raise ValueError(
            f"groups of {group_size} do not divide an axis of {length}: choose a group size that divides it"
        )
    multiple = 8 // min(plane_bits(bits))
    if group_size % multiple:
        raise ValueError(
            f"a group of {group_size} codes of {bits} bits does not fill whole bytes: "
            f"choose a group size that is a multiple of {multiple}, or 8 bits"
        )


def split_groups(x: jax.Array, group_size: int, axis: int) -> jax.Array:
    """[..., K, M] -> [..., C, g, M]: `axis` becomes (groups, elements). The elements keep the same (negative) axis."""
    position = axis_position(x.shape, axis)
    count = x.shape[position] // group_size
    return x.reshape(*x.shape[:position], count, group_size, *x.shape[position + 1 :])


def merge_groups(x: jax.Array, axis: int) -> jax.Array:
    """[..., C, g, M] -> [..., K, M]: undoes `split_groups`."""
    position = axis_position(x.shape, axis)
    return x.reshape(*x.shape[: position - 1], x.shape[position - 1] * x.shape[position], *x.shape[position + 1 :])


def pack(codes: jax.Array, bits: int, group_size: int, *, axis: int = -2) -> tuple[jax.Array, ...]:
    """Packs codes into bit planes.

    Args:
        codes: uint8 [..., K, M] in [0, 2**bits). Larger ones are an error; under jit they lose their high bits.
        bits: one of `PLANE_BITS`, 2 to 8.
        group_size: g, elements of a group; divides K and fills whole bytes.
        axis: -2 or -1, the axis that groups run along.

    Returns:
        One uint8 array [..., K * p / 8, M] for each plane of p bits, low-order bits first.

    Raises:
        ValueError: if the dtype, bits, group size, axis or a code is not valid.
    """
    codes = jnp.asarray(codes)
    if codes.dtype != jnp.uint8:
        raise ValueError(f"codes of dtype {codes.dtype}: expected uint8, offset them to [0, 2**bits) and cast")
    check_group(codes.shape[axis_position(codes.shape, axis)], group_size, bits)
    if not isinstance(codes, jax.core.Tracer) and codes.size and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits: expected codes below {2**bits}")
    return _pack(codes, bits, group_size, axis)


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _pack(codes: jax.Array, bits: int, group_size: int, axis: int) -> tuple[jax.Array, ...]:
    """`pack` without its checks."""
    groups_CgM = split_groups(codes, group_size, axis)
    planes, shift = [], 0
    for width in plane_bits(bits):
        part_CgM = (groups_CgM >> shift) & (2**width - 1)
        planes.append(merge_groups(_pack_plane(part_CgM, width, axis), axis))
        shift += width
    return tuple(planes)


def _pack_plane(part_CgM: jax.Array, width: int, axis: int) -> jax.Array:
    """Packs values below 2**width, [..., C, g, M], into bytes [..., C, n, M].

    Slot i of byte j is element j + i * n: a slot is a contiguous run of the group, never every other element.
    """
    runs_CnM = jnp.split(part_CgM, 8 // width, axis)
    return functools.reduce(operator.or_, (run << (slot * width) for slot, run in enumerate(runs_CnM)))


@functools.partial(jax.jit, static_argnames=("bits", "group_size", "axis", "arithmetic"), inline=True)
def unpack(
    planes: tuple[jax.Array, ...],
    bits: int,
    group_size: int,
    *,
    axis: int = -2,
    arithmetic: Literal["integer", "float"] = "integer",
) -> jax.Array:
    """Undoes `pack`.

    Args:
        planes: uint8 [..., K * p / 8, M] for each plane of p bits, low-order bits first.
        bits: one of `PLANE_BITS`, 2 to 8.
        group_size: g, as given to `pack`.
        axis: -2 or -1, the axis that groups run along.
        arithmetic: "integer": shifts and masks. "float": products and `floor` in float32, exact, for exported programs
            whose runtime lacks such operations on bytes, or folds them ahead of time and keeps the unpacked results.

    Returns:
        Codes, uint8 [..., K, M], or float32 with "float" arithmetic.

    Raises:
        ValueError: if the planes do not fit bits, group size and axis.
    """
    widths = plane_bits(bits)
    check_planes(planes, bits, axis)
    check_group(planes[0].shape[axis] * 8 // widths[0], group_size, bits)
    parts, shift = [], 0
    for plane, width in zip(planes, widths, strict=True):
        bytes_CnM = split_groups(plane, group_size * width // 8, axis)
        part_CgM = (_unpack_plane_float if arithmetic == "float" else _unpack_plane)(bytes_CnM, width, axis)
        parts.append(part_CgM * part_CgM.dtype.type(2**shift) if shift else part_CgM)
        shift += width
    return merge_groups(functools.reduce(operator.add if arithmetic == "float" else operator.or_, parts), axis)


def unpack_runs(
    planes: tuple[jax.Array, ...],
    bits: int,
    group_size: int,
    *,
    axis: int = -2,
    arithmetic: Literal["integer", "float"] = "integer",
) -> list[jax.Array]:
    """Unpacks codes slot by slot without concatenation, for runtimes that write concatenated arrays out to memory.

    Returns:
        S runs of codes, each [..., C, g / S, M]: the first 1/S of every group, the second, and so on. S is the number
        of slots of a byte, in the plane that has the most.
    """
    widths = plane_bits(bits)
    check_planes(planes, bits, axis)
    slots = 8 // min(widths)
    size = group_size // slots
    grouped = [split_groups(plane, group_size * width // 8, axis) for plane, width in zip(planes, widths, strict=True)]
    runs = []
    for run in range(slots):
        parts, shift = [], 0
        for bytes_CnM, width in zip(grouped, widths, strict=True):
            slot, place = divmod(run, slots * width // 8)
            part_CnM = jax.lax.slice_in_dim(bytes_CnM, place * size, (place + 1) * size, axis=bytes_CnM.ndim + axis)
            if arithmetic == "float":
                wide_CnM = part_CnM.astype(jnp.float32)
                beyond_CnM = jnp.floor(wide_CnM * 2.0 ** (-width * (slot + 1))) * 2.0**width
                code_CnM = jnp.floor(wide_CnM * 2.0 ** (-width * slot)) - beyond_CnM
            else:
                code_CnM = (part_CnM >> (width * slot)) & (2**width - 1)
            parts.append(code_CnM * code_CnM.dtype.type(2**shift) if shift else code_CnM)
            shift += width
        runs.append(functools.reduce(operator.add, parts))
    return runs


def _unpack_plane(bytes_CnM: jax.Array, width: int, axis: int) -> jax.Array:
    """Unpacks bytes [..., C, n, M] to values below 2**width, [..., C, g, M].

    It is one broadcast shift over a new slot axis S before n. Merging (S, n) in this order moves no data, because a
    slot holds a run. If a byte held neighbours, the order would be (n, S), an interleaving that costs a TPU 28 times
    the traffic.
    """
    slots = 8 // width
    shift_S1M = (jnp.arange(slots, dtype=jnp.uint8) * width).reshape(slots, *(1,) * -axis)
    part_CSnM = (jnp.expand_dims(bytes_CnM, axis - 1) >> shift_S1M) & (2**width - 1)
    return merge_groups(part_CSnM, axis)


def _unpack_plane_float(bytes_CnM: jax.Array, width: int, axis: int) -> jax.Array:
    """Does `_unpack_plane` in float32: the byte shifted down to a slot, less its part beyond that slot."""
    slots = 8 // width
    slot_S1M = np.arange(slots, dtype=np.float32).reshape(slots, *(1,) * -axis)
    byte_C1nM = jnp.expand_dims(bytes_CnM, axis - 1).astype(jnp.float32)
    above_CSnM = jnp.floor(byte_C1nM * 2.0 ** (-width * slot_S1M))
    beyond_CSnM = jnp.floor(byte_C1nM * 2.0 ** (-width * (slot_S1M + 1)))
    return merge_groups(above_CSnM - 2.0**width * beyond_CSnM, axis)


def check_planes(planes: tuple[jax.Array, ...], bits: int, axis: int) -> None:
    """Checks number, dtype and shapes of planes against each other.

    Raises:
        ValueError: if they cannot be the planes of one tensor with codes of `bits` bits.
    """
    widths = plane_bits(bits)
    if len(planes) != len(widths):
        raise ValueError(f"{len(planes)} planes for codes of {bits} bits: expected {len(widths)}, of {widths} bits")
    for plane, width in zip(planes, widths, strict=True):
        if plane.dtype != jnp.uint8:
            raise ValueError(f"a plane of dtype {plane.dtype}: expected uint8, as `pack` returns")
        expected = list(planes[0].shape)
        position = axis_position(planes[0].shape, axis)
        expected[position] = expected[position] * width // widths[0]
        if plane.shape != tuple(expected) or planes[0].shape[position] * width % widths[0]:
            raise ValueError(
                f"a plane of {width} bits has shape {plane.shape}: expected {tuple(expected)} beside a plane of "
                f"{widths[0]} bits and shape {planes[0].shape}"
            )


def axis_position(shape: tuple[int, ...], axis: int) -> int:
    """Returns `axis` counted from the front.

    Raises:
        ValueError: if it is neither -1 nor -2, or the shape does not have that axis.
    """
    if axis not in (-1, -2):
        raise ValueError(f"axis {axis}: expected -2 (weights [..., K, M]) or -1 (tables [..., M, K])")
    if len(shape) < -axis:
        raise ValueError(f"shape {shape} has no axis {axis}: expected at least {-axis} axes")
    return len(shape) + axis
