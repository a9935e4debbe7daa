"""Two levels of scales: scales and offsets are quantized to a few bits themselves, with float scales of their own.

One float scales the quantized scales of 256 weights, as in ggml's K types, or those of a whole output.

Shapes as in `rtn.py`.
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from quant.grid import check_in_range, divisor
from quant.mixed import map_quantized
from quant.packing import axis_position, merge_groups, pack, split_groups, unpack
from quant.qtensor import QTensor, dequantize, scale_values
from quant.rtn import checked_importance, quantize_rtn
from quant.scheme import Scheme

# Weights whose scales share a float of the second level.
SUPERBLOCK = 256
# Number of starts of the search for a range, and of refits from the best of them.
_STARTS, _REFITS = 10, 2


def quantize_two_levels(
    weight: jax.Array,
    scheme: Scheme | str,
    scale_scheme: Scheme | str,
    *,
    group_size: int,
    scale_group: int | Literal["channel"] = SUPERBLOCK,
    axis: int = -2,
    scale_dtype: jax.typing.DTypeLike = jnp.float16,
    clip: Literal["mse"] | None = None,
    importance: jax.Array | None = None,
) -> QTensor:
    """Quantizes a weight by rounding, with quantized scales; codes are chosen for the scales after quantization.

    Scales are computed as floats first: for int and iq4_nl those of `quantize_rtn`; for uint the scale and the lower
    end (offset) of each group's range. Then they are rounded to `scale_scheme`, with one float for the scales of
    `scale_group` weights; for int and iq4_nl, no scale that is not 0 becomes 0.

    Args:
        weight: float [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`). K must be a multiple of 256, or, with
            "channel", of the group size.
        scheme: a Scheme or its name; an int or uint, or iq4_nl.
        scale_scheme: scheme of the scales: uint for uint, otherwise int.
        group_size: weights along K that share a scale; must divide `scale_group` if that is 256.
        scale_group: weights whose scales share a float: 256, or "channel": all K of an output.
        axis: the contraction axis, -2 or -1.
        scale_dtype: dtype of the second level: float32, bfloat16 or float16.
        clip: "mse" searches for the scales and offsets of least squared error.
        importance: see `quantize_rtn`.

    Returns:
        The quantized weight, with two levels of scales; its `dtype` is that of `weight`.

    Raises:
        ValueError: as `quantize_rtn`, and for incompatible schemes or sizes.
    """
    scheme, second = (Scheme.named(each) if isinstance(each, str) else each for each in (scheme, scale_scheme))
    weight, scale_dtype = jnp.asarray(weight), jnp.dtype(scale_dtype)
    length = weight.shape[axis_position(weight.shape, axis)]
    unsigned = scheme.kind == "uint"
    if not (unsigned or scheme.signed_scales) or second.kind != ("uint" if unsigned else "int"):
        raise ValueError(
            f"{scheme.name} with scales in {second.name}: expected int or iq4_nl with int, or uint with uint"
        )
    size = _scales_of_a_float(length, group_size, scale_group)
    if importance is not None:
        importance = checked_importance(importance, weight, axis, clip)
    made, in_range = _quantize(weight, importance, scheme, second, group_size, size, axis, scale_dtype, clip)
    check_in_range(weight, in_range, scale_dtype)
    return made


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7, 8))
def _quantize(
    weight: jax.Array,
    importance: jax.Array | None,
    scheme: Scheme,
    second: Scheme,
    group_size: int,
    size: int,
    axis: int,
    scale_dtype: np.dtype,
    clip: Literal["mse"] | None,
) -> tuple[QTensor, jax.Array]:
    """Returns the quantized weight, and whether every scale and offset is finite; `size` scales share a float."""

    def coded(plane: jax.Array) -> QTensor:
        # Values of 0 or more get zero points of 0, which can be dropped.
        made = quantize_rtn(plane, second, group_size=size, axis=axis, scale_dtype=scale_dtype)
        return dataclasses.replace(made, zero=None)

    offset = None
    if scheme.signed_scales:
        options: dict[str, Any] = {"group_size": group_size, "axis": axis, "clip": clip, "importance": importance}
        floats = scale_values(quantize_rtn(weight, scheme, scale_dtype=jnp.float32, **options).scale, scheme)
        scale = _without_zeros(floats, coded(floats))
    else:
        floats, depth = _range(weight, importance, scheme, group_size, axis, clip is not None)
        scale, below = coded(floats), coded(depth)
        assert not isinstance(below.scale, QTensor)
        offset = dataclasses.replace(below, scale=-below.scale)
    planes = [dequantize(plane) for plane in (scale, offset) if plane is not None]
    in_range = functools.reduce(jnp.logical_and, [jnp.isfinite(plane).all() for plane in planes])
    return _with_codes(weight, scale, offset, scheme, axis), in_range


def _scales_of_a_float(length: int, group_size: int, scale_group: int | str) -> int:
    """Returns how many scales of an output share a float, checked against the length of the contraction axis."""
    whole = isinstance(group_size, int) and not isinstance(group_size, bool) and group_size > 0
    if scale_group == "channel":
        if not whole or length % group_size:
            raise ValueError(
                f"two levels of scales in groups of {group_size}, contraction axis of {length}: expected a divisor of "
                f"{length}"
            )
        return length // group_size
    if scale_group != SUPERBLOCK:
        raise ValueError(f"scale_group {scale_group!r}: expected {SUPERBLOCK} or 'channel'")
    if not whole or SUPERBLOCK % group_size or length % SUPERBLOCK:
        raise ValueError(
            f"two levels of scales in groups of {group_size}, contraction axis of {length}: expected a divisor of "
            f"{SUPERBLOCK}, and an axis that is a multiple of {SUPERBLOCK}; or use scale_group 'channel'"
        )
    return SUPERBLOCK // group_size


def with_float_scales(tree: Any) -> Any:
    """Dequantizes the int scales of a tree's weights to float32, to make them differentiable; values do not change."""

    def one(weight: QTensor) -> QTensor:
        second = weight.scale
        if not isinstance(second, QTensor) or second.scheme.kind != "int":
            return weight
        return dataclasses.replace(weight, scale=dequantize(second))

    return map_quantized(one, tree)


def with_scales_of(tree: Any, changed: Any) -> Any:
    """Undoes `with_float_scales` after the float scales have changed: quantizes them with the second level of `tree`.

    Args:
        tree: pytree with weights of two levels, and other leaves.
        changed: `with_float_scales(tree)` with other floats; all leaves that are not requantized are taken from it.
    """
    is_leaf = lambda node: isinstance(node, QTensor)  # noqa: E731
    one = lambda weight, new: _recoded(weight, new) if is_leaf(weight) else new  # noqa: E731
    return jax.tree.map(one, tree, changed, is_leaf=is_leaf)


def _recoded(weight: QTensor, changed: QTensor) -> QTensor:
    """Does one weight of `with_scales_of`."""
    second = weight.scale
    if not isinstance(second, QTensor) or isinstance(changed.scale, QTensor):
        return changed
    assert not isinstance(second.scale, QTensor)
    axis, bias = second.axis, second.scheme.bias
    unit = jnp.repeat(second.scale.astype(jnp.float32), second.group_size, axis)
    code = jnp.clip(jnp.round(changed.scale / divisor(unit)), -bias, bias - 1)
    code = jnp.where(code == 0, jnp.sign(changed.scale) * jnp.sign(unit), code)
    codes = (code + bias).astype(jnp.uint8)
    planes = pack(codes, second.scheme.bits, second.group_size, axis=axis)
    return dataclasses.replace(changed, scale=dataclasses.replace(second, planes=planes))


def _without_zeros(scale: jax.Array, made: QTensor) -> QTensor:
    """Replaces codes for 0 by codes for 1 or -1 where the scale is not 0.

    No weight is further from the nearest multiple of a small scale than from 0.
    """
    assert not isinstance(made.scale, QTensor)
    scheme, axis = made.scheme, made.axis
    codes = unpack(made.planes, scheme.bits, made.group_size, axis=axis)
    sign = jnp.sign(scale) * jnp.repeat(jnp.sign(made.scale.astype(jnp.float32)), made.group_size, axis)
    lost = (codes == scheme.bias) & (sign != 0)
    codes = jnp.where(lost, (scheme.bias + sign).astype(jnp.uint8), codes)
    return dataclasses.replace(made, planes=pack(codes, scheme.bits, made.group_size, axis=axis))


def _range(
    weight: jax.Array, importance: jax.Array | None, scheme: Scheme, group_size: int, axis: int, search: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns scales for uint codes, and how far below 0 their range begins: float32 [..., C, M].

    The range is a group's own, widened to include 0. With `search`, several multiples of its width give codes, scale
    and beginning are fitted to these together, and the fit of least squared error is taken, as `make_qkx2_quants` of
    ggml-quants.c does.
    """
    weight_CgM = split_groups(weight.astype(jnp.float32), group_size, axis)
    low = jnp.minimum(weight_CgM.min(axis=axis, keepdims=True), 0)
    width = weight_CgM.max(axis=axis, keepdims=True, initial=0) - low
    plain = width / scheme.max_code, -low
    if not search:
        return jax.tree.map(lambda x: jnp.squeeze(x, axis), plain)
    counted = jnp.ones((), jnp.float32)
    if importance is not None:
        channel = importance[..., None] if axis == -2 else importance[..., None, :]
        counted = split_groups(jnp.broadcast_to(channel.astype(jnp.float32), weight.shape), group_size, axis)

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(x * counted, axis=axis, keepdims=True)

    def values(scale: jax.Array, depth: jax.Array) -> jax.Array:
        return scheme.round((weight_CgM + depth) / divisor(scale))

    def error(scale: jax.Array, depth: jax.Array) -> jax.Array:
        return total((weight_CgM + depth - values(scale, depth) * scale) ** 2)

    def step(number: jax.Array, best: tuple) -> tuple:
        start = width / (scheme.max_code - 1 + 2 * number / _STARTS), -low
        code = values(*jax.tree.map(lambda a, b: jnp.where(number <= _STARTS, a, b), start, best[1:]))
        count, codes, squares = total(jnp.ones_like(code)), total(code), total(code**2)
        weights, products = total(weight_CgM), total(weight_CgM * code)
        scale = (count * products - codes * weights) / divisor(count * squares - codes**2)
        depth = (scale * codes - weights) / divisor(count)
        # The offset cannot express a range that begins above 0: such a range begins at 0.
        scale, depth = jnp.where(depth > 0, scale, products / divisor(squares)), jnp.maximum(depth, 0)
        new = (error(scale, depth), scale, depth)
        return jax.tree.map(lambda a, b: jnp.where((new[0] < best[0]) & (scale >= 0), a, b), new, best)

    _, *best = jax.lax.fori_loop(0, _STARTS + 1 + _REFITS, step, (error(*plain), *plain))
    return jnp.squeeze(best[0], axis), jnp.squeeze(best[1], axis)


def _with_codes(weight: jax.Array, scale: QTensor, offset: QTensor | None, scheme: Scheme, axis: int) -> QTensor:
    """Quantizes a weight to the nearest codes for given scales and offsets."""
    group_size = weight.shape[axis] // scale.shape[axis]
    weight_CgM = split_groups(weight.astype(jnp.float32), group_size, axis)
    if offset is not None:
        weight_CgM = weight_CgM - jnp.expand_dims(dequantize(offset), axis)
    codes_CgM = scheme.encode(weight_CgM / divisor(jnp.expand_dims(dequantize(scale), axis)))
    codes_KM = merge_groups(codes_CgM, axis)
    return QTensor.from_codes(codes_KM, scale, scheme, offset=offset, axis=axis, dtype=weight.dtype)
