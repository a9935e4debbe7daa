"""The one product of activations with a weight. Every matrix of the model is used through `einsum` and only so."""

import jax
import jax.numpy as jnp


def einsum(equation: str, activations: jax.Array, weight: jax.Array, *, dtype: jnp.dtype | None = None) -> jax.Array:
    """Contracts activations with a weight, as `jnp.einsum(equation, activations, weight)`.

    Products are summed in float32 whatever the inputs are, and the result is rounded once, to `dtype`: a sum over
    thousands of bfloat16 terms kept in bfloat16 would lose the small ones. float32 inputs are multiplied in float32 on
    every backend: TPU and recent GPU would otherwise round them to bfloat16 or TF32 first.

    Args:
        equation: einsum equation with the activations first, for example "BTD,DF->BTF".
        activations: float array.
        weight: float array.
        dtype: of the result; that of the activations unless given.

    Returns:
        The contraction, in `dtype`.
    """
    precision = jax.lax.Precision.HIGHEST if activations.dtype == jnp.float32 else None
    product = jnp.einsum(equation, activations, weight, precision=precision, preferred_element_type=jnp.float32)
    return product.astype(dtype or activations.dtype)
