"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx


def rms_norm(x: jax.Array, eps: float, weight: jax.Array | None = None, offset: float = 0.0) -> jax.Array:
    """Normalizes the last axis by its root mean square.

    The computation is in float32: in bfloat16, with 8 bits of precision, the mean of thousands of squares would be
    wrong in the first digits. Activations whose squares exceed float32, those of 1.8e19 and more, give NaN.

    Args:
        x: [..., D].
        eps: added inside the square root.
        weight: [D], multiplied with the normalized values; None for ones.
        offset: added to the weights, in float32.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    scale = jax.lax.rsqrt(mean_square + eps)
    # Squares that overflow give a scale of 0, and results that no check can tell from correct ones.
    scale = jnp.where(scale > 0, scale, jnp.nan)
    normed = wide * scale
    if weight is None:
        return normed.astype(x.dtype)
    if offset:
        return (normed * (weight.astype(jnp.float32) + offset)).astype(x.dtype)
    return normed.astype(x.dtype) * weight.astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with D weights."""

    def __init__(self, width: int, eps: float, dtype: jax.typing.DTypeLike, offset: float = 0.0):
        """Makes `width` weights of 1 - `offset`, which change nothing."""
        self.eps, self.offset = eps, offset
        self.weight_D = nnx.Param(jnp.full(width, 1 - offset, dtype))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normalizes the last axis."""
        return rms_norm(x_BTD, self.eps, self.weight_D[...], self.offset)
