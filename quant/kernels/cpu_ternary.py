"""Products of a few rows of int8 activations with ternary codes on a CPU, as sums of integers.

A code is 0, 1 or 2, and an activation is at most 127, so a sum of 64 products fits 16 bits. A register holds twice as
many of these as floats, and no code is widened to 32 bits or converted to float. Each code costs a shift, a mask, a
product and a sum. It is 2.2 times as fast as the sums of floats of `cpu_sums` (benchmarks/NOTES.md).

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

_SLOTS, _BITS = 4, 2  # codes in a byte, bits of a code
# Bytes of an output that a step unrolls: with twice as many, LLVM runs out of registers and takes 1.9 times the time.
_STEP_BYTES = 8


def applies(tiles: QTensor) -> bool:
    """Whether this product applies: ternary codes with float scales, and int8 activations with one scale per token."""
    is_token = tiles.activations == "int8-token"
    is_token |= tiles.activations == "int8-group" and tiles.scale.shape[-2] == 1
    return tiles.scheme.kind == "ternary" and not isinstance(tiles.scale, QTensor) and is_token


@jax.custom_jvp
def product(x_RK: jax.Array, tiles: QTensor, layer: jax.Array | None) -> jax.Array:
    """Multiplies rows with a weight: [R, M] with the outputs of all tiles. Only scaling and sums over groups round.

    Rows are multiplied one after another: reading the weight again takes a quarter of a row's time, and for several
    rows at a time, as in `cpu_sums`, LLVM has too few registers.

    Args:
        x_RK: float32, not rounded to int8 yet.
        tiles: see `TiledWeight`.
        layer: int32 scalar if `tiles` is a stack, or None.
    """
    codes_RK, scale_R1 = quantize_activations(x_RK, "token")
    if x_RK.shape[0] == 1:
        return _row(codes_RK[0], tiles, layer)[None] * scale_R1
    # Ties the weight to each row: otherwise XLA would widen the codes once, before the loop.
    tied = lambda codes_K: jax.lax.optimization_barrier((codes_K, tiles, layer))  # noqa: E731
    return jax.lax.map(lambda codes_K: _row(*tied(codes_K)), codes_RK) * scale_R1


def _row(codes_K: jax.Array, tiles: QTensor, layer: jax.Array | None) -> jax.Array:
    """Multiplies the codes of one row with a weight: float32 [M]."""
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
    # The value of a code is code - 1.
    all_n = jnp.sum(x_nsk.astype(jnp.int32), axis=(-1, -2))
    partial_tnl = (sum_tnl.astype(jnp.int32) - all_n[:, None]).astype(jnp.float32)
    scale_tCl: Any = tiles.scale if layer is None else jax.lax.dynamic_index_in_dim(tiles.scale, layer, keepdims=False)
    scale_tCl = scale_tCl.astype(jnp.float32)
    if groups == 1:
        return (sum_steps(partial_tnl, 1) * scale_tCl[:, 0]).reshape(-1)
    return sum_steps(partial_tnl * jnp.repeat(scale_tCl, of_group // count, axis=1), 1).reshape(-1)


@product.defjvp
def _as_floats(primals: tuple, tangents: tuple) -> tuple:
    """Gives the derivative of the sums of floats, straight through the rounding: integers have none."""

    def floats(x_RK: jax.Array, tiles: QTensor, layer: jax.Array | None) -> jax.Array:
        return unrolled(round_activations(x_RK, "token"), tiles, layer)

    return product(*primals), jax.jvp(floats, primals, tangents)[1]


def _bytes(plane: jax.Array, layer: jax.Array | None, k: int, count: int) -> jax.Array:
    """Returns byte k of every step of `count` bytes, [t, n, l], in one slice of the whole plane [L, t, X, l]."""
    *lead, tiles, length, lanes = plane.shape
    plane_Ltnkl = plane.reshape(*lead, tiles, length // count, count, lanes)
    start = start_indices(*(() if layer is None else (layer,)), 0, 0, k, 0)
    size = (*(1 for _ in lead), tiles, length // count, 1, lanes)
    return jax.lax.dynamic_slice(plane_Ltnkl, start, size).reshape(tiles, length // count, lanes)
