"""Products with a packed weight on a CPU, as plain XLA: a layout, and expressions that XLA compiles well.

XLA on CPU does not fuse unpacking into a `dot`: it writes the float matrix out and reads it back. But it compiles an
elementwise expression over the outputs into one tight vector loop. So a few rows of activations are multiplied by an
unrolled sum over packed bytes, each widened and multiplied in a register. Many rows are multiplied by `dot`, with one
slab of outputs at a time, small enough for a cache. Both work in float32 and round only sums. If the weight asks for
bfloat16 activations, the weights of a slab are rounded to bfloat16 too, which makes the `dot` faster.

Dimension key: `K` contraction axis, `M` outputs, `R` rows of activations, `C` groups along K, `t` tiles of the outputs,
`l` lanes of a tile.
"""

import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quant.kernels import Layout, cpu_ternary, start_indices
from quant.kernels.cpu_rows import by_rows
from quant.kernels.cpu_sums import unrolled
from quant.kernels.cpu_tiles import compact, expand, level_schemes, plain
from quant.qtensor import QTensor, dequantize
from quant.scheme import Scheme

# Outputs of a tile: the float32 of one 512-bit register, of two of 256 bits (AVX2) or of four of 128 bits (NEON). With
# twice as many, LLVM also unrolls over registers and spills: two to three times slower where it was measured.
LANES = 16
# Up to this many rows, widening the bytes anew for each row is faster than a `dot` with weights written to memory.
MAX_UNROLLED_ROWS = 16
# Up to this many rows, sums are scaled rather than weights.
MAX_SUMMED_ROWS = 2
# Up to this many rows, ternary codes are multiplied as integers.
MAX_INTEGER_ROWS = 16
# From this many rows on, the whole weight is written out for one `dot`, if its float32 size is at most _WHOLE_BYTES:
# slabs read all rows again for each tile, and so many rows do not fit a cache.
MIN_WHOLE_ROWS = 512
_WHOLE_BYTES = 256 << 20
# Bytes of float32 weights that are written out at a time for a `dot`.
SLAB_BYTES = 2 << 20
# Options of `jax.jit` for programs with these products: by default LLVM uses only half of a 512-bit register. They have
# no effect on CPUs with narrower registers.
COMPILER_OPTIONS: dict[str, str | bool] = {"xla_cpu_prefer_vector_width": "512"}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tiles", "order", "layer"], meta_fields=["outputs", "axis", "levels"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class TiledWeight(Layout):
    """A quantized weight [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`) as tiles of 16 outputs.

    A tile is contiguous, with its bytes along K in order, so that reading it is one stream. A plane [K, M] would be
    read with a power-of-two stride, whose addresses share a few sets of the cache.

    Attributes:
        tiles: QTensor [..., t, K, LANES], contraction axis -2, with scales for every group and output; two levels of
            scales are in the form that `compact` returns. Outputs beyond M are zeros.
        order: int32 [..., K] or None; see `QTensor.order`.
        layer: int32 scalar or None. If given, the object represents one layer of the stack [L, ...] that `tiles` and
            `order` hold. Slicing the layer out would copy it at every use, so it is located when the bytes are read.
        outputs: M.
        axis: contraction axis of the weight.
        levels: schemes of quantized scales and of quantized offsets at rest; None for those that are not quantized.
    """

    tiles: QTensor
    order: jax.Array | None = None
    layer: jax.Array | None = None
    _: dataclasses.KW_ONLY
    outputs: int
    axis: int = -2
    levels: tuple[Scheme | None, Scheme | None] = (None, None)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, or of one layer if `layer` is given."""
        *lead, _, length, _ = self.tiles.shape
        lead = lead if self.layer is None else lead[1:]
        return (*lead, length, self.outputs) if self.axis == -2 else (*lead, self.outputs, length)

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the weight that this object represents."""
        return self.tiles.dtype

    @property
    def scheme(self) -> Scheme:
        """Scheme of the codes."""
        return self.tiles.scheme

    @property
    def group_size(self) -> int:
        """Weights along the contraction axis that share a scale."""
        return self.tiles.group_size

    @property
    def activations(self) -> str | None:
        """See `QTensor.activations`."""
        return self.tiles.activations

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self.tiles, self.order)))

    def matmul(self, x_RK: jax.Array) -> jax.Array:
        """Calls the module's function `matmul`."""
        return matmul(x_RK, self)

    def multiply(self, x: jax.Array) -> jax.Array:
        """See `Weight.multiply`; a few rows in int8 with ternary codes are multiplied by sums of integers."""
        x_RK = x.reshape(-1, x.shape[-1])
        if not cpu_ternary.applies(self.tiles) or x_RK.shape[0] > MAX_INTEGER_ROWS or self.order is not None:
            return super().multiply(x)
        # Ties the weight to the activations, see `matmul`.
        x_RK, tiles, layer = jax.lax.optimization_barrier((x_RK.astype(jnp.float32), self.tiles, self.layer))
        return cpu_ternary.product(x_RK, tiles, layer)[:, : self.outputs].reshape(*x.shape[:-1], -1)

    def restore(self) -> QTensor:
        """Calls the module's function `restore`."""
        return restore(self)

    def rows(self, row_n: jax.Array) -> jax.Array:
        """Calls the module's function `rows`."""
        return rows(self, row_n)


