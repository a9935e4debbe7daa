"""Coordinate descent after GPTQ: each input channel in turn gets its best codes, given all the others.

Behzadi et al. 2023, "QuantEase: Optimization-based Quantization for Language Models", arXiv:2309.01885. GPTQ chooses a
channel's codes on the assumption that later channels make up for the error. Once these are rounded too, another code is
often better. The same holds for scales: another scale often has less error for the final codes.

Dimension key: `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quant.scheme import Scheme

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


# Larger groups are cut into parts of at least this many channels, one matrix product each, and keep their scales.
_BLOCK = 128


def descend(
    codes_KM: jax.Array,
    scale_CM: jax.Array,
    zero_CM: jax.Array | None,
    weight_KM: jax.Array,
    hessian_KK: jax.Array,
    scheme: Scheme,
    sweeps: int | jax.Array,
    stored: Callable[[jax.Array], jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """Improves codes and scales: the squared output error, the sum of d' H d for outputs' weight errors d, never rises.

    A sweep goes through the groups: first a group's scale is fitted to its codes, then its channels get new codes.

    Args:
        codes_KM: uint8.
        scale_CM: float32, rounded as they are stored.
        zero_CM: zero points, or None.
        weight_KM: float32, the weight to approximate.
        hessian_KK: H, float32; a channel whose diagonal is 0 keeps its codes.
        scheme: scheme of the codes.
        sweeps: number of sweeps.
        stored: maps float32 scales [1, M] to the nearest that can be stored; None: scales stay.

    Returns:
        uint8 [K, M] and float32 [C, M].
    """
    size = len(codes_KM) // len(scale_CM)
    parts = max(count for count in range(1, size + 1) if size % count == 0 and size // count >= min(size, _BLOCK))
    whole_CM = scale_CM
    if parts > 1:
        # Large groups are done part by part and keep their scales: one matrix product applies all changes of a part.
        scale_CM, stored, size = jnp.repeat(scale_CM, parts, 0), None, size // parts
    zeros_CM = jnp.zeros_like(scale_CM) if zero_CM is None else jnp.repeat(zero_CM.astype(jnp.float32), parts, 0)
    diagonal_K = jnp.diagonal(hessian_KK)
    inverse_K = jnp.where(diagonal_K > 0, 1 / jnp.where(diagonal_K > 0, diagonal_K, 1), 0)
    of_group = functools.partial(_descend_group, zeros_CM, hessian_KK, inverse_K, scheme, size, stored)

    def sweep(_: jax.Array | int, state: tuple) -> tuple:
        return jax.lax.scan(of_group, state, jnp.arange(len(scale_CM)))[0]

    scale_KM, zero_KM = (jnp.repeat(part, size, 0) for part in (scale_CM, zeros_CM))
    error_KM = (scheme.decode(codes_KM) - zero_KM) * scale_KM - weight_KM
    state = codes_KM, scale_CM, _matmul(hessian_KK, error_KM)
    codes_KM, scale_CM, _ = jax.lax.fori_loop(0, sweeps, sweep, state)
    return codes_KM, whole_CM if parts > 1 else scale_CM


def _descend_group(
    zeros_CM: jax.Array,
    hessian_KK: jax.Array,
    inverse_K: jax.Array,
    scheme: Scheme,
    size: int,
    stored: Callable[[jax.Array], jax.Array] | None,
    state: tuple[jax.Array, jax.Array, jax.Array],
    number: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
    """Does one group of a sweep; updates codes, scales and `slope_KM`, the product of the Hessian with all errors."""
    codes_KM, scale_CM, slope_KM = state
    start = number * size
    rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
    columns_Kg = rows(hessian_KK, axis=1)
    hessian_gg, slope_gM, inverse_g, codes_gM = rows(columns_Kg), rows(slope_KM), rows(inverse_K), rows(codes_KM)
    scale_1M, zero_1M = (jax.lax.dynamic_slice_in_dim(part, number, 1) for part in (scale_CM, zeros_CM))
    plain_gM = scheme.decode(codes_gM) - zero_1M
    before_gM = plain_gM * scale_1M
    if stored is not None:
        scale_1M = _fitted(scale_1M, plain_gM, slope_gM, hessian_gg, stored)
        slope_gM = slope_gM + _matmul(hessian_gg, plain_gM * scale_1M - before_gM)
    divisor_1M = jnp.where(scale_1M == 0, 1, scale_1M)

    def row(slope_gM: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=k, slice_size=1)
        old_1M = take(plain_gM) * scale_1M
        wanted_1M = old_1M - take(slope_gM) * take(inverse_g)[:, None]
        code_1M = jnp.where(take(inverse_g) > 0, scheme.encode(wanted_1M / divisor_1M + zero_1M), take(codes_gM))
        new_1M = (scheme.decode(code_1M) - zero_1M) * scale_1M
        return slope_gM + take(hessian_gg, axis=1) * (new_1M - old_1M), (code_1M[0], new_1M[0])

    _, (codes_gM, after_gM) = jax.lax.scan(row, slope_gM, jnp.arange(size))
    slope_KM = slope_KM + _matmul(columns_Kg, after_gM - before_gM)
    update = jax.lax.dynamic_update_slice_in_dim
    return (update(codes_KM, codes_gM, start, 0), update(scale_CM, scale_1M, number, 0), slope_KM), None


def _fitted(
    scale_1M: jax.Array,
    plain_gM: jax.Array,
    slope_gM: jax.Array,
    hessian_gg: jax.Array,
    stored: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Returns the storable scale of least error for a group's codes if it is better than the present one, else that."""
    slope_1M = jnp.sum(plain_gM * slope_gM, axis=0, keepdims=True)
    curvature_1M = jnp.sum(plain_gM * _matmul(hessian_gg, plain_gM), axis=0, keepdims=True)
    new_1M = stored(scale_1M - slope_1M / jnp.where(curvature_1M > 0, curvature_1M, 1))
    change_1M = new_1M - scale_1M
    gain_1M = -(2 * slope_1M + curvature_1M * change_1M) * change_1M
    return jnp.where((gain_1M > 0) & (new_1M * scale_1M > 0), new_1M, scale_1M)
