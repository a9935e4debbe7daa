"""Products of 3 to 16 rows with tiles of packed bytes on a CPU: weights are dequantized in registers once for all rows.

For one or two rows (`cpu_sums.py`) sums are scaled, which saves products. With more rows each row has its own sums, and
scaling a sum must wait for its last product, which costs more than scaling the weights. So a step along K dequantizes
the weights of one register of outputs (code times scale, plus offset). They stay in registers and on the stack from row
to row; a row only multiplies and adds. benchmarks/NOTES.md has the measurements.

Dimension key: `K` contraction axis, `M` outputs, `R` rows of activations, `t` tiles of the outputs, `h` registers of a
tile's lanes and `v` lanes of a register, `n` steps of whole groups along K, `u` groups in a step, `f` parts of a group
that are steps of their own (`u` or `f` is 1), `s` and `j` slot and byte, in its part, of a code in the plane that has
the fewest bits.
"""

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from quant.kernels import start_indices
from quant.kernels.cpu_sums import (
    E2M1_IN_FLOAT16,
    group_steps,
    largest_divisor,
    level_codes,
    sum_of,
    sum_steps,
    value_of,
)
from quant.packing import plane_bits
from quant.qtensor import Plane, QTensor, scale_values
from quant.scheme import E2M1, Scheme

# Weights of an output that a step dequantizes. With twice as many there are half as many sums to add, but more weights
# are on the stack: the time is the same.
STEP_WEIGHTS = 32
# Bytes of the sums of single steps that are written before they are added; beyond, outputs are computed in bands.
BAND_BYTES = 2 << 20


class _Steps(NamedTuple):
    """Division of K into `number` * `parts` steps, each of `groups` groups, or of the codes in `width` bytes of one."""

    number: int
    groups: int
    parts: int
    width: int


@functools.cache
def register_lanes() -> int:
    """Returns the outputs of a register: 16 with AVX-512, else 8 (which are two registers of 128 bits)."""
    cpuinfo = Path("/proc/cpuinfo")
    return 16 if cpuinfo.is_file() and " avx512f " in cpuinfo.read_text(errors="replace") else 8


