"""The product of a few rows with ternary codes on a CPU where activations are in int8: sums of whole numbers.

A code is 0, 1 or 2, and activations are at most 127: sums of 64 products of the two fit 16 bits, of which a register
holds twice as many as floats, and no code is widened to 32 bits and made a float. What is left is a shift, a mask, a
product and a sum for each code. 2.2 times as fast as the sums of floats of `cpu_sums` (benchmarks/NOTES.md).

Dimension key: as in `cpu_sums`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quant.activations import quantize_activations, round_activations
from quant.kernels import start_indices
from quant.kernels.cpu_sums import sum_steps, unrolled
from quant.qtensor import QTensor

_SLOTS, _BITS = 4, 2  # of a byte
# Bytes of an output that a step unrolls: with twice as many LLVM runs out of registers, at 1.9 times the time.
_STEP_BYTES = 8


def applies(tiles: QTensor) -> bool:
    """Whether tiles are multiplied so: ternary, each token's activations with one scale for all that it meets."""
    is_token = tiles.activations == "int8-token"
    is_token |= tiles.activations == "int8-group" and tiles.scale.shape[-2] == 1
    return tiles.scheme.kind == "ternary" and not isinstance(tiles.scale, QTensor) and is_token


@jax.custom_jvp
def product(x_RK: jax.Array, tiles: QTensor, layer: jax.Array | None) -> jax.Array:
    """Rows times a weight, [R, M] with the outputs of all tiles. Exact but for the scales, and sums over groups.

    One row after the other: what is read again is a quarter of what a row takes, and for rows side by side, as in
    `cpu_sums`, LLVM has too few registers.

    Args:
        x_RK: float32, not rounded yet.
        tiles: as in `TiledWeight`.
        layer: int32 scalar where `tiles` are a stack of them, or None.
    """
    codes_RK, scale_R1 = quantize_activations(x_RK, "token")
    if x_RK.shape[0] == 1:
        return _row(codes_RK[0], tiles, layer)[None] * scale_R1
    # Tied to each row, or XLA would widen the codes once, before the loop.
    tied = lambda codes_K: jax.lax.optimization_barrier((codes_K, tiles, layer))  # noqa: E731
    return jax.lax.map(lambda codes_K: _row(*tied(codes_K)), codes_RK) * scale_R1


def _row(codes_K: jax.Array, tiles: QTensor, layer: jax.Array | None) -> jax.Array:
    """Codes of one row times a weight, float32 [M]."""
    (plane,), groups = tiles.planes, tiles.scale.shape[-2]
    of_group = tiles.group_size // _SLOTS
    count = math.gcd(of_group, _STEP_BYTES)
    # Byte k of step n holds codes of these activations: [n, s, k].
    x_Csfk = codes_K.astype(jnp.int16).reshape(groups, _SLOTS, of_group // count, count)
    x_nsk = x_Csfk.swapaxes(1, 2).reshape(-1, _SLOTS, count)
    sum_tnl = jnp.zeros((), jnp.int16)
    for k in range(count):
        byte_tnl = _bytes(plane, layer, k, count).astype(jnp.int16)
        for slot in range(_SLOTS):
            code_tnl = byte_tnl >> np.int16(_BITS * slot) & np.int16(3)
            sum_tnl += code_tnl * x_nsk[:, slot, k, None]
    # Codes stand for one less.
    all_n = jnp.sum(x_nsk.astype(jnp.int32), axis=(-1, -2))
    partial_tnl = (sum_tnl.astype(jnp.int32) - all_n[:, None]).astype(jnp.float32)
    scale_tCl: Any = tiles.scale if layer is None else jax.lax.dynamic_index_in_dim(tiles.scale, layer, keepdims=False)
    scale_tCl = scale_tCl.astype(jnp.float32)
    if groups == 1:
        return (sum_steps(partial_tnl, 1) * scale_tCl[:, 0]).reshape(-1)
    return sum_steps(partial_tnl * jnp.repeat(scale_tCl, of_group // count, axis=1), 1).reshape(-1)


@product.defjvp
def _as_floats(primals: tuple, tangents: tuple) -> tuple:
    """Of whole numbers there is no derivative: that of the sums of floats, straight through the rounding."""

    def floats(x_RK: jax.Array, tiles: QTensor, layer: jax.Array | None) -> jax.Array:
        return unrolled(round_activations(x_RK, "token"), tiles, layer)

    return product(*primals), jax.jvp(floats, primals, tangents)[1]


def _bytes(plane: jax.Array, layer: jax.Array | None, k: int, count: int) -> jax.Array:
    """Byte k of every step of `count`, [t, n, l], sliced out of the whole plane [L, t, X, l] at once."""
    *lead, tiles, length, lanes = plane.shape
    plane_Ltnkl = plane.reshape(*lead, tiles, length // count, count, lanes)
    start = start_indices(*(() if layer is None else (layer,)), 0, 0, k, 0)
    size = (*(1 for _ in lead), tiles, length // count, 1, lanes)
    return jax.lax.dynamic_slice(plane_Ltnkl, start, size).reshape(tiles, length // count, lanes)
