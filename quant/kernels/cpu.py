"""Products with a packed weight on a CPU, as plain XLA: a layout, and the expressions that compile well.

XLA on CPU does not fuse unpacking into a `dot`: it writes the float matrix out and reads it back. But it compiles an
elementwise expression over the outputs into one tight vector loop. So a few rows of activations are multiplied by an
unrolled sum over packed bytes, each widened in a register and multiplied there. Many rows are multiplied by `dot`, over
a slab of outputs at a time, small enough for a cache. Both are in float32, and nothing is rounded but sums; where the
weight asks for activations in bfloat16, so are the weights of a slab, and the `dot` of the two is faster.

Dimension key: `K` contraction axis, `M` outputs, `R` rows of activations, `C` groups along K, `t` tiles of the outputs,
`l` lanes of a tile, `n` steps along K, `u` groups in a step or `f` steps in a group (one of the two is 1), `s` slots of
a byte, `k` bytes of one plane in a group and step.
"""

import dataclasses
import functools
import operator
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quant.kernels import Layout, start_indices
from quant.packing import plane_bits
from quant.qtensor import Plane, QTensor, dequantize
from quant.scheme import Scheme

# Outputs of a tile: the float32 of one 512-bit register, of two of 256 bits (AVX2) or of four of 128 bits (NEON). With
# twice as many LLVM unrolls over registers too and spills: two to three times slower where it was measured.
LANES = 16
# Packed bytes of one output that a step unrolls, for one row of activations and for several: for one, more work hides
# what a step costs; for several, what was widened should stay in registers from row to row.
STEP_BYTES = (64, 16)
# Rows up to which widening the bytes anew for each row is faster than a `dot` with weights that were written out.
MAX_UNROLLED_ROWS = 16
# Rows from which on the whole weight is written out for one `dot`: slabs read all rows anew for each tile, and so many
# are in no cache.
MIN_WHOLE_ROWS = 1024
# Bytes of the float32 weights that are written out at a time for a `dot`.
SLAB_BYTES = 2 << 20
# Passed to `jax.jit` for programs with such products: LLVM uses half of a 512-bit register unless told otherwise. Has
# no effect where registers are narrower.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_cpu_prefer_vector_width": "512"}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tiles", "order", "layer"], meta_fields=["outputs", "axis"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class TiledWeight(Layout):
    """A quantized weight [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`) as tiles of 16 outputs.

    A tile is contiguous, its bytes along K one after the other: reading it is one stream, where a plane [K, M] would be
    read in strides of a power of two that share a few sets of the cache.

    Attributes:
        tiles: QTensor [..., t, K, LANES], contraction axis -2, with one level of scales, for every group and output.
            Outputs beyond M are zeros.
        order: int32 [..., K] or None: as `QTensor.order`.
        layer: int32 scalar or None. With it this stands for one layer of the stack [L, ...] that `tiles` and `order`
            hold. Slicing the layer out would copy it at every use; so it is found where the bytes are read.
        outputs: M.
        axis: of the weight.
    """

    tiles: QTensor
    order: jax.Array | None = None
    layer: jax.Array | None = None
    _: dataclasses.KW_ONLY
    outputs: int
    axis: int = -2

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, or of one layer of it."""
        *lead, _, length, _ = self.tiles.shape
        lead = lead if self.layer is None else lead[1:]
        return (*lead, length, self.outputs) if self.axis == -2 else (*lead, self.outputs, length)

    @property
    def dtype(self) -> np.dtype:
        """Of the weight that this stands for."""
        return self.tiles.dtype

    @property
    def scheme(self) -> Scheme:
        """Of its codes."""
        return self.tiles.scheme

    @property
    def group_size(self) -> int:
        """Weights along the contraction axis that share a scale."""
        return self.tiles.group_size

    @property
    def activations(self) -> str | None:
        """As `QTensor.activations`."""
        return self.tiles.activations

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.tiles, self.order)))

    def matmul(self, x_RK: jax.Array) -> jax.Array:
        """As the function of this name."""
        return matmul(x_RK, self)

    def restore(self) -> QTensor:
        """As the function of this name."""
        return restore(self)

    def rows(self, row_n: jax.Array) -> jax.Array:
        """As the function of this name."""
        return rows(self, row_n)


def refusal(weight: QTensor) -> str | None:
    """Why a weight cannot be laid out like this, or None if it can."""
    if weight.scheme.codebook is not None:
        return f"{weight.scheme.name} codes are looked up in a table"
    if weight.outlier is not None:
        return "it has outlier channels"
    return None


def layout(weight: QTensor, xp: types.ModuleType = jnp) -> TiledWeight:
    """Lays a weight out as tiles.

    Args:
        weight: of arrays.
        xp: what computes: `jax.numpy`, or `numpy` for a weight of NumPy arrays, whose tiles may then be views of it.

    Raises:
        ValueError: for a weight that `refusal` says no to.
    """
    if reason := refusal(weight):
        raise ValueError(f"a weight of shape {weight.shape} as tiles: {reason}; multiply with it as it is")
    outputs = weight.shape[-1 if weight.axis == -2 else -2]
    per_group = (*weight.shape[:-2], weight.shape[weight.axis] // weight.group_size, outputs)

    def tile(plane: Any) -> Any:
        plane_XM = plane if weight.axis == -2 else xp.swapaxes(plane, -1, -2)
        if outputs % LANES:
            plane_XM = xp.pad(plane_XM, [(0, 0)] * (plane_XM.ndim - 1) + [(0, -outputs % LANES)])
        plane_Xtl = plane_XM.reshape(*plane_XM.shape[:-1], -1, LANES)
        return xp.moveaxis(plane_Xtl, -2, -3)

    def tile_groups(plane: Plane) -> Any:
        plane_of_one_level = xp.asarray(dequantize(plane)) if isinstance(plane, QTensor) else plane
        per_group_axes = per_group if weight.axis == -2 else (*per_group[:-2], per_group[-1], per_group[-2])
        return tile(xp.broadcast_to(plane_of_one_level, per_group_axes))

    tiles = QTensor(
        tuple(tile(plane) for plane in weight.planes),
        tile_groups(weight.scale),
        None if weight.zero is None else tile_groups(weight.zero),
        None if weight.offset is None else tile_groups(weight.offset),
        scheme=weight.scheme,
        dtype=weight.dtype,
        activations=weight.activations,
    )
    order = None if weight.order is None else xp.squeeze(weight.order, -1 if weight.axis == -2 else -2)
    return TiledWeight(tiles, order, outputs=outputs, axis=weight.axis)


def restore(weight: TiledWeight) -> QTensor:
    """The weight as it was before `layout`, one layer of it if `layer` is given; scales are of one level."""
    weight = weight.sliced()

    def merge(plane_tXl: jax.Array) -> jax.Array:
        plane_Xtl = jnp.moveaxis(plane_tXl, -3, -2)
        plane_XM = plane_Xtl.reshape(*plane_Xtl.shape[:-2], -1)[..., : weight.outputs]
        return plane_XM if weight.axis == -2 else jnp.swapaxes(plane_XM, -1, -2)

    order = None if weight.order is None else jnp.expand_dims(weight.order, -1 if weight.axis == -2 else -2)
    return dataclasses.replace(jax.tree.map(merge, weight.tiles), axis=weight.axis, order=order)


def rows(table: TiledWeight, row_n: jax.Array) -> jax.Array:
    """Rows of a table [M, K], int32 indices in [0, M) -> float32 [n, K]; only those are dequantized."""
    pick = lambda plane_tXl: plane_tXl[row_n // LANES, :, row_n % LANES]  # noqa: E731
    found = dataclasses.replace(jax.tree.map(pick, table.tiles), axis=-1)
    if table.order is not None:
        found = dataclasses.replace(found, order=table.order[None])
    return dequantize(found)


def matmul(x_RK: jax.Array, weight: TiledWeight) -> jax.Array:
    """Multiplies rows of activations with a weight, or with one layer of a stack.

    Args:
        x_RK: float.
        weight: [K, M] or [M, K], by its `axis`.

    Returns:
        float32 [R, M]. Off from the exact product by at most (K + 16) * 2**-24 * sum over k of 16 |x_k| s_k, s_k being
        the largest value of k's group and output: sums of float32, in which a code is at most that far from zero. With
        activations in bfloat16 and more than `MAX_UNROLLED_ROWS` rows by 2**-9 * sum over k of |x_k w_k| more.
    """
    # Ties the weight to the activations: in a loop over tokens XLA would unpack what does not change once, before it.
    x_RK, weight = jax.lax.optimization_barrier((x_RK.astype(jnp.float32), weight))
    if weight.order is not None:
        x_RK = jnp.take(x_RK, weight.order if weight.layer is None else weight.order[weight.layer], axis=1)
    if x_RK.shape[0] <= MAX_UNROLLED_ROWS:
        return _unrolled(x_RK, weight)[:, : weight.outputs]
    return (_by_slabs if x_RK.shape[0] < MIN_WHOLE_ROWS else _whole)(x_RK, weight)[:, : weight.outputs]


@functools.partial(jax.jit, inline=True)  # Weights of the same shape are traced once.
def _unrolled(x_RK: jax.Array, weight: TiledWeight) -> jax.Array:
    """`matmul` for a few rows, [R, M] with the outputs of all tiles: a sum for each step along K, then their sum.

    Shapes are for several rows. For one there is no axis R: XLA would give it a place of its own in memory order, and
    copy.
    """
    tiles, R = weight.tiles, x_RK.shape[0]
    groups, parts = _steps(tiles, STEP_BYTES[R > 1])
    widths = plane_bits(tiles.scheme.bits)
    x_RCg = x_RK.reshape(R, -1, tiles.group_size)
    factors = [_split(_factors(x_RCg, width), groups, parts) for width in widths]
    # The planes hold the same elements of a group, if not of each part of it: the first plane's stand for all.
    x_nRu = jnp.sum(_split(_by_slot(x_RCg, widths[0]), groups, parts), axis=(-1, -2))
    partial_tnRl = jnp.zeros((), jnp.float32)
    for group in range(groups):
        sum_nR1 = x_nRu[..., group, None]
        terms = _terms(weight, factors, groups, group)
        dot_tnRl = _sum(terms) - tiles.scheme.bias * sum_nR1

        def take(plane, group=group):
            plane_tCl = _take(plane, weight.layer, groups, group, 0).astype(jnp.float32)
            plane_tnl = jnp.repeat(plane_tCl, parts, axis=1) if parts > 1 else plane_tCl
            return plane_tnl if R == 1 else plane_tnl[:, :, None]

        if tiles.zero is not None:
            dot_tnRl -= take(tiles.zero) * sum_nR1
        dot_tnRl *= take(tiles.scale)
        if tiles.offset is not None:
            dot_tnRl += take(tiles.offset) * sum_nR1
        partial_tnRl += dot_tnRl
    sum_tRl = sum_steps(partial_tnRl, 1)
    return sum_tRl.reshape(1, -1) if R == 1 else jnp.swapaxes(sum_tRl, 0, 1).reshape(R, -1)


def _sum(terms: list[jax.Array]) -> jax.Array:
    """Of all terms; as four sums, where there are so many, because in one each term waits for the one before."""
    if len(terms) < 4:
        return functools.reduce(operator.add, terms)
    sums = [functools.reduce(operator.add, terms[i::4]) for i in range(4)]
    return (sums[0] + sums[1]) + (sums[2] + sums[3])


def _terms(weight: TiledWeight, factors: list[jax.Array], groups: int, group: int) -> list[jax.Array]:
    """The products of one group of each step, [t, n, R, l], whose sum is that of codes times activations."""
    terms, first_bit = [], 0
    widths = plane_bits(weight.tiles.scheme.bits)
    for plane, width, factor_nRusk in zip(weight.tiles.planes, widths, factors, strict=True):
        slots, count = factor_nRusk.shape[-2:]
        for k in range(count):
            byte_tnl = _take(plane, weight.layer, groups, group, k, count).astype(jnp.int32)
            byte_tnRl = byte_tnl if factor_nRusk.ndim == 4 else byte_tnl[:, :, None]
            for slot in range(slots):
                # The last slot's bits are the whole byte.
                low_tnRl = byte_tnRl & (2 ** (width * (slot + 1)) - 1) if slot < slots - 1 else byte_tnRl
                factor_nR1 = factor_nRusk[..., group, slot, k, None] * 2.0**first_bit
                terms.append(low_tnRl.astype(jnp.float32) * factor_nR1)
        first_bit += width
    return terms


def _factors(x_RCg: jax.Array, width: int) -> jax.Array:
    """What the low bits of the bytes are multiplied with, [R, C, s, k], so that no code needs a shift.

    With v_i the code in slot i of a byte and low_i the bits of slots 0 to i, v_i 2**(width i) is low_i - low_(i-1), and
    the sum of v_i x_i that of low_i (x_i 2**(-width i) - x_(i+1) 2**(-width (i+1))). Scaling by powers of two is exact,
    and no product is larger than 2**width max|x|. A shift would take an instruction more a code; and a shift count used
    more than 15 times becomes an operand of the loop, an unknown, which LLVM then guards against being too large.
    """
    scale_s1 = 2.0 ** (-width * np.arange(8 // width, dtype=np.float32)[:, None])
    x_RCsk = _by_slot(x_RCg, width) * scale_s1
    return x_RCsk - jnp.pad(x_RCsk[:, :, 1:], [(0, 0), (0, 0), (0, 1), (0, 0)])


def _by_slot(x_RCg: jax.Array, width: int) -> jax.Array:
    """Activations by slot and byte of the plane that hold their codes: [R, C, s, k]."""
    return x_RCg.reshape(*x_RCg.shape[:2], 8 // width, -1)


def _split(x_RCsk: jax.Array, groups: int, parts: int) -> jax.Array:
    """[R, C, s, k] of groups -> [n, R, u, s, k] of steps, without R where it is 1."""
    R, C, s, k = x_RCsk.shape
    x_Rnusfk = x_RCsk.reshape(R, C // groups, groups, s, parts, k // parts)
    x_nRusk = x_Rnusfk.transpose(1, 4, 0, 2, 3, 5).reshape(-1, R, groups, s, k // parts)
    return x_nRusk[:, 0] if R == 1 else x_nRusk


def _steps(tiles: QTensor, step_bytes: int) -> tuple[int, int]:
    """Groups in a step and parts (steps) in a group, one of them 1: steps of up to about so many bytes of an output."""
    group_bytes = tiles.group_size * tiles.scheme.bits // 8
    if group_bytes <= step_bytes:
        return _largest_divisor(tiles.scale.shape[-2], step_bytes // group_bytes), 1
    shortest = tiles.group_size * min(plane_bits(tiles.scheme.bits)) // 8
    return 1, shortest // _largest_divisor(shortest, max(1, shortest * step_bytes // group_bytes))


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def _take(plane: jax.Array, layer: jax.Array | None, groups: int, group: int, k: int, count: int = 1) -> jax.Array:
    """Row k of `count` of group `group` of every step, [t, n, l], sliced out of the whole [L, t, X, l] at once.

    Slicing layer, step and row one after the other would make XLA copy what comes first.
    """
    plane_LtXl = plane[None] if layer is None else plane
    L, t, length, lanes = plane_LtXl.shape
    plane_Ltnukl = plane_LtXl.reshape(L, t, -1, groups, count, lanes)
    start = start_indices(0 if layer is None else layer, 0, 0, group, k, 0)
    n = length // (groups * count)
    return jax.lax.dynamic_slice(plane_Ltnukl, start, (1, t, n, 1, 1, lanes)).reshape(t, n, lanes)


def sum_steps(partial_X: jax.Array, axis: int) -> jax.Array:
    """The sum over one axis, of partial sums that an elementwise expression made.

    In a loop of two, which XLA fuses with nothing: it would compute the partial sums again in every use of the sum, and
    `reduce` does that for every element.
    """
    steps = partial_X.shape[axis]
    half = steps // 2

    def add(i: jax.Array, sum_X: jax.Array) -> jax.Array:
        for step in range(half):
            sum_X += jax.lax.dynamic_index_in_dim(partial_X, steps % 2 + i * half + step, axis, keepdims=False)
        return sum_X

    first_X = jax.lax.index_in_dim(partial_X, 0, axis, keepdims=False)
    return jax.lax.fori_loop(0, 2, add, first_X if steps % 2 else jnp.zeros_like(first_X)) if half else first_X


def _by_slabs(x_RK: jax.Array, weight: TiledWeight) -> jax.Array:
    """`matmul` for many rows, [R, M] with the outputs of all tiles: never more than a slab of weights is in floats."""
    tiles, lead = weight.tiles, () if weight.layer is None else (weight.layer,)
    *_, count, length, _ = tiles.shape
    slab = max(1, min(count, SLAB_BYTES // (4 * length * LANES)))

    def one(i: jax.Array, y_tRl: jax.Array) -> jax.Array:
        # The last slab is moved back to end with the last tile.
        first = jnp.minimum(i * slab, count - slab)

        def take(plane: jax.Array) -> jax.Array:
            size = (*(1 for _ in lead), slab, *plane.shape[-2:])
            return jax.lax.dynamic_slice(plane, start_indices(*lead, first, 0, 0), size).reshape(size[-3:])

        # A product for each tile: as one, [K, t l], the weights would have to be written in another order.
        weight_tKl = dequantize(jax.tree.map(take, tiles))
        if tiles.activations == "bfloat16":
            weight_tKl = _to_bfloat16(weight_tKl)
        part_tRl = jnp.einsum(
            "RK,tKl->tRl",
            x_RK.astype(weight_tKl.dtype),
            weight_tKl,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_slice(y_tRl, part_tRl, start_indices(first, 0, 0))

    y_tRl = jnp.zeros((count, x_RK.shape[0], LANES), jnp.float32)
    y_tRl = jax.lax.fori_loop(0, -(-count // slab), one, y_tRl)
    return jnp.swapaxes(y_tRl, 0, 1).reshape(x_RK.shape[0], -1)


def _whole(x_RK: jax.Array, weight: TiledWeight) -> jax.Array:
    """`matmul` for so many rows that writing the weight out costs little beside them, [R, M]."""
    # The order was applied to the activations.
    restored = restore(dataclasses.replace(weight, order=None))
    values = dequantize(restored)
    if weight.activations == "bfloat16":
        values = _to_bfloat16(values)
    return jnp.einsum(
        "RK,KM->RM" if weight.axis == -2 else "RK,MK->RM",
        x_RK.astype(values.dtype),
        values,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@jax.custom_jvp  # Of integers there is none.
def _to_bfloat16(x: jax.Array) -> jax.Array:
    """Finite float32 rounded to nearest, halves away from zero.

    A conversion by XLA, which also looks after NaN, takes three times the instructions here.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(1 << 15)
    return jax.lax.bitcast_convert_type((bits >> np.uint32(16)).astype(jnp.uint16), jnp.bfloat16)


@_to_bfloat16.defjvp
def _to_bfloat16_jvp(primals: tuple, tangents: tuple) -> tuple:
    return _to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)