def refusal(weight: QTensor) -> str | None:
    """Why a weight cannot be laid out like this, or None if it can."""
    if weight.outlier is not None:
        return "it has outlier channels"
    return None


def layout(weight: QTensor, xp: types.ModuleType = jnp) -> TiledWeight:
    """Lays a weight out as tiles.

    Args:
        weight: weight of JAX or NumPy arrays.
        xp: `jax.numpy`, or `numpy` for a weight of NumPy arrays; then the tiles may be views of the weight.

    Raises:
        ValueError: for a weight for which `refusal` gives a reason.
    """
    if reason := refusal(weight):
        raise ValueError(
            f"a weight of shape {weight.shape} cannot be laid out as tiles: {reason}; multiply with the QTensor itself"
        )
    outputs = weight.shape[-1 if weight.axis == -2 else -2]

    def tile(plane: Any) -> Any:
        plane_XM = plane if weight.axis == -2 else xp.swapaxes(plane, -1, -2)
        if outputs % LANES:
            plane_XM = xp.pad(plane_XM, [(0, 0)] * (plane_XM.ndim - 1) + [(0, -outputs % LANES)])
        plane_Xtl = plane_XM.reshape(*plane_XM.shape[:-1], -1, LANES)
        return xp.moveaxis(plane_Xtl, -2, -3)

    tiles = jax.tree.map(tile, compact(dataclasses.replace(weight, order=None), xp))
    order = None if weight.order is None else xp.squeeze(weight.order, -1 if weight.axis == -2 else -2)
    return TiledWeight(tiles.along(-2), order, outputs=outputs, axis=weight.axis, levels=level_schemes(weight))


def restore(weight: TiledWeight) -> QTensor:
    """Undoes `layout`, for one layer if `layer` is given; the result has scales for every group and output."""
    weight = weight.sliced()

    def merge(plane_tXl: jax.Array) -> jax.Array:
        plane_Xtl = jnp.moveaxis(plane_tXl, -3, -2)
        plane_XM = plane_Xtl.reshape(*plane_Xtl.shape[:-2], -1)[..., : weight.outputs]
        return plane_XM if weight.axis == -2 else jnp.swapaxes(plane_XM, -1, -2)

    order = None if weight.order is None else jnp.expand_dims(weight.order, -1 if weight.axis == -2 else -2)
    merged = jax.tree.map(merge, weight.tiles).along(weight.axis)
    return dataclasses.replace(expand(merged, weight.levels), order=order)


