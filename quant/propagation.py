"""QEP: corrects a weight for the quantization errors of its inputs, before a quantizer rounds it.

Arai & Ichikawa 2025, "Quantization Error Propagation", arXiv:2504.09629. When a model is quantized layer by layer, a
layer of the quantized model sees inputs z where the float model had x. The best weights for z are not w, but the least
squares fit to the outputs x w: w + (z' z)^-1 z' (x - z) w. Going only part of the way there (`strength`) fits the
calibration text less closely.

Dimension key: `K` contraction axis, `M` outputs.
"""

import functools

import jax
import jax.numpy as jnp

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def propagated(
    weight_KM: jax.Array, hessian_KK: jax.Array, missing_KM: jax.Array, strength: float, damping: float = 0.1
) -> jax.Array:
    """Moves a weight towards the least squares fit for its quantized inputs: w + a (H + d I)^-1 B.

    Args:
        weight_KM: float32.
        hessian_KK: H, mean of z' z over the inputs z of the quantized model.
        missing_KM: B, mean of z' e, where e is the error of the outputs: (x - z) w, optionally plus the error of the
            sum that these outputs are added to.
        strength: a, from 0 (the weight stays) to 1 (least squares).
        damping: d, relative to the mean diagonal of H.

    Returns:
        float32 [K, M]; the weight itself if the result is not finite.
    """
    diagonal_K = jnp.diagonal(hessian_KK)
    # A channel that is always 0 has the equation 0 = 0, which the 1 makes solvable.
    damped_K = jnp.where(diagonal_K == 0, 1, diagonal_K + damping * diagonal_K.mean())
    factor = jax.scipy.linalg.cho_factor(jnp.fill_diagonal(hessian_KK, damped_K, inplace=False), lower=True)
    moved_KM = weight_KM + strength * jax.scipy.linalg.cho_solve(factor, missing_KM)
    return jnp.where(jnp.isfinite(moved_KM).all(), moved_KM, weight_KM)


def missing_by_inputs(cross_KK: jax.Array, weight_KM: jax.Array) -> jax.Array:
    """Returns B of `propagated` from the mean of z' (x - z), float32 [K, K]."""
    return _matmul(cross_KK, weight_KM)