@functools.partial(jax.jit, inline=True)  # Weights of the same shape are traced once.
def by_rows(x_RK: jax.Array, tiles: QTensor, layer: jax.Array | None) -> jax.Array:
    """Multiplies rows with a weight: [R, M] with the outputs of all tiles.

    Args:
        x_RK: float32.
        tiles: see `TiledWeight`.
        layer: int32 scalar if `tiles` is a stack, or None.
    """
    if layer is None:
        tiles, layer = jax.tree.map(lambda plane: plane[None], tiles), jnp.int32(0)
    R, steps = x_RK.shape[0], _steps(tiles)
    *_, count, _, lanes = tiles.planes[0].shape
    bands = -(-4 * R * count * lanes * steps.number * steps.parts // BAND_BYTES)
    band = -(-count // bands)
    if band == count:
        y_tRl = _band(x_RK, tiles, steps, layer, jnp.int32(0), count)
    else:

        def one(i: jax.Array, y_tRl: jax.Array) -> jax.Array:
            # The last band is moved back to end with the last tile.
            first = jnp.minimum(i * band, count - band)
            part_tRl = _band(x_RK, tiles, steps, layer, first, band)
            return jax.lax.dynamic_update_slice(y_tRl, part_tRl, start_indices(first, 0, 0))

        y_tRl = jax.lax.fori_loop(0, bands, one, jnp.zeros((count, R, lanes), jnp.float32))
    return jnp.swapaxes(y_tRl, 0, 1).reshape(R, -1)


def _steps(tiles: QTensor) -> _Steps:
    """Divides K into steps of up to `STEP_WEIGHTS` weights of an output, whose groups share second-level scales."""
    count, group, narrowest = tiles.scale.shape[-2], tiles.group_size, min(plane_bits(tiles.scheme.bits))
    if group <= STEP_WEIGHTS:
        groups = group_steps(tiles, STEP_WEIGHTS // group)
        return _Steps(count // groups, groups, 1, group * narrowest // 8)
    length = group * narrowest // 8
    width = largest_divisor(length, max(1, STEP_WEIGHTS * narrowest // 8))
    return _Steps(count, 1, length // width, width)


def _band(x_RK: jax.Array, tiles: QTensor, steps: _Steps, layer: jax.Array, first: jax.Array, size: int) -> jax.Array:
    """Multiplies with `size` tiles from `first` on: [t, R, l]."""
    R, lanes = x_RK.shape[0], tiles.shape[-1]
    take = functools.partial(_take, layer=layer, first=first, size=size)
    widths = plane_bits(tiles.scheme.bits)
    slots = 8 // min(widths)
    x_nfRusj = x_RK.reshape(R, steps.number, steps.groups, slots, steps.parts, -1).transpose(1, 4, 0, 2, 3, 5)
    terms = []

    @functools.cache  # The codes of a byte are used in several places.
    def take_byte(plane: int, group: int, run: int, j: int) -> jax.Array:
        runs = widths[plane] // min(widths)
        shape = steps.number, steps.groups, runs, steps.parts, steps.width
        return take(tiles.planes[plane], shape, (None, group, run, None, j))

    for group in range(steps.groups):
        scale_tnfhv, shift_tnfhv = _scale_and_shift(tiles, steps, take, group)
        for j in range(x_nfRusj.shape[-1]):
            for slot in range(slots):
                byte = functools.partial(take_byte, group=group, j=j)
                weight_tnfhv = _scaled_code(tiles.scheme, byte, slot, scale_tnfhv)
                if shift_tnfhv is not None:
                    weight_tnfhv += shift_tnfhv
                terms.append(weight_tnfhv[:, :, :, :, None] * x_nfRusj[:, :, None, :, group, slot, j, None])
    partial_tnfhRv = sum_of(terms)
    # One axis after another: with merged axes, locating a sum would take a division.
    sum_thRv = sum_steps(sum_steps(partial_tnfhRv, 1), 1)
    return jnp.swapaxes(sum_thRv, 1, 2).reshape(size, R, lanes)


def _scale_and_shift(
    tiles: QTensor, steps: _Steps, take: Callable[..., jax.Array], group: int
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the factor of the codes of one group of each step, and the summand or None, [t, n, 1, h, v]."""

    def of_group(plane: Plane, group: int) -> jax.Array:
        assert not isinstance(plane, QTensor)
        return take(plane, (steps.number, steps.groups), (None, group))[:, :, None]

    def level(name: str) -> jax.Array:
        scale = getattr(tiles, name).scale
        shared = steps.number // scale.shape[-2]
        whole_tnhv = jnp.repeat(take(scale, scale.shape[-2:-1], (None,)), shared, axis=1)
        return level_codes(tiles, name, of_group, group) * whole_tnhv[:, :, None].astype(jnp.float32)

    two_levels = isinstance(tiles.scale, QTensor)
    scale = level("scale") if two_levels else scale_values(of_group(tiles.scale, group), tiles.scheme)
    shift = None
    if tiles.scheme.codebook is None and tiles.scheme.bias:
        shift = -tiles.scheme.bias * scale
    if tiles.zero is not None:
        zero = of_group(tiles.zero, group).astype(jnp.float32) * scale
        shift = -zero if shift is None else shift - zero
    if tiles.offset is not None:
        offset = level("offset") if isinstance(tiles.offset, QTensor) else of_group(tiles.offset, group)
        shift = offset.astype(jnp.float32) + (0.0 if shift is None else shift)
    return scale * (E2M1_IN_FLOAT16 if tiles.scheme.codebook == E2M1 else 1.0), shift


def _scaled_code(scheme: Scheme, take_byte: Callable[..., jax.Array], slot: int, scale_tnfhv: jax.Array) -> jax.Array:
    """Returns the scaled value of one code of a group of each step, float32 [t, n, f, h, v].

    A plane with r times the bits of the narrowest has r runs of as many bytes as that one, and r times fewer slots.
    """
    if scheme.codebook:
        return value_of(take_byte(0, run=0), slot, scheme) * scale_tnfhv
    widths = plane_bits(scheme.bits)
    parts, first_bit = [], 0
    for plane, width in enumerate(widths):
        runs = width // min(widths)
        place = slot // runs * width
        bits = take_byte(plane, run=slot % runs).astype(jnp.int32)
        if width < 8:
            bits &= (2**width - 1) << place
        # Instead of a shift (see `cpu_sums.py`), a power of two multiplies the scale, once for all codes of the slot.
        parts.append(bits.astype(jnp.float32) * (scale_tnfhv * 2.0 ** (first_bit - place)))
        first_bit += width
    return functools.reduce(operator.add, parts)


def _take(
    plane_LtXl: jax.Array,
    shape: tuple[int, ...],
    at: tuple[int | None, ...],
    layer: jax.Array,
    first: jax.Array,
    size: int,
) -> jax.Array:
    """Reshapes the axis X to `shape` and takes the indices `at` (None: the whole axis): [t, ..., h, v].

    It is one slice of the whole: slicing layer, tiles and step one after another would make XLA copy the first slice.
    """
    *_, lanes = plane_LtXl.shape
    registers = lanes // register_lanes(), register_lanes()
    whole = plane_LtXl.reshape(*plane_LtXl.shape[:2], *shape, *registers)
    start = start_indices(layer, first, *(index or 0 for index in at), 0, 0)
    sizes = [length if index is None else 1 for length, index in zip(shape, at, strict=True)]
    kept = [length for length, index in zip(shape, at, strict=True) if index is None]
    part = jax.lax.dynamic_slice(whole, start, (1, size, *sizes, *registers), allow_negative_indices=False)
    return part.reshape(size, *kept, *registers)
