"""Products of a few rows with tiles of packed bytes on a CPU: an unrolled sum, which XLA compiles to one loop.

Bytes are widened in registers, and the values of codes and both levels of scales are computed there too, so that only
packed bytes are read from memory. benchmarks/NOTES.md gives the reasons for each expression.

Dimension key: `K` contraction axis, `R` rows of activations, `C` groups along K, `t` tiles of the outputs, `l` lanes of
a tile, `n` steps along K, `u` groups in a step or `f` steps in a group (one of the two is 1), `s` slots of a byte, `k`
bytes of one plane in a group and step.
"""

import functools
import math
import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from quant.kernels import start_indices
from quant.kernels.cpu_tiles import PAIR_BITS, is_paired
from quant.packing import plane_bits
from quant.qtensor import Plane, QTensor, scale_values
from quant.scheme import E2M1, IQ4_NL_POLYNOMIAL, Scheme, polynomial

# The part of one output that a step unrolls: in packed bytes for one row of activations, as more work hides the cost of
# a step; in codes for several rows, which are widened once and stay in or near registers from row to row. With twice as
# many codes, LLVM widens them again for each row if registers have 256 bits (AVX2): 1.45 times the time.
STEP_BYTES, STEP_CODES = 64, 16
# The bits of an E2M1 in their places of a float16 are the value times 2**-14.
E2M1_IN_FLOAT16 = 2.0**14


@functools.partial(jax.jit, inline=True)  # Weights of the same shape are traced once.
def unrolled(x_RK: jax.Array, tiles: QTensor, layer: jax.Array | None) -> jax.Array:
    """Multiplies rows with a weight: [R, M] with the outputs of all tiles. It adds one sum for each step along K.

    Shapes are for several rows. For one row there is no axis R: XLA would choose another memory layout for it and copy.

    Args:
        x_RK: float32.
        tiles: see `TiledWeight`.
        layer: int32 scalar if `tiles` is a stack, or None.
    """
    R = x_RK.shape[0]
    groups, parts = _steps(tiles, _step_bytes(tiles, R))
    widths = plane_bits(tiles.scheme.bits)
    x_RCg = x_RK.reshape(R, -1, tiles.group_size)
    if tiles.scheme.codebook:
        factors_RCsk = [_by_slot(x_RCg, width) for width in widths]
    else:
        factors_RCsk = [_factors(x_RCg, width) * 2.0 ** sum(widths[:plane]) for plane, width in enumerate(widths)]
    factors_nRusk = [_split(factor_RCsk, groups, parts) for factor_RCsk in factors_RCsk]
    # All planes hold the same elements of a group, though not of each part, so the first plane's suffice for this sum.
    x_nRu = jnp.sum(_split(_by_slot(x_RCg, widths[0]), groups, parts), axis=(-1, -2))
    take = functools.partial(_per_group, layer=layer, groups=groups, parts=parts, rows=R)
    partial_tnRl = scaled_tnRl = shifted_tnRl = jnp.zeros((), jnp.float32)
    for group in range(groups):
        sum_nR1 = x_nRu[..., group, None]
        dot_tnRl = _dot(tiles, layer, factors_nRusk, groups, group, sum_nR1)
        if tiles.zero is not None:
            dot_tnRl -= take(tiles.zero, group).astype(jnp.float32) * sum_nR1
        if isinstance(tiles.scale, QTensor):
            scaled_tnRl += dot_tnRl * level_codes(tiles, "scale", take, group)
        else:
            partial_tnRl += dot_tnRl * scale_values(take(tiles.scale, group), tiles.scheme)
        if isinstance(tiles.offset, QTensor):
            shifted_tnRl += level_codes(tiles, "offset", take, group) * sum_nR1
        elif tiles.offset is not None:
            partial_tnRl += take(tiles.offset, group).astype(jnp.float32) * sum_nR1
    unit_tRl = _of_outputs(tiles, layer, R)
    for level, sum_tnRl in ((tiles.scale, scaled_tnRl), (tiles.offset, shifted_tnRl)):
        if unit_tRl is not None:
            partial_tnRl += sum_tnRl
        elif isinstance(level, QTensor):
            # All groups of a step share their scale of the second level.
            repeats = tiles.scale.shape[-2] // level.scale.shape[-2] // groups * parts
            assert not isinstance(level.scale, QTensor)
            partial_tnRl += sum_tnRl * _per_group(level.scale, 0, layer, 1, repeats, R).astype(jnp.float32)
    sum_tRl = sum_steps(partial_tnRl, 1)
    sum_tRl = sum_tRl if unit_tRl is None else sum_tRl * unit_tRl
    return sum_tRl.reshape(1, -1) if R == 1 else jnp.swapaxes(sum_tRl, 0, 1).reshape(R, -1)


