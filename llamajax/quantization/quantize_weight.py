"""Quantizes one weight by one rule."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.parameters import Place, Spec
from llamajax.quantization.calibrate import Statistics
from quant import (
    QTensor,
    Rule,
    outlier_channels,
    quantize_gptq,
    quantize_hqq,
    quantize_rtn,
    quantize_two_levels,
    split_outliers,
    with_offset,
)

# Number of weights quantized at a time. Three tensors are in work, each with several copies of such a part in float32.
# For 420M weights in bfloat16 this takes 36 MiB beside the result and a process that has compiled anything; with parts
# four times as large, 106 MiB.
_PART_WEIGHTS = 2**19


def quantize_weight(
    place: Place, weight: Any, rule: Rule, spec: Spec, seen: Statistics | None = None, importance: Any = None
) -> jax.Array | QTensor:
    """Quantizes one weight, with any number of leading axes, by its rule.

    Args:
        place: the weight's place.
        weight: float.
        rule: the rule.
        spec: the weight's declaration.
        seen: statistics of its input, if the rule needs them.
        importance: float [K], not negative: the importance of each input channel for a rule that asks for it; by
            default `seen.mean_square_K`.

    Raises:
        LlamaJaxError: with the name of the weight, if the rule does not fit it, or it is not finite.
    """
    if rule.keep or rule.scheme is None:
        if not jnp.isfinite(weight).all():
            raise LlamaJaxError(f"{place} of shape {weight.shape} holds NaN or infinity: expected finite weights")
        return weight
    axis = spec.axis
    shape = weight.shape
    rule = rule.for_inputs(shape[axis])
    assert rule.scheme is not None  # a rule that quantizes
    with naming(f"{place} of shape {shape}"):
        if seen is None and (rule.needs_text or (rule.importance and importance is None)):
            raise ValueError("the rule needs calibration, but the weight is looked up: its inputs are token ids")
        if rule.outliers:
            assert seen is not None
            index = outlier_channels(seen.max_abs_K, rule.outliers)
            quantized = split_outliers(weight, index, _quantizer(rule, axis, _without(seen, index)), axis=axis)
        else:
            quantized = _in_parts(_quantizer(rule, axis, seen, importance), weight, rule, axis)
        if quantized.shape != tuple(shape):
            raise ValueError(f"its codes are of shape {quantized.shape}")
        return dataclasses.replace(quantized, activations=rule.activations).validate()


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Turns errors of `quant`, which does not know the name of a weight, into errors that begin with `what`."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise LlamaJaxError(f"{what}: {error}") from None


def in_dtype(place: Place, weight: jax.Array, dtype: Any) -> jax.Array:
    """Converts a float32 weight to the dtype in which it is stored.

    Raises:
        LlamaJaxError: with the name of the weight, if a value is above the dtype's range.
    """
    cast = weight.astype(dtype)
    if not jnp.isfinite(cast).all():
        largest = float(jnp.abs(weight).max())
        raise LlamaJaxError(
            f"{place}: a value of magnitude {largest:g} is above the range of {cast.dtype}: convert the model to "
            "bfloat16 or float32 first"
        )
    return cast


def by_rounding(weight: Any, rule: Rule, axis: int, importance: Any = None) -> QTensor:
    """Quantizes a weight by round-to-nearest, in the form of a rule that was resolved for its length.

    Raises:
        ValueError: if the rule does not fit the weight.
    """
    assert rule.scheme is not None  # a rule that quantizes
    options: dict[str, Any] = {"axis": axis, "scale_dtype": rule.scale_dtype, "clip": rule.clip}
    if rule.scale_scheme is not None:
        size: Any = rule.group_size  # which is checked
        options |= {"group_size": size, "scale_group": rule.scale_group, "importance": importance}
        return quantize_two_levels(weight, rule.scheme, rule.scale_scheme, **options)
    made = quantize_rtn(weight, rule.scheme, group_size=rule.group_size, importance=importance, **options)
    return with_offset(made) if rule.offset else made


def _quantizer(
    rule: Rule, axis: int, seen: Statistics | None, importance: Any = None
) -> Callable[[jax.Array], QTensor]:
    """Returns the method of a rule, as a function of the weight."""
    scheme = rule.scheme
    assert scheme is not None  # a rule that quantizes
    if rule.method == "rtn":
        if importance is None and seen is not None:
            importance = seen.mean_square_K
        return lambda weight: by_rounding(weight, rule, axis, importance if rule.importance else None)
    options: dict[str, Any] = {"group_size": rule.group_size, "axis": axis, "scale_dtype": rule.scale_dtype}
    finish = with_offset if rule.offset else lambda made: made
    if rule.method == "hqq":
        return lambda weight: finish(quantize_hqq(weight, scheme, **options))
    assert seen is not None and seen.hessian_KK is not None
    hessian_KK = seen.hessian_KK
    options |= {"damping": rule.damping, "descent": rule.descent}
    if rule.scale_scheme is not None and rule.scale_group != "channel":
        # Scales of several groups depend on each other, so they are chosen before GPTQ reaches the last group.
        importance = jnp.diagonal(hessian_KK) if rule.clip else None
        scales = lambda weight: by_rounding(weight, rule, axis, importance)  # noqa: E731
        return lambda weight: quantize_gptq(weight, hessian_KK, scheme, scales=scales(weight), **options)
    options |= {"clip": rule.clip, "act_order": rule.act_order, "scale_scheme": rule.scale_scheme}
    return lambda weight: finish(quantize_gptq(weight, hessian_KK, scheme, **options))


def _in_parts(quantizer: Callable[[jax.Array], QTensor], weight: Any, rule: Rule, axis: int) -> QTensor:
    """Quantizes a weight in parts along its outputs, if these do not depend on each other.

    The whole weight would be copied into float32 several times; parts stay in a processor's cache.
    """
    if rule.method == "gptq" or rule.group_size == "tensor" or weight.size <= _PART_WEIGHTS:
        return quantizer(jnp.asarray(weight))
    across = -1 if axis == -2 else -2
    count = weight.shape[across]
    # All parts have one size, if there is a suitable divisor, so that one compiled program serves.
    most = max(1, _PART_WEIGHTS * count // weight.size)
    size = max(size for size in range(1, most + 1) if count % size == 0)
    size = most if size < most // 4 else size
    slices = [slice(start, start + size) for start in range(0, count, size)]
    cut = [weight[..., part] if across == -1 else weight[..., part, :] for part in slices]
    parts = [jax.tree.map(np.asarray, quantizer(jnp.asarray(part))) for part in cut]
    return jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=across), *parts)


def _without(seen: Statistics, index: jax.Array) -> Statistics:
    """Returns statistics for GPTQ in which the outlier channels are zero: their weights are stored beside the codes."""
    if seen.hessian_KK is None:
        return seen
    return seen._replace(hessian_KK=seen.hessian_KK.at[index].set(0).at[:, index].set(0))
