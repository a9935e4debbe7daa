"""Outlier channels: a few input channels of a weight kept in floats, beside the codes of all the others.

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", arXiv:2208.07339. A few
channels of a transformer's activations are tens of times larger than the rest, always the same ones. They set the
scale of every token that is rounded to int8, and the errors of their weights weigh most. The paper finds them anew in
each product; here they are found once, on calibration text, so that shapes are static.

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
    """The input channels with the largest activations: a number of them, or those above a threshold.

    Args:
        max_abs_activation: float [..., K], largest magnitude of each input channel over the calibration text; leading
            axes are layers.
        count: r, how many channels of each layer. Of equals the first.
        threshold: take channels with more than this, 6 in the paper. As r is one number for all layers, it is that of
            the layer with most, and the others get their r largest too. Not under jit: r depends on values.

    Returns:
        Indices, int32 [..., r], ascending. r is 0 if no channel exceeds the threshold.

    Raises:
        ValueError: unless exactly one of count and threshold is given, for a count that is not in 1 ... K, and for
            magnitudes that are negative or, outside jit, not finite.
    """
    largest = jnp.asarray(max_abs_activation)
    if not jnp.issubdtype(largest.dtype, jnp.floating) or not largest.size:
        raise ValueError(f"max_abs_activation of dtype {largest.dtype} and shape {largest.shape}: expected floats")
    if _is_known(largest) and not (jnp.isfinite(largest) & (largest >= 0)).all():
        raise ValueError("max_abs_activation holds a value that is negative or not finite: expected maxima of |x|")
    if (count is None) == (threshold is None):
        raise ValueError(f"count {count} and threshold {threshold}: expected one of the two")
    if threshold is not None:
        count = int(jnp.sum(largest > threshold, axis=-1).max())
    elif count is None or not 1 <= count <= largest.shape[-1]:
        raise ValueError(f"count {count}: expected 1 to {largest.shape[-1]}, the number of channels")
    # top_k puts the lower index first where values are equal.
    return jnp.sort(jax.lax.top_k(largest, count)[1], axis=-1).astype(jnp.int32)


def split_outliers(
    weight: jax.Array,
    index: jax.Array,
    quantize: Callable[[jax.Array], QTensor],
    *,
    axis: int = -2,
    dtype: jax.typing.DTypeLike = jnp.float16,
) -> QTensor:
    """Quantizes a weight but for some input channels, which are kept as floats.

    The quantizer sees zeros in their place, so that they do not widen the range of the groups they are in. What it
    makes of these zeros does not matter. A quantizer that moves errors from channel to channel should not move any
    there, where they are lost: for GPTQ set the rows and columns of `index` in the Hessian to zero.

    Args:
        weight: float [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`).
        index: int [..., r], distinct channels in [0, K), for example from `outlier_channels`. With r = 0 the weight is
            quantized as it is.
        quantize: the quantizer, as `lambda weight: quantize_rtn(weight, "int8", group_size="channel")`.
        axis: the contraction axis, -2 or -1, that of the quantizer.
        dtype: that the channels are kept in, float16, bfloat16 or float32. In float16 magnitudes below 3e-8 become 0.

    Returns:
        The quantized weight with `outlier` and `outlier_index`.

    Raises:
        ValueError: for arguments that do not fit each other, a quantizer of another axis, and, outside jit, for an
            index that is out of range or repeated and for outliers that leave the range of `dtype`.
    """
    weight, index, dtype = jnp.asarray(weight), jnp.asarray(index), jnp.dtype(dtype)
    _check_arguments(weight, index, axis, dtype)
    if not index.shape[-1]:
        return quantize(weight)
    index = jnp.expand_dims(index.astype(jnp.int32), -3 - axis)
    outlier = jnp.take_along_axis(weight, index, axis=axis, mode="clip").astype(dtype)
    if _is_known(outlier) and not jnp.isfinite(outlier).all():
        raise ValueError(
            f"an outlier is not finite in {dtype.name}: expected a finite weight, within the dtype's range"
        )
    is_outlier = outlier_slots(index, weight.shape[axis], axis) >= 0
    quantized = quantize(jnp.where(is_outlier, 0, weight))
    if quantized.axis != axis or quantized.shape != weight.shape:
        raise ValueError(
            f"quantize made a weight of shape {quantized.shape} with contraction axis {quantized.axis}: "
            f"expected {weight.shape} and {axis}"
        )
    return dataclasses.replace(quantized, outlier=outlier, outlier_index=index).validate()


def _check_arguments(weight: jax.Array, index: jax.Array, axis: int, dtype: jnp.dtype) -> None:
    """Checks what `split_outliers` takes."""
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
            raise ValueError(f"index holds a channel that is repeated or not in 0 ... {length - 1}")


def _is_known(x: jax.Array) -> bool:
    """Whether values can be looked at: not under jit."""
    return not isinstance(x, jax.core.Tracer)