def _of_outputs(tiles: QTensor, layer: jax.Array | None, rows: int) -> jax.Array | None:
    """Returns the float that all scales of an output share, [t, l] or [t, 1, l]; it scales the sum of all steps once.

    The result is None if scales have one level or share floats among fewer groups, and if there are offsets, which have
    floats of their own.
    """
    if not isinstance(tiles.scale, QTensor) or tiles.scale.scale.shape[-2] != 1 or tiles.offset is not None:
        return None
    assert not isinstance(tiles.scale.scale, QTensor)
    return _per_group(tiles.scale.scale, 0, layer, 1, 1, rows)[:, 0].astype(jnp.float32)


def _dot(
    tiles: QTensor, layer: jax.Array | None, factors: list[jax.Array], groups: int, group: int, sum_nR1: jax.Array
) -> jax.Array:
    """Sums values of codes times activations over one group of each step: [t, n, R, l]."""
    if tiles.scheme.codebook is None:
        return sum_of(_terms(tiles, layer, factors, groups, group)) - tiles.scheme.bias * sum_nR1
    ((plane,), (factor_nRusk,)) = tiles.planes, factors
    slots, count = factor_nRusk.shape[-2:]
    terms = []
    for k in range(count):
        byte_tnl = _take(plane, layer, groups, group, k, count)
        byte_tnRl = byte_tnl if factor_nRusk.ndim == 4 else byte_tnl[:, :, None]
        for slot in range(slots):
            terms.append(value_of(byte_tnRl, slot, tiles.scheme) * factor_nRusk[..., group, slot, k, None])
    return sum_of(terms) * (E2M1_IN_FLOAT16 if tiles.scheme.codebook == E2M1 else 1.0)


def _terms(
    tiles: QTensor, layer: jax.Array | None, factors: list[jax.Array], groups: int, group: int
) -> list[jax.Array]:
    """Returns products [t, n, R, l] for one group of each step; their sum is the sum of codes times activations."""
    terms = []
    widths = plane_bits(tiles.scheme.bits)
    for plane, width, factor_nRusk in zip(tiles.planes, widths, factors, strict=True):
        slots, count = factor_nRusk.shape[-2:]
        for k in range(count):
            byte_tnl = _take(plane, layer, groups, group, k, count).astype(jnp.int32)
            byte_tnRl = byte_tnl if factor_nRusk.ndim == 4 else byte_tnl[:, :, None]
            for slot in range(slots):
                # Up to the last slot, the bits are the whole byte.
                low_tnRl = byte_tnRl & (2 ** (width * (slot + 1)) - 1) if slot < slots - 1 else byte_tnRl
                terms.append(low_tnRl.astype(jnp.float32) * factor_nRusk[..., group, slot, k, None])
    return terms


def sum_of(terms: list[jax.Array]) -> jax.Array:
    """Adds all terms, in four partial sums if there are enough: in a single sum each term waits for the one before."""
    if len(terms) < 4:
        return functools.reduce(operator.add, terms)
    sums = [functools.reduce(operator.add, terms[i::4]) for i in range(4)]
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def value_of(byte: jax.Array, slot: int, scheme: Scheme) -> jax.Array:
    """Returns the value of the code in one half of a uint8, float32; for E2M1 it is 2**-14 times the value.

    IQ4_NL is a polynomial of the code, or of 16 times the code, which gives exactly the same. E2M1's fields are moved
    to their places in a float16, which the processor converts to float32, including subnormals. NF4 is selected bit by
    bit.
    """
    if scheme.codebook == E2M1:
        # Products instead of shifts, which LLVM would guard, see `_factors`.
        word = byte.astype(jnp.uint16)
        size, sign = word * np.uint16(1 << 9 - 4 * slot), word * np.uint16(1 << 12 - 4 * slot)
        bits = size & np.uint16(0x0E00) | sign & np.uint16(0x8000)
        return jax.lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32)
    code = byte.astype(jnp.int32) & (15 << 4 * slot)
    if scheme.kind == "iq4_nl":
        constant, *factors = (factor * 16.0 ** (-slot * i) for i, factor in enumerate(IQ4_NL_POLYNOMIAL))
        code = code.astype(jnp.float32)
        return jnp.floor(polynomial(code, tuple(factors)) * code + (constant + 0.5))
    values = [jnp.float32(value) for value in scheme.codebook or ()]
    for bit in range(4):
        is_set = (code & (1 << 4 * slot + bit)) != 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def level_codes(tiles: QTensor, name: str, take: Callable[[jax.Array, int], jax.Array], group: int) -> jax.Array:
    """Returns the integers that a second level's scale multiplies, as float32, for one group of each step."""
    level: Plane = getattr(tiles, name)
    assert isinstance(level, QTensor) and isinstance(tiles.scale, QTensor)
    if not is_paired(tiles):
        return take(level.planes[0], group).astype(jnp.float32) - level.scheme.bias
    pair = take(tiles.scale.planes[0], group).astype(jnp.int32)
    low = (pair & (2**PAIR_BITS - 1)).astype(jnp.float32)
    return low if name == "scale" else (pair.astype(jnp.float32) - low) * 2.0**-PAIR_BITS


