"""AWQ: scales input channels before quantization, so that channels with large activations lose less.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978.
This module searches for the scales; the caller passes the quantizer.

Dimension key: `K` contraction axis, `M` outputs, `T` samples (tokens).
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from quant.qtensor import QTensor, dequantize

_LEAST_SCALE = 1e-4


def activation_scale(mean_abs_activation: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """Returns scales of input channels for one exponent: mean|x|**alpha, normalized so that max = 1 / min.

    Args:
        mean_abs_activation: float [K], mean magnitude of each input channel.
        alpha: from 0 (all scales are 1) to 1 (division makes all channels equally large).

    Returns:
        Scales, float32 [K], positive. As in llm-awq, powers below 1e-4 count as 1e-4, so that a channel without
        activations gets a finite scale.
    """
    scale_K = jnp.maximum(jnp.asarray(mean_abs_activation, jnp.float32) ** alpha, _LEAST_SCALE)
    # The roots come before the product, so that neither overflows.
    return scale_K / (jnp.sqrt(scale_K.max()) * jnp.sqrt(scale_K.min()))


def search_scale(
    weights: jax.Array | Sequence[jax.Array],
    mean_abs_activation: jax.Array,
    x: jax.Array,
    quantize: Callable[[jax.Array], QTensor | jax.Array],
    *,
    grid: int = 20,
) -> jax.Array:
    """Searches for the scale of each input channel with which quantization changes a layer's outputs least.

    It tries s = `activation_scale(mean_abs_activation, alpha)` for alpha = 0, 1 / grid, ... below 1, and keeps the s
    with the least sum over weights w of ||x w - (x / s) quantize(w * s)||^2. For alpha = 0, s is 1: on `x` the result
    is never worse than no scaling.

    The caller then quantizes w * s[:, None] and folds 1 / s into the operation that makes x, so that scaling costs
    nothing when the model runs:

    - after an RMSNorm, its weight becomes weight / s (where it multiplies by 1 + weight: (1 + weight) / s - 1);
    - after a linear layer, with at most a product with something else between (up projection before down projection;
      value before output projection with as many value as query heads), its outputs, columns M, are divided by s.

    All consumers of x must share one s: query, key and value projections share one, gate and up projections another.
    Pass all their weights in one call.

    Args:
        weights: float [K, M], or several [K, M_i] with the same input.
        mean_abs_activation: float [K], mean magnitude of each input channel over the calibration text.
        x: sample of inputs, float [..., K]; all axes before K are samples.
        quantize: the quantizer, such as `lambda weight: quantize_rtn(weight, "int4", group_size=32)`; it returns a
            QTensor or the dequantized array.
        grid: number of exponents to try.

    Returns:
        s, float32 [K].

    Raises:
        ValueError: for incompatible arguments, mean activations that are negative or not finite, or if quantization
            without scaling gives outputs that are not finite.
    """
    matrices = [jnp.asarray(w) for w in (weights if isinstance(weights, Sequence) else [weights])]
    mean_abs_K, x = jnp.asarray(mean_abs_activation), jnp.asarray(x)
    _check_arguments(matrices, mean_abs_K, x, grid)
    x_TK = x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    best_scale_K, least = jnp.ones(mean_abs_K.shape, jnp.float32), float("inf")
    for step in range(grid):
        scale_K = activation_scale(mean_abs_K, step / grid)
        error = float(sum(_output_error(weight, scale_K, x_TK, quantize) for weight in matrices))
        if step == 0 and not math.isfinite(error):
            raise ValueError(f"output error {error} without scaling: expected finite weights, inputs and scales")
        # Of equal errors the first wins, which scales least. NaN, from scales out of a quantizer's range, never wins.
        if error < least:
            best_scale_K, least = scale_K, error
    return best_scale_K


def _output_error(
    weight_KM: jax.Array, scale_K: jax.Array, x_TK: jax.Array, quantize: Callable[[jax.Array], QTensor | jax.Array]
) -> jax.Array:
    """Returns ||x w - (x / s) quantize(w * s)||^2."""
    scaled_KM = (weight_KM.astype(jnp.float32) * scale_K[:, None]).astype(weight_KM.dtype)
    quantized = quantize(scaled_KM)
    restored_KM = dequantize(quantized) if isinstance(quantized, QTensor) else quantized.astype(jnp.float32)
    return _difference(weight_KM.astype(jnp.float32), restored_KM, scale_K, x_TK)


@jax.jit
def _difference(weight_KM: jax.Array, restored_KM: jax.Array, scale_K: jax.Array, x_TK: jax.Array) -> jax.Array:
    """Returns ||x (w - r / s)||^2, with one product instead of two that nearly cancel."""
    error_KM = weight_KM - restored_KM / scale_K[:, None]
    return jnp.sum(jnp.matmul(x_TK, error_KM, precision=jax.lax.Precision.HIGHEST) ** 2)


def _check_arguments(weights: list[jax.Array], mean_abs_K: jax.Array, x: jax.Array, grid: int) -> None:
    """Checks the arguments of `search_scale`."""
    if not weights:
        raise ValueError("no weights: expected one, or several that share their input")
    if mean_abs_K.ndim != 1:
        raise ValueError(f"mean_abs_activation of shape {mean_abs_K.shape}: expected one per input channel, (K,)")
    length = len(mean_abs_K)
    for weight in weights:
        if not jnp.issubdtype(weight.dtype, jnp.floating) or weight.ndim != 2 or len(weight) != length:
            raise ValueError(f"weight of dtype {weight.dtype} and shape {weight.shape}: expected floats, ({length}, M)")
    if not jnp.issubdtype(x.dtype, jnp.floating) or not x.size or x.shape[-1] != length:
        raise ValueError(f"inputs of dtype {x.dtype} and shape {x.shape}: expected floats, samples of ({length},)")
    if not (jnp.isfinite(mean_abs_K) & (mean_abs_K >= 0)).all():
        raise ValueError("mean_abs_activation holds a value that is negative or not finite: expected means of |x|")
    if grid < 1:
        raise ValueError(f"grid {grid}: expected at least 1 exponent, such as 20")
