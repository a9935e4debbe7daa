"""Hessians of layers' squared output errors, the statistics of a weight's inputs that GPTQ uses.

Dimension key: `K` contraction axis, `T` samples (tokens).
"""

import functools

import jax
import jax.numpy as jnp

# Sums over thousands of channels and tokens: TPUs and GPUs would otherwise multiply float32 in bfloat16 or TF32.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

_MAX_DAMPING = 1e3


def hessian(x: jax.Array) -> jax.Array:
    """Returns the Hessian of a layer's squared output error with respect to one output's weights, up to a factor.

    Args:
        x: inputs of the layer, float [..., K]; all axes before K are samples.

    Returns:
        Mean of the outer products x x', float32 [K, K].

    Raises:
        ValueError: for no samples, or inputs that are not floats.
    """
    x = jnp.asarray(x)
    return add_to_hessian(jnp.zeros(x.shape[-1:] * 2, jnp.float32), 0, x)[0]


def add_to_hessian(h: jax.Array, count: int | jax.Array, x: jax.Array) -> tuple[jax.Array, int | jax.Array]:
    """Adds a batch of inputs to a running `hessian`, whose size does not grow with the number of samples.

    It keeps a mean rather than a sum, so that float32 keeps its precision for any number of tokens.

    Args:
        h: float32 [K, K], the mean over the samples so far; zeros in the beginning.
        count: number of samples so far.
        x: inputs of the layer, float [..., K].

    Returns:
        The mean over all samples, float32 [K, K], and their number.

    Raises:
        ValueError: for no samples, inputs that are not floats, or of another width than `h`.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.size:
        raise ValueError(f"inputs of dtype {x.dtype} and shape {x.shape}: expected floats, at least one sample")
    if h.shape != x.shape[-1:] * 2:
        raise ValueError(f"inputs of shape {x.shape} for a Hessian of shape {h.shape}: expected one width, [..., K]")
    samples_TK = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    total = count + samples_TK.shape[0]
    # Dividing before multiplying keeps activations of 1e4 over millions of tokens far below float32's largest value.
    return h * (count / total) + _matmul(samples_TK.T / jnp.asarray(total, jnp.float32), samples_TK), total


def inverse_factor(hessian_KK: jax.Array, damping: float | jax.Array) -> jax.Array:
    """Returns the upper triangular U with U' U the inverse of the damped Hessian, float32 [K, K].

    A factorization H = R R' with R upper triangular (Cholesky from the last row up) gives U = inverse of R. The paper
    takes the Cholesky factor of an explicit inverse, which squares the condition number first: too much for float32.
    """
    diagonal_K = jnp.diagonal(hessian_KK)
    dead_K = diagonal_K == 0
    mean = diagonal_K.sum() / jnp.maximum((~dead_K).sum(dtype=jnp.float32), 1)
    least_pivot = len(diagonal_K) * jnp.finfo(jnp.float32).eps

    def attempt(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        damping, _, _ = state
        damped_K = jnp.where(dead_K, 1, diagonal_K + damping * mean)
        damped_KK = jnp.fill_diagonal(hessian_KK, damped_K, inplace=False)
        upper_KK = jnp.linalg.cholesky(damped_KK[::-1, ::-1])[::-1, ::-1]
        # The pivot is what the other channels leave of a channel's diagonal. A smaller one is rounding; NaN fails too.
        works = (jnp.diagonal(upper_KK) ** 2 > least_pivot * damped_K).all()
        return jnp.maximum(10 * damping, 1e-3), works, upper_KK

    _, _, upper_KK = jax.lax.while_loop(
        lambda state: ~state[1] & (state[0] <= _MAX_DAMPING),
        attempt,
        (jnp.minimum(jnp.float32(damping), _MAX_DAMPING), jnp.array(False), hessian_KK),
    )
    return jax.scipy.linalg.solve_triangular(upper_KK, jnp.eye(len(diagonal_K)))