def _factors(x_RCg: jax.Array, width: int) -> jax.Array:
    """Returns the factors of the low bits of bytes, [R, C, s, k], with which no code needs a shift.

    Let v_i be the code in slot i of a byte and low_i the bits of slots 0 to i. Then v_i 2**(width i) is
    low_i - low_(i-1), and the sum of v_i x_i is the sum of low_i (x_i 2**(-width i) - x_(i+1) 2**(-width (i+1))).
    Scaling by powers of two is exact, and no product exceeds 2**width max|x|. A shift would cost one more instruction
    per code; and a shift count that is used more than 15 times becomes an operand of the loop, which LLVM then guards
    against being too large.
    """
    scale_s1 = 2.0 ** (-width * np.arange(8 // width, dtype=np.float32)[:, None])
    x_RCsk = _by_slot(x_RCg, width) * scale_s1
    return x_RCsk - jnp.pad(x_RCsk[:, :, 1:], [(0, 0), (0, 0), (0, 1), (0, 0)])


def _by_slot(x_RCg: jax.Array, width: int) -> jax.Array:
    """Arranges activations by the slot and byte of the plane that hold their codes: [R, C, s, k]."""
    return x_RCg.reshape(*x_RCg.shape[:2], 8 // width, -1)


def _split(x_RCsk: jax.Array, groups: int, parts: int) -> jax.Array:
    """Rearranges groups [R, C, s, k] to steps [n, R, u, s, k], without the axis R if it is 1."""
    R, C, s, k = x_RCsk.shape
    x_Rnusfk = x_RCsk.reshape(R, C // groups, groups, s, parts, k // parts)
    x_nRusk = x_Rnusfk.transpose(1, 4, 0, 2, 3, 5).reshape(-1, R, groups, s, k // parts)
    return x_nRusk[:, 0] if R == 1 else x_nRusk


def _step_bytes(tiles: QTensor, rows: int) -> int:
    return STEP_BYTES if rows == 1 else max(1, STEP_CODES * tiles.scheme.bits // 8)


def _steps(tiles: QTensor, step_bytes: int) -> tuple[int, int]:
    """Returns groups per step and parts (steps) per group, one of them 1, for steps of about `step_bytes` at most.

    The groups of a step share their scales of the second level.
    """
    group_bytes = tiles.group_size * tiles.scheme.bits // 8
    if group_bytes <= step_bytes:
        return group_steps(tiles, step_bytes // group_bytes), 1
    shortest = tiles.group_size * min(plane_bits(tiles.scheme.bits)) // 8
    return 1, shortest // largest_divisor(shortest, max(1, shortest * step_bytes // group_bytes))


def group_steps(tiles: QTensor, limit: int) -> int:
    """Returns the number of groups of a step, at most `limit`, such that they share their second level's scales."""
    count = tiles.scale.shape[-2]
    levels = [level for level in (tiles.scale, tiles.offset) if isinstance(level, QTensor)]
    return largest_divisor(math.gcd(count, *(count // level.scale.shape[-2] for level in levels)), limit)


def largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of `number` that is at most `limit`."""
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _per_group(plane: jax.Array, group: int, layer: jax.Array | None, groups: int, parts: int, rows: int) -> jax.Array:
    """Returns the number of group `group` of each step, repeated `parts` times: [t, n, l], or [t, n, 1, l]."""
    plane_tCl = _take(plane, layer, groups, group, 0)
    plane_tnl = jnp.repeat(plane_tCl, parts, axis=1) if parts > 1 else plane_tCl
    return plane_tnl if rows == 1 else plane_tnl[:, :, None]


def _take(plane: jax.Array, layer: jax.Array | None, groups: int, group: int, k: int, count: int = 1) -> jax.Array:
    """Returns row k of `count` of group `group` of every step, [t, n, l], in one slice of the whole [L, t, X, l].

    Slicing layer, step and row one after another would make XLA copy the result of the first slice.
    """
    plane_LtXl = plane[None] if layer is None else plane
    L, t, length, lanes = plane_LtXl.shape
    plane_Ltnukl = plane_LtXl.reshape(L, t, -1, groups, count, lanes)
    start = start_indices(0 if layer is None else layer, 0, 0, group, k, 0)
    n = length // (groups * count)
    row = jax.lax.dynamic_slice(plane_Ltnukl, start, (1, t, n, 1, 1, lanes), allow_negative_indices=False)
    return row.reshape(t, n, lanes)


def sum_steps(partial_X: jax.Array, axis: int) -> jax.Array:
    """Adds partial sums, which an elementwise expression computed, over one axis.

    It is a loop of two iterations, which XLA does not fuse with anything. Otherwise XLA would recompute the partial
    sums in every use of the sum; `reduce` does that for every element.
    """
    steps = partial_X.shape[axis]
    half = steps // 2

    def add(i: jax.Array, sum_X: jax.Array) -> jax.Array:
        for step in range(half):
            sum_X += jax.lax.dynamic_index_in_dim(partial_X, steps % 2 + i * half + step, axis, keepdims=False)
        return sum_X

    first_X = jax.lax.index_in_dim(partial_X, 0, axis, keepdims=False)
    return jax.lax.fori_loop(0, 2, add, first_X if steps % 2 else jnp.zeros_like(first_X)) if half else first_X
