"""SmoothQuant: divides activations by a scale per channel, and multiplies weights by it, so that both fit in int8.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv:2211.10438. Activations have a few large channels, weights hardly any. The scales move part of the range from
activations to weights; the product does not change.

Dimension key: `K` contraction axis, `M` outputs.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_LEAST = float(jnp.finfo(jnp.float32).tiny)


def smoothing_scale(
    max_abs_activation: jax.Array, weights: jax.Array | Sequence[jax.Array], alpha: float = 0.5
) -> jax.Array:
    """Returns the scale of each input channel: s_k = max|x_k|**alpha / max|w_k|**(1 - alpha) (equation 4 of the paper).

    At alpha = 0.5 a channel's activations and weights get the same largest magnitude, sqrt(max|x_k| * max|w_k|).

    A maximum of 0 counts as the smallest nonzero maximum, or as 1 if all are 0. So s is positive and finite, a channel
    without activations does not widen its weight's groups, and one without weights does not widen its activations'
    scale.

    The caller then quantizes w * s[:, None] and folds 1 / s into the operation that makes x, so that scaling costs
    nothing when the model runs; the rules are those of `awq.search_scale`:

    - after an RMSNorm, its weight becomes weight / s (where it multiplies by 1 + weight: (1 + weight) / s - 1);
    - after a linear layer, with at most a product with something else between, its outputs, columns M, are divided
      by s.

    All consumers of x must share one s: pass all their weights in one call.

    Args:
        max_abs_activation: float [K], largest magnitude of each input channel over the calibration text.
        weights: float [K, M], or several [K, M_i] with the same input.
        alpha: in [0, 1], how much of the range moves from activations to weights; 0.5 in the paper, up to 0.9 for large
            outliers.

    Returns:
        s, float32 [K].

    Raises:
        ValueError: for incompatible arguments, and, outside jit, for activations that are negative or not finite, or
            weights that are not finite.
    """
    matrices = [jnp.asarray(w) for w in (weights if isinstance(weights, Sequence) else [weights])]
    activation_K = jnp.asarray(max_abs_activation)
    _check_arguments(activation_K, matrices, alpha)
    activation_K = activation_K.astype(jnp.float32)
    weight_K = jnp.max(jnp.stack([jnp.abs(w.astype(jnp.float32)).max(axis=1) for w in matrices]), axis=0)
    for name, x in (("max_abs_activation", activation_K), ("a weight", weight_K)):
        if not isinstance(x, jax.core.Tracer) and not (jnp.isfinite(x) & (x >= 0)).all():
            raise ValueError(f"{name} holds a value that is negative or not finite: expected maxima of finite |x|")
    scale_K = _positive(activation_K) ** alpha / _positive(weight_K) ** (1 - alpha)
    # The smallest possible activations over the largest possible weights are below float32's range.
    return jnp.maximum(scale_K, _LEAST)


def _positive(magnitude_K: jax.Array) -> jax.Array:
    """Replaces magnitudes of zero by the smallest one that is not zero, or by 1 if all are zero."""
    is_zero_K = magnitude_K < _LEAST  # includes denormal numbers: their reciprocals overflow
    least = jnp.min(jnp.where(is_zero_K, jnp.inf, magnitude_K))
    return jnp.where(is_zero_K, jnp.where(jnp.isinf(least), 1, least), magnitude_K)


def _check_arguments(activation_K: jax.Array, weights: list[jax.Array], alpha: float) -> None:
    """Checks the arguments of `smoothing_scale` except the values in arrays."""
    if not weights:
        raise ValueError("no weights: expected one, or several that share their input")
    if activation_K.ndim != 1 or not activation_K.size:
        raise ValueError(f"max_abs_activation of shape {activation_K.shape}: expected one number per channel, (K,)")
    length = len(activation_K)
    for weight in weights:
        floats = jnp.issubdtype(weight.dtype, jnp.floating)
        if not floats or weight.ndim != 2 or len(weight) != length or not weight.size:
            raise ValueError(f"weight of dtype {weight.dtype} and shape {weight.shape}: expected floats, ({length}, M)")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha {alpha}: expected 0 to 1, such as 0.5")