def rows(table: TiledWeight, row_n: jax.Array) -> jax.Array:
    """Returns rows of a table [M, K]: int32 indices in [0, M) -> float32 [n, K]; only those are dequantized."""
    pick = lambda plane_tXl: plane_tXl[row_n // LANES, :, row_n % LANES]  # noqa: E731
    found = plain(jax.tree.map(pick, table.tiles).along(-1))
    if table.order is not None:
        found = dataclasses.replace(found, order=table.order[None])
    return dequantize(found)


def matmul(x_RK: jax.Array, weight: TiledWeight) -> jax.Array:
    """Multiplies rows of activations with a weight, or with one layer of a stack.

    Args:
        x_RK: float.
        weight: [K, M] or [M, K], by its `axis`.

    Returns:
        float32 [R, M]. The error is at most (K + 16) * 2**-24 * sum over k of 16 |x_k| s_k, where s_k is the largest
        magnitude that a value can have in k's group and output: terms of the float32 sums are up to 16 |x_k| s_k. With
        bfloat16 activations and more than `MAX_UNROLLED_ROWS` rows, 2**-9 * sum over k of |x_k w_k| is added.
    """
    # Ties the weight to the activations: otherwise XLA would unpack the weight once before a loop over tokens.
    x_RK, weight = jax.lax.optimization_barrier((x_RK.astype(jnp.float32), weight))
    if weight.order is not None:
        x_RK = jnp.take(x_RK, weight.order if weight.layer is None else weight.order[weight.layer], axis=1)
    if x_RK.shape[0] <= MAX_UNROLLED_ROWS:
        few = unrolled if x_RK.shape[0] <= MAX_SUMMED_ROWS else by_rows
        return few(x_RK, weight.tiles, weight.layer)[:, : weight.outputs]
    whole = x_RK.shape[0] >= MIN_WHOLE_ROWS and 4 * math.prod(weight.shape) <= _WHOLE_BYTES
    return (_whole if whole else _by_slabs)(x_RK, weight)[:, : weight.outputs]


def _by_slabs(x_RK: jax.Array, weight: TiledWeight) -> jax.Array:
    """Does `matmul` for many rows: [R, M] with the outputs of all tiles. At most a slab of weights is in floats."""
    tiles, lead = weight.tiles, () if weight.layer is None else (weight.layer,)
    *_, count, length, _ = tiles.shape
    largest = max(1, SLAB_BYTES // (4 * length * LANES))
    slabs = -(-count // largest)
    slab = -(-count // slabs)  # slabs of equal size: less of the last one is then computed twice

    def one(i: jax.Array, y_tRl: jax.Array) -> jax.Array:
        # The last slab is moved back to end with the last tile.
        first = jnp.minimum(i * slab, count - slab)

        def take(plane: jax.Array) -> jax.Array:
            size = (*(1 for _ in lead), slab, *plane.shape[-2:])
            return jax.lax.dynamic_slice(plane, start_indices(*lead, first, 0, 0), size).reshape(size[-3:])

        # One product per tile: a single one, with [K, t l], would need the weights in another order.
        weight_tKl = dequantize(plain(jax.tree.map(take, tiles)))
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
    y_tRl = jax.lax.fori_loop(0, slabs, one, y_tRl)
    return jnp.swapaxes(y_tRl, 0, 1).reshape(x_RK.shape[0], -1)


def _whole(x_RK: jax.Array, weight: TiledWeight) -> jax.Array:
    """Does `matmul` for so many rows that writing the weight out costs comparatively little: [R, M]."""
    # `order` has been applied to the activations.
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


@jax.custom_jvp  # The integer operations have no derivative.
def _to_bfloat16(x: jax.Array) -> jax.Array:
    """Rounds finite float32 to nearest, halves away from zero.

    XLA's conversion, which also handles NaN, takes three times the instructions here.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(1 << 15)
    return jax.lax.bitcast_convert_type((bits >> np.uint32(16)).astype(jnp.uint16), jnp.bfloat16)


@_to_bfloat16.defjvp
def _to_bfloat16_jvp(primals: tuple, tangents: tuple) -> tuple:
    return _to_bfloat16(*primals), tangents[0].astype(jnp.bfloat16)
