"""Grids of groups: scales and zero points for a range of values, rounded as they are stored, and the resulting codes.

Shapes as in `rtn.py`: weights are [..., C, g, M], and arrays with one number per group are [..., C, 1, M].
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from quant.packing import axis_position, check_group
from quant.qtensor import QTensor, scale_values
from quant.scheme import E2M1, Scheme, e4m3_codes

# The largest E2M1 value is 6 = 1.5 * 2**2: a scale of the largest weight's exponent minus 2 maps it to the last binade.
_E2M1_MAX_EXPONENT = 2


def group_range(weight_CgM: jax.Array, scheme: Scheme, reduced: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the lower and upper end of the range that each group's codes should cover, float32 [..., C, 1, M]."""
    if scheme.kind == "ternary":
        mean = jnp.mean(jnp.abs(weight_CgM), axis=reduced, keepdims=True)
        return -mean, mean
    return weight_CgM.min(axis=reduced, keepdims=True), weight_CgM.max(axis=reduced, keepdims=True)


def group_grid(
    low: jax.Array, high: jax.Array, factor: jax.Array | float, scheme: Scheme, scale_dtype: np.dtype
) -> tuple[jax.Array, jax.Array | None]:
    """Returns scales as stored, and zero points (uint8) if the scheme has them, for a range times a factor."""
    if scheme.kind == "uint":
        low, high = jnp.minimum(low, 0) * factor, jnp.maximum(high, 0) * factor
        scale = stored_scale((high - low) / scheme.max_code, scale_dtype)
        zero = jnp.round(-low / divisor(scale.astype(jnp.float32)))
        return scale, jnp.clip(zero, 0, scheme.max_code).astype(jnp.uint8)
    if scheme.signed_scales:
        largest = jnp.where(high >= -low, high, low)
        first = -scheme.bias if scheme.codebook is None else scheme.codebook[0]
        # 0 / -8 would be -0, and the weights of a group of zeros would be -0 too.
        return stored_scale(jnp.where(largest == 0, 0, largest * factor / first), scale_dtype), None
    scale = jnp.maximum(high, -low) * factor
    if scheme.scale_code:
        return (_exponent(scale) if scheme.scale_code == "e8m0" else e4m3_codes(scale / E2M1[7])), None
    return stored_scale(scale, scale_dtype), None


def stored_scale(scale: jax.Array, scale_dtype: np.dtype) -> jax.Array:
    """Rounds scales to `scale_dtype`; a scale that is not 0 becomes at least the smallest magnitude, with its sign.

    In float16 that is 2**-24. A scale of 0 would turn the group into zeros, as in ggml. 0 is among the values of every
    scheme (for iq4_nl 1, of 127), so no weight is further from the nearest multiple of a small scale than from 0.
    """
    limits = jnp.finfo(scale_dtype)
    # XLA may flush subnormal numbers of the other dtypes to 0.
    least = float(limits.smallest_subnormal if scale_dtype == jnp.float16 else limits.tiny)
    stored = scale.astype(scale_dtype)
    return jnp.where((stored == 0) & (scale != 0), jnp.copysign(least, scale).astype(scale_dtype), stored)


def _exponent(largest: jax.Array) -> jax.Array:
    """Returns E8M0 exponents for groups of that largest magnitude: uint8, 255 (NaN) where it is not finite."""
    _, exponent = jnp.frexp(largest)  # largest = m * 2**exponent with m in [1/2, 1)
    stored = jnp.clip(exponent - 1 - _E2M1_MAX_EXPONENT + 127, 0, 254)
    return jnp.where(jnp.isfinite(largest), jnp.where(largest == 0, 0, stored), 255).astype(jnp.uint8)


def encode_groups(weight_CgM: jax.Array, scale: jax.Array, zero: jax.Array | None, scheme: Scheme) -> jax.Array:
    """Returns the nearest codes, uint8 [..., C, g, M]."""
    scaled = weight_CgM / divisor(scale_values(scale, scheme))
    return scheme.encode(scaled if zero is None else scaled + zero.astype(jnp.float32))


def check_in_range(weight: jax.Array, in_range: jax.Array, scale_dtype: np.dtype) -> None:
    """Rejects, outside jit, a weight for which some group has no finite scale.

    Raises:
        ValueError: if so; the message says whether the weight is not finite or `scale_dtype` too narrow.
    """
    if not isinstance(in_range, jax.core.Tracer) and not in_range:
        if not jnp.isfinite(weight).all():
            raise ValueError(f"weight of shape {weight.shape} holds NaN or infinity: expected finite values")
        raise ValueError(f"a scale is above the range of {scale_dtype.name}: use scale_dtype bfloat16 or float32")


def divisor(scale: jax.Array) -> jax.Array:
    """Returns the scale, or 1 for a group of zeros, because 0 / 0 is NaN."""
    return jnp.where(scale == 0, 1, scale)


def checked_group_size(
    weight: jax.Array, scheme: Scheme, group_size: int | Literal["channel", "tensor"], axis: int
) -> int:
    """Returns the group size as a number, checked against the weight."""
    if not jnp.issubdtype(weight.dtype, jnp.floating) or weight.ndim < 2:
        raise ValueError(f"weight of dtype {weight.dtype} and shape {weight.shape}: expected floats, at least 2 axes")
    length = weight.shape[axis_position(weight.shape, axis)]
    if isinstance(group_size, str) and group_size not in ("channel", "tensor"):
        raise ValueError(f"group_size {group_size!r}: expected a number, 'channel' or 'tensor'")
    size = length if isinstance(group_size, str) else group_size
    check_group(length, size, scheme.bits)
    return size


def with_offset(quantized: QTensor) -> QTensor:
    """Replaces zero points by offsets: (code - zero) * scale becomes code * scale + offset.

    An offset is -zero * scale, rounded to the scales' dtype: in float16, for 4-bit codes, by at most 0.4% of a scale.

    Raises:
        ValueError: for a weight whose scales are quantized.
    """
    if quantized.zero is None:
        return quantized
    if isinstance(quantized.scale, QTensor):
        raise ValueError("scales of two levels beside zero points: expected float scales")
    zero, scale = quantized.zero.astype(jnp.float32), quantized.scale.astype(jnp.float32)
    offset = (0 - zero * scale).astype(quantized.scale.dtype)  # and no -0
    return dataclasses.replace(quantized, zero=None, offset=offset)
