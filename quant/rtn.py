"""Round-to-nearest quantization: a scale per group from the group's own values, and the nearest code for each weight.

Dimension key: `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group. Shapes are written for
`axis=-2`. Inside, weights are [..., C, g, M] and what is one number per group keeps a 1 in the place of g.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from quant.packing import axis_position, check_group, merge_groups, split_groups
from quant.qtensor import SCALE_DTYPES, QTensor, scale_values
from quant.scheme import E2M1, NF4, Scheme

# Largest E2M1 value is 6 = 1.5 * 2**2: with the largest weight's exponent less 2 it falls into the last binade.
_E2M1_MAX_EXPONENT = 2
_CLIP_STEPS = 48


def quantize_rtn(
    weight: jax.Array,
    scheme: Scheme | str,
    *,
    group_size: int | Literal["channel", "tensor"],
    axis: int = -2,
    scale_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    clip: Literal["mse"] | None = None,
    importance: jax.Array | None = None,
) -> QTensor:
    """Quantizes a weight by rounding each value to the nearest that its group's scale can express.

    The scale of a group, before `clip`:

    - int: the value of largest magnitude / -2**(b-1), sign and all, as in ggml's Q4_0. That value gets code 0, exactly,
      and all 2**b codes are in use; the symmetric alternative, max|w| / (2**(b-1) - 1), wastes one, which at 4 bits
      is a step 14% larger. The price: a value of the other sign beyond 2**(b-1) - 1/2 steps is off by up to one step.
    - uint: (max - min) / (2**b - 1) of the range widened to include 0, and the zero point a whole code: 0 stays 0.
    - ternary: mean|w|, and codes round(w / scale) clipped to -1..1 (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764).
    - nf4: max|w| (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
    - mxfp4: 2**(floor(log2(max|w|)) - 2) (OCP Microscaling Formats v1.0, 2023; groups of 32 there). Values
      beyond 6 scales become 6 scales. A tie between two values goes to the one nearer to 0.

    Codes are chosen with the scale as it is stored, rounded to `scale_dtype`: that costs range, hardly accuracy. So a
    value inside the range is off by at most scale / 2 for int, uint and ternary. A group of zeros gets scale 0.

    Args:
        weight: float [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`).
        scheme: a Scheme or its name, as "int4".
        group_size: weights along K that share a scale; "channel": all K of an output; "tensor": all of [K, M].
        axis: the contraction axis, -2 or -1.
        scale_dtype: float32, bfloat16 or float16; mxfp4 has exponents instead.
        clip: "mse" tries `clip_factors(scheme)` times each group's scale and keeps the one of least squared error,
            which is never more than that of the plain scale. Memory does not grow with the number of factors.
        importance: float [..., K], not negative: weight of each input channel in that error, for example the mean
            square of its activations, as in llama.cpp's importance matrix. Needs `clip`.

    Returns:
        The quantized weight; its `dtype` is that of `weight`.

    Raises:
        ValueError: for arguments that do not fit each other, and, outside jit, for a weight that is not finite or whose
            scales leave the range of `scale_dtype`. Under jit such groups become NaN, or zeros if a scale underflows.
    """
    scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
    weight, scale_dtype = jnp.asarray(weight), jnp.dtype(scale_dtype)
    size = checked_group_size(weight, scheme, group_size, axis)
    if scale_dtype.name not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype {scale_dtype.name}: expected {' or '.join(SCALE_DTYPES)}")
    if clip not in (None, "mse"):
        raise ValueError(f"clip {clip!r}: expected None or 'mse'")
    if importance is not None:
        importance = _checked_importance(importance, weight, axis, clip)
    search, per_tensor = clip is not None, group_size == "tensor"
    quantized, in_range = _quantize(weight, importance, scheme, size, per_tensor, axis, scale_dtype, search)
    check_in_range(weight, in_range, scale_dtype)
    return quantized


def clip_factors(scheme: Scheme) -> tuple[float, ...]:
    """What `clip="mse"` multiplies a group's scale by, the plain 1 first.

    Less than 1 clips the largest weights and resolves the others better.
    int: up to where both signs are covered, and with both signs, because one more code lies on one side of zero.
    ternary: the mean magnitude is not the scale of least error (for normal weights that is 1.5 times as much).
    mxfp4: powers of two only.
    """
    if scheme.kind == "mxfp4":
        return (1.0, 2.0, 0.5)
    top = {"int": 2 ** (scheme.bits - 1) / (2 ** (scheme.bits - 1) - 1), "ternary": 2.5}.get(scheme.kind, 1.0)
    factors = [float(factor) for factor in np.linspace(top, 0.3, _CLIP_STEPS)]
    if scheme.kind == "int":
        factors += [-1.0, *(-factor for factor in factors)]
    return (1.0, *factors)


def encode(scaled: jax.Array, scheme: Scheme) -> jax.Array:
    """Nearest codes of `weight / scale` (plus the zero point, for uint): uint8 of the same shape.

    Values beyond the last code get the last code. Halves go to even codes, or as the code book says.
    """
    if scheme.kind == "nf4":
        return _rank(scaled, NF4)
    if scheme.kind == "mxfp4":
        magnitude = _rank(jnp.abs(scaled), E2M1[:8])
        return jnp.where((scaled < 0) & (magnitude > 0), magnitude + 8, magnitude)
    return jnp.clip(jnp.round(scaled) + scheme.bias, 0, scheme.max_code).astype(jnp.uint8)


def _rank(x: jax.Array, ascending: tuple[float, ...]) -> jax.Array:
    """Index of the nearest of some ascending values, the lower one at a tie: how many midpoints lie below x."""
    midpoints = [(low + high) / 2 for low, high in zip(ascending, ascending[1:], strict=False)]
    return functools.reduce(jnp.add, ((x > middle).astype(jnp.uint8) for middle in midpoints))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _quantize(
    weight: jax.Array,
    importance: jax.Array | None,
    scheme: Scheme,
    group_size: int,
    per_tensor: bool,
    axis: int,
    scale_dtype: np.dtype,
    search: bool,
) -> tuple[QTensor, jax.Array]:
    """The quantized weight, and whether every scale is finite, and not 0 but for a group of zeros."""
    weight_CgM = split_groups(weight.astype(jnp.float32), group_size, axis)
    across_M = (-1 if axis == -2 else -3,) if per_tensor else ()
    reduced = (axis, *across_M)
    low, high = group_range(weight_CgM, scheme, reduced)
    if search:
        importance_CgM = (
            None if importance is None else split_groups(jnp.expand_dims(importance, -3 - axis), group_size, axis)
        )
        scale, zero = search_clip(weight_CgM, low, high, importance_CgM, scheme, reduced, scale_dtype)
    else:
        scale, zero = group_grid(low, high, 1.0, scheme, scale_dtype)
    codes_KM = merge_groups(encode_groups(weight_CgM, scale, zero, scheme), axis)
    quantized = QTensor.from_codes(
        codes_KM,
        jnp.squeeze(scale, axis),
        scheme,
        zero=None if zero is None else jnp.squeeze(zero, axis),
        axis=axis,
        dtype=weight.dtype,
    )
    value = scale_values(scale, scheme)
    in_range = jnp.isfinite(value) & ((value != 0) | ((low == 0) & (high == 0)))
    return quantized, in_range.all()


def group_range(weight_CgM: jax.Array, scheme: Scheme, reduced: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Lower and upper end of what each group's codes are to cover, float32 [..., C, 1, M]."""
    if scheme.kind == "ternary":
        mean = jnp.mean(jnp.abs(weight_CgM), axis=reduced, keepdims=True)
        return -mean, mean
    return weight_CgM.min(axis=reduced, keepdims=True), weight_CgM.max(axis=reduced, keepdims=True)


def group_grid(
    low: jax.Array, high: jax.Array, factor: jax.Array | float, scheme: Scheme, scale_dtype: np.dtype
) -> tuple[jax.Array, jax.Array | None]:
    """Scales as they are stored, and zero points (uint8) where the scheme has them, for a range times a factor."""
    if scheme.kind == "uint":
        low, high = jnp.minimum(low, 0) * factor, jnp.maximum(high, 0) * factor
        scale = ((high - low) / scheme.max_code).astype(scale_dtype)
        zero = jnp.round(-low / divisor(scale.astype(jnp.float32)))
        return scale, jnp.clip(zero, 0, scheme.max_code).astype(jnp.uint8)
    if scheme.kind == "int":
        largest = jnp.where(high >= -low, high, low)
        # 0 / -8 would be -0, and so would the weights of an empty group.
        return jnp.where(largest == 0, 0, largest * factor / -scheme.bias).astype(scale_dtype), None
    scale = jnp.maximum(high, -low) * factor
    return (_exponent(scale) if scheme.kind == "mxfp4" else scale.astype(scale_dtype)), None


def _exponent(largest: jax.Array) -> jax.Array:
    """E8M0 exponents for groups of that largest magnitude: uint8, 255 (NaN) where it is not finite."""
    _, exponent = jnp.frexp(largest)  # largest = m * 2**exponent with m in [1/2, 1)
    stored = jnp.clip(exponent - 1 - _E2M1_MAX_EXPONENT + 127, 0, 254)
    return jnp.where(jnp.isfinite(largest), jnp.where(largest == 0, 0, stored), 255).astype(jnp.uint8)


def encode_groups(weight_CgM: jax.Array, scale: jax.Array, zero: jax.Array | None, scheme: Scheme) -> jax.Array:
    """Nearest codes, uint8 [..., C, g, M]."""
    scaled = weight_CgM / divisor(scale_values(scale, scheme))
    return encode(scaled if zero is None else scaled + zero.astype(jnp.float32), scheme)


def search_clip(
    weight_CgM: jax.Array,
    low: jax.Array,
    high: jax.Array,
    importance_CgM: jax.Array | None,
    scheme: Scheme,
    reduced: tuple[int, ...],
    scale_dtype: np.dtype,
) -> tuple[jax.Array, jax.Array | None]:
    """`group_grid` of the factor with the least squared error, group by group; the first of equals."""
    factors = jnp.asarray(clip_factors(scheme), jnp.float32)

    def error_of(scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        value = scheme.decode(encode_groups(weight_CgM, scale, zero, scheme))
        value = value if zero is None else value - zero.astype(jnp.float32)
        square = (value * scale_values(scale, scheme) - weight_CgM) ** 2
        return jnp.sum(square if importance_CgM is None else square * importance_CgM, axis=reduced, keepdims=True)

    def attempt(factor: jax.Array) -> tuple:
        scale, zero = group_grid(low, high, factor, scheme, scale_dtype)
        return error_of(scale, zero), scale, zero

    def step(i: jax.Array, best: tuple) -> tuple:
        new = attempt(factors[i])
        # A factor whose scale overflows has an error of NaN, which is not less.
        return jax.tree.map(functools.partial(jnp.where, new[0] < best[0]), new, best)

    # One factor at a time: all at once would need the weight that many times over.
    _, scale, zero = jax.lax.fori_loop(1, len(factors), step, attempt(factors[0]))
    return scale, zero


def check_in_range(weight: jax.Array, in_range: jax.Array, scale_dtype: np.dtype) -> None:
    """Refuses, outside jit, a weight for which some group has no scale.

    Raises:
        ValueError: saying whether it is the weight that is not finite or `scale_dtype` that is too narrow.
    """
    if not isinstance(in_range, jax.core.Tracer) and not in_range:
        if not jnp.isfinite(weight).all():
            raise ValueError(f"weight of shape {weight.shape} holds NaN or infinity: there is no scale for it")
        raise ValueError(f"a scale leaves the range of {scale_dtype.name}: use scale_dtype bfloat16 or float32")


def divisor(scale: jax.Array) -> jax.Array:
    """The scale, or 1 for a group of zeros: 0 / 0 is NaN."""
    return jnp.where(scale == 0, 1, scale)


def checked_group_size(
    weight: jax.Array, scheme: Scheme, group_size: int | Literal["channel", "tensor"], axis: int
) -> int:
    """The group size as a number, checked against the weight."""
    if not jnp.issubdtype(weight.dtype, jnp.floating) or weight.ndim < 2:
        raise ValueError(f"weight of dtype {weight.dtype} and shape {weight.shape}: expected floats, at least 2 axes")
    length = weight.shape[axis_position(weight.shape, axis)]
    if isinstance(group_size, str) and group_size not in ("channel", "tensor"):
        raise ValueError(f"group_size {group_size!r}: expected a number, 'channel' or 'tensor'")
    size = length if isinstance(group_size, str) else group_size
    check_group(length, size, scheme.bits)
    return size


def _checked_importance(importance: jax.Array, weight: jax.Array, axis: int, clip: str | None) -> jax.Array:
    """Importance as float32, checked against the weight."""
    if clip is None:
        raise ValueError("importance without clip: rounding to nearest has no use for it; set clip='mse'")
    importance = jnp.asarray(importance, jnp.float32)
    expected = (*weight.shape[:-2], weight.shape[axis])
    if importance.shape not in (expected, expected[-1:]):
        raise ValueError(f"importance of shape {importance.shape}: expected one per input channel, {expected}")
    if not isinstance(importance, jax.core.Tracer) and not (jnp.isfinite(importance) & (importance >= 0)).all():
        raise ValueError("importance holds a value that is negative or not finite: expected mean squares")
    return importance
