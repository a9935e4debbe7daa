"""Outlier channels: a few input channels of a weight are kept in floats, beside the codes of all the others.

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv:2208.07339. A few
channels of a transformer's activations, always the same ones, are tens of times larger than the rest. They determine
the scale of every token that is rounded to int8, and the errors of their weights matter most. The paper finds them anew
in each product; this module finds them once, on calibration text, so that shapes are static.

Dimension key: `K` contraction axis, `M` outputs, `r` outlier channels. Shapes are written for `axis=-2`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from quant.packing import axis_position
from quant.qtensor import SCALE_DTYPES, QTensor, outlier_slots


def outlier_channels(
    max_abs_activation: jax.Array, count: int | None = None, *, threshold: float | None = None
) -> jax.Array:
    """Returns the input channels with the largest activations: a given number, or those above a threshold.

    Args:
        max_abs_activation: float [..., K], largest magnitude of each input channel over the calibration text; leading
            axes are layers.
        count: r, number of channels per layer. Of equal channels the first are taken.
        threshold: select channels whose magnitude exceeds this (6 in the paper). All layers have the same r: that of
            the layer with most such channels; the others get their r largest channels. It does not work under jit,
            because r depends on values.

    Returns:
        Indices, int32 [..., r], ascending. r is 0 if no channel exceeds the threshold.

    Raises:
        ValueError: unless exactly one of count and threshold is given, for a count that is not in 1 ... K, and, outside
            jit, for magnitudes that are negative or not finite.
    """
    largest = jnp.asarray(max_abs_activation)
    if not jnp.issubdtype(largest.dtype, jnp.floating) or not largest.size:
        raise ValueError(f"max_abs_activation of dtype {largest.dtype} and shape {largest.shape}: expected floats")
    if _is_known(largest) and not (jnp.isfinite(largest) & (largest >= 0)).all():
        raise ValueError("max_abs_activation holds a value that is negative or not finite: expected maxima of |x|")
    if (count is None) == (threshold is None):
        raise ValueError(f"count {count} and threshold {threshold}: expected one of the two and None for the other")
    if threshold is not None:
        count = int(jnp.sum(largest > threshold, axis=-1).max())
    elif count is None or not 1 <= count <= largest.shape[-1]:
        raise ValueError(f"count {count}: expected 1 to {largest.shape[-1]}, the number of channels")
    # top_k puts the lower index first if values are equal.
    return jnp.sort(jax.lax.top_k(largest, count)[1], axis=-1).astype(jnp.int32)


def split_outliers(
    weight: jax.Array,
    index: jax.Array,
    quantize: Callable[[jax.Array], QTensor],
    *,
    axis: int = -2,
    dtype: jax.typing.DTypeLike = jnp.float16,
) -> QTensor:
    """Quantizes a weight except some input channels, which are kept as floats.

    The quantizer sees zeros in place of these channels, so that they do not widen the range of their groups. The codes
    of these zeros do not matter. A quantizer that moves errors from channel to channel should not move any to these
    channels, where they would be lost: for GPTQ set the rows and columns of `index` in the Hessian to zero.

    Args:
        weight: float [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`).
        index: int [..., r], distinct channels in [0, K), for example from `outlier_channels`. With r = 0 the whole
            weight is quantized.
        quantize: the quantizer, such as `lambda weight: quantize_rtn(weight, "int8", group_size="channel")`.
        axis: the contraction axis, -2 or -1; the quantizer must have the same.
        dtype: dtype of the kept channels, float16, bfloat16 or float32. In float16 magnitudes below 3e-8 become 0.

    Returns:
        The quantized weight with `outlier` and `outlier_index`.

    Raises:
        ValueError: for incompatible arguments, a quantizer with another axis, and, outside jit, for an index that is
            out of range or repeated and for outliers outside the range of `dtype`.
    """
    weight, index, dtype = jnp.asarray(weight), jnp.asarray(index), jnp.dtype(dtype)
    _check_arguments(weight, index, axis, dtype)
    if not index.shape[-1]:
        return quantize(weight)
    index = jnp.expand_dims(index.astype(jnp.int32), -3 - axis)
    outlier = jnp.take_along_axis(weight, index, axis=axis, mode="clip").astype(dtype)
    if _is_known(outlier) and not jnp.isfinite(outlier).all():
        raise ValueError(f"an outlier is not finite in {dtype.name}: expected finite weights within the dtype's range")
    is_outlier = outlier_slots(index, weight.shape[axis], axis) >= 0
    quantized = quantize(jnp.where(is_outlier, 0, weight))
    if quantized.axis != axis or quantized.shape != weight.shape:
        raise ValueError(
            f"quantize returned a weight of shape {quantized.shape} with contraction axis {quantized.axis}: "
            f"expected {weight.shape} and {axis}"
        )
    return dataclasses.replace(quantized, outlier=outlier, outlier_index=index).validate()


def _check_arguments(weight: jax.Array, index: jax.Array, axis: int, dtype: jnp.dtype) -> None:
    """Checks the arguments of `split_outliers`."""
    length = weight.shape[axis_position(weight.shape, axis)]
    if not jnp.issubdtype(weight.dtype, jnp.floating) or weight.ndim < 2:
        raise ValueError(f"weight of dtype {weight.dtype} and shape {weight.shape}: expected floats, at least 2 axes")
    if dtype.name not in SCALE_DTYPES:
        raise ValueError(f"dtype {dtype.name}: expected {' or '.join(SCALE_DTYPES)}")
    if not jnp.issubdtype(index.dtype, jnp.integer) or index.shape[:-1] != weight.shape[:-2] or not index.ndim:
        raise ValueError(
            f"index of dtype {index.dtype} and shape {index.shape}: expected integers, {(*weight.shape[:-2], 'r')}"
        )
    if _is_known(index) and index.size:
        ascending = jnp.sort(index, axis=-1)
        if ascending.min() < 0 or ascending.max() >= length or (ascending[..., 1:] == ascending[..., :-1]).any():
            raise ValueError(f"index holds a repeated channel or one not in 0 ... {length - 1}: expected distinct ones")


def _is_known(x: jax.Array) -> bool:
    """Whether the values are available, which they are not under jit."""
    return not isinstance(x, jax.core.Tracer)
