"""Weights that make up for the errors of their inputs: what QEP corrects before a quantizer rounds.

Arai & Ichikawa 2025, "Quantization Error Propagation", arXiv:2504.09629. Layer by layer a quantizer sees the inputs z
of the quantized model where the float model had x. The best weights for these inputs are not w, but those of least
squares to the outputs x w: w + (z' z)^-1 z' (x - z) w. Half of the way to them fits the calibration text less closely.

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
    """A weight moved towards what it has to be for the inputs that it gets: w + a (H + d I)^-1 B.

    Args:
        weight_KM: float32.
        hessian_KK: mean of z' z over the inputs that it gets.
        missing_KM: B, mean of z' e, where e is what is missing from its outputs: (x - z) w, or that and what is missing
            from the sum that these outputs are added to.
        strength: a, from 0 (the weight stays) to 1 (least squares).
        damping: of H, relative to its mean diagonal.

    Returns:
        float32 [K, M]; the weight itself where no input was seen.
    """
    diagonal_K = jnp.diagonal(hessian_KK)
    # A channel that is always 0 has no equation: without the 1 it would be 0 = 0.
    damped_K = jnp.where(diagonal_K == 0, 1, diagonal_K + damping * diagonal_K.mean())
    factor = jax.scipy.linalg.cho_factor(jnp.fill_diagonal(hessian_KK, damped_K, inplace=False), lower=True)
    moved_KM = weight_KM + strength * jax.scipy.linalg.cho_solve(factor, missing_KM)
    return jnp.where(jnp.isfinite(moved_KM).all(), moved_KM, weight_KM)


def missing_by_inputs(cross_KK: jax.Array, weight_KM: jax.Array) -> jax.Array:
    """B of `propagated` from the mean of z' (x - z), float32 [K, K]."""
    return _matmul(cross_KK, weight_KM)
