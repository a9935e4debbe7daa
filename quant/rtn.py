"""Round-to-nearest quantization: a scale per group from the group's own values, and the nearest code for each weight.

Dimension key: `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group. Shapes are written for
`axis=-2`. Inside, weights are [..., C, g, M] and what is one number per group keeps a 1 in the place of g.

What the search sums over a group is written as a sum of rows [M]: on a CPU, XLA vectorises elementwise code over M, but
no reduction of what it computes on the way.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from quant.packing import axis_position, check_group, merge_groups, split_groups
from quant.qtensor import SCALE_DTYPES, QTensor, scale_values
from quant.scheme import Scheme

# Largest E2M1 value is 6 = 1.5 * 2**2: with the largest weight's exponent less 2 it falls into the last binade.
_E2M1_MAX_EXPONENT = 2
# Between two factors that `clip="mse"` tries, the largest weight moves by no more codes than this, and the factor by no
# more than that.
_CODE_STEP, _FACTOR_STEP = 0.2, 0.05
_LEAST_CLIP = 0.3
_MOST_FACTORS = 48
_REFITS = 2
# Weights that scales are searched for at a time: in float32 they stay in a CPU's cache.
_BLOCK_WEIGHTS = 2**20
# A sum over a group is written out if it has no more than so many rows, and otherwise a loop over parts of so many.
_WRITTEN_ROWS, _LOOPED_ROWS = 32, 8


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
    value inside the range is off by at most scale / 2 for int, uint and ternary. A group of zeros gets scale 0, any
    other none below the smallest of `scale_dtype` (`stored_scale`): nearly-zero weights, as of tokens that were never
    trained, become multiples of that.

    Args:
        weight: float [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`).
        scheme: a Scheme or its name, as "int4".
        group_size: weights along K that share a scale; "channel": all K of an output; "tensor": all of [K, M].
        axis: the contraction axis, -2 or -1.
        scale_dtype: float32, bfloat16 or float16; mxfp4 has exponents instead.
        clip: "mse" looks for the scale of least squared error. It encodes each group with `clip_factors` times its
            scale, keeps the codes that could do best with a scale of their own, fits that scale to them by least
            squares, and encodes and fits again. What it finds is taken only if its error, as it is stored, is less
            than that of the plain scale. mxfp4, whose scales cannot be fitted, takes the best of its factors.
        importance: float [..., K], not negative: weight of each input channel in that error, for example the mean
            square of its activations, as in llama.cpp's importance matrix. Needs `clip`.

    Returns:
        The quantized weight; its `dtype` is that of `weight`.

    Raises:
        ValueError: for arguments that do not fit each other, and, outside jit, for a weight that is not finite or whose
            scales are above the range of `scale_dtype`. Under jit such groups become NaN.
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


def clip_factors(scheme: Scheme, group_size: int, *, weighted: bool = False) -> tuple[float, ...]:
    """What `clip="mse"` multiplies the scale of a group of that many weights by, the plain 1 first.

    Less than 1 clips the largest weights and resolves the others better. How much less can pay: with L codes from 0 to
    the largest weight, clipping that weight alone to a factor f adds (1 - f)^2, in units of its square, and takes
    (1 - f^2) g / (12 L^2) from the rounding errors. That is a gain down to f = (1 - a) / (1 + a) with a = g / (12 L^2);
    8 instead of 12 leaves room for groups that round worse than most. With `weighted` errors the largest weight may
    count for nothing, and there is no such limit.

    More than 1, up to one code that the largest weight leaves free, pays in small groups whose weights happen to lie
    near those codes; for int that covers both signs. With int's other sign, which has one code less for the largest
    weight, down to where that is clipped as much.
    ternary: the mean magnitude is not the scale of least error (for normal weights that is 1.5 times as much).
    mxfp4: powers of two only.
    """
    if scheme.kind == "mxfp4":
        return (1.0, 2.0, 0.5)
    if scheme.kind == "ternary":
        return (1.0, *_spaced(2.5, _LEAST_CLIP, 1))
    levels = 2 ** (scheme.bits - 1)
    gain = group_size / (8 * levels**2)
    least = _LEAST_CLIP if weighted else max((1 - gain) / (1 + gain), _LEAST_CLIP)
    most = levels / (levels - 1)
    factors = _spaced(most, least, levels)
    if scheme.kind == "int" and most * least <= 1:
        factors += tuple(-factor for factor in _spaced(1.0, most * least, levels))
    return (1.0, *factors)


def _spaced(most: float, least: float, levels: int) -> tuple[float, ...]:
    """Factors from the most to the least, both included, for `levels` codes from 0 to the largest weight."""
    step = min(_CODE_STEP / levels, _FACTOR_STEP)
    count = min(math.ceil((most - least) / step) + 1, _MOST_FACTORS)
    return tuple(float(factor) for factor in np.linspace(most, least, count))


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
    """The quantized weight, and whether every scale is finite."""
    weight_CgM = split_groups(weight.astype(jnp.float32), group_size, axis)
    across_M = (-1 if axis == -2 else -3,) if per_tensor else ()
    low, high = group_range(weight_CgM, scheme, (axis, *across_M))
    if search:
        if importance is not None:
            importance = jnp.broadcast_to(importance, (*weight.shape[:-2], weight.shape[axis]))
        scale, zero = _search_matrices(weight_CgM, importance, scheme, per_tensor, axis, scale_dtype)
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
    return quantized, jnp.isfinite(scale_values(scale, scheme)).all()


def _search_matrices(
    weight_CgM: jax.Array,
    importance: jax.Array | None,
    scheme: Scheme,
    per_tensor: bool,
    axis: int,
    scale_dtype: np.dtype,
) -> tuple[jax.Array, jax.Array | None]:
    """`search_clip` along either axis, one matrix after the other and each of them by blocks."""
    reduced = (-2, -1) if per_tensor else (-2,)

    def search(weight_CgM: jax.Array, importance_Cg1: jax.Array | None) -> tuple:
        low, high = group_range(weight_CgM, scheme, reduced)
        weighted = importance_Cg1 is not None
        return search_clip(weight_CgM, low, high, importance_Cg1, scheme, reduced, scale_dtype, weighted=weighted)

    def search_matrix(matrix: tuple[jax.Array, jax.Array | None]) -> tuple:
        groups, importance_K = matrix
        importance_Cg1 = None if importance_K is None else importance_K.reshape(-1, groups.shape[axis], 1)
        if axis == -2:
            return _in_blocks(search, (groups, importance_Cg1), whole=per_tensor)

        def search_rows(weight_MCg: jax.Array) -> tuple:
            found = search(jnp.moveaxis(weight_MCg, 0, -1), importance_Cg1)
            return jax.tree.map(lambda part: jnp.moveaxis(part, -1, 0), found)

        return _in_blocks(search_rows, (groups,), whole=per_tensor)

    for _ in weight_CgM.shape[:-3]:
        search_matrix = functools.partial(jax.lax.map, search_matrix)
    return search_matrix((weight_CgM, importance))


def _in_blocks(function: Callable[..., Any], arrays: tuple, *, whole: bool) -> Any:
    """A function of arrays, by blocks along their first axis, joined again: what it needs in between is little."""
    length = len(arrays[0])
    size = max(1, _BLOCK_WEIGHTS * length // arrays[0].size)
    if whole or size >= length:
        return function(*arrays)

    def block(start: jax.Array | int) -> Any:
        return function(*jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, size), arrays))

    def step(i: jax.Array, made: Any) -> Any:
        # Slices and updates start no later than fits: the last block does again what it shares with the one before.
        return jax.tree.map(
            lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, i * size, 0), made, block(i * size)
        )

    made = jax.tree.map(lambda part: jnp.zeros((length, *part.shape[1:]), part.dtype), jax.eval_shape(block, 0))
    return jax.lax.fori_loop(0, -(-length // size), step, made)


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
        scale = stored_scale((high - low) / scheme.max_code, scale_dtype)
        zero = jnp.round(-low / divisor(scale.astype(jnp.float32)))
        return scale, jnp.clip(zero, 0, scheme.max_code).astype(jnp.uint8)
    if scheme.kind == "int":
        largest = jnp.where(high >= -low, high, low)
        # 0 / -8 would be -0, and so would the weights of an empty group.
        return stored_scale(jnp.where(largest == 0, 0, largest * factor / -scheme.bias), scale_dtype), None
    scale = jnp.maximum(high, -low) * factor
    return (_exponent(scale) if scheme.kind == "mxfp4" else stored_scale(scale, scale_dtype)), None


def stored_scale(scale: jax.Array, scale_dtype: np.dtype) -> jax.Array:
    """Scales rounded to `scale_dtype`, where one that is not 0 becomes no less than the smallest of its sign.

    In float16 that is 2**-24. A scale of 0 would make zeros of the group, as ggml does. 0 is among the values of every
    scheme, so that no weight is further from the nearest multiple of a small scale than it is from 0.
    """
    limits = jnp.finfo(scale_dtype)
    # Subnormal numbers of the others are as good as 0: XLA may flush them.
    least = float(limits.smallest_subnormal if scale_dtype == jnp.float16 else limits.tiny)
    stored = scale.astype(scale_dtype)
    return jnp.where((stored == 0) & (scale != 0), jnp.copysign(least, scale).astype(scale_dtype), stored)


def _exponent(largest: jax.Array) -> jax.Array:
    """E8M0 exponents for groups of that largest magnitude: uint8, 255 (NaN) where it is not finite."""
    _, exponent = jnp.frexp(largest)  # largest = m * 2**exponent with m in [1/2, 1)
    stored = jnp.clip(exponent - 1 - _E2M1_MAX_EXPONENT + 127, 0, 254)
    return jnp.where(jnp.isfinite(largest), jnp.where(largest == 0, 0, stored), 255).astype(jnp.uint8)


def encode_groups(weight_CgM: jax.Array, scale: jax.Array, zero: jax.Array | None, scheme: Scheme) -> jax.Array:
    """Nearest codes, uint8 [..., C, g, M]."""
    scaled = weight_CgM / divisor(scale_values(scale, scheme))
    return scheme.encode(scaled if zero is None else scaled + zero.astype(jnp.float32))


def search_clip(
    weight_CgM: jax.Array,
    low: jax.Array,
    high: jax.Array,
    importance_CgM: jax.Array | None,
    scheme: Scheme,
    reduced: tuple[int, ...],
    scale_dtype: np.dtype,
    *,
    weighted: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """Scales and zero points as they are stored, by the search that `quantize_rtn` describes.

    `weighted` says that importance differs by much inside groups (see `clip_factors`).

    For given values v of the codes, the error sum((w - s v)^2) is least for s = sum(w v) / sum(v^2), by
    sum(w v)^2 / sum(v^2) less than sum(w^2). So a factor costs two sums, and no pass over the errors.
    """
    group_size = math.prod(weight_CgM.shape[axis] for axis in reduced)
    factors = jnp.asarray(clip_factors(scheme, group_size, weighted=weighted), jnp.float32)
    products = functools.partial(_products, weight_CgM, importance_CgM, scheme, reduced)
    error = functools.partial(_error, weight_CgM, importance_CgM, scheme, reduced)

    def attempt(factor: jax.Array | float) -> tuple:
        stored, zero = group_grid(low, high, factor, scheme, scale_dtype)
        scale = scale_values(stored, scheme)
        with_weight, with_itself = products(scale, zero)
        if scheme.kind == "mxfp4":
            return scale * (2 * with_weight - scale * with_itself), stored, zero
        return with_weight**2 / divisor(with_itself), stored, zero

    def step(i: jax.Array, best: tuple) -> tuple:
        new = attempt(factors[i])
        # A factor whose scale overflows gains NaN or 0, which is not more.
        return jax.tree.map(functools.partial(jnp.where, new[0] > best[0]), new, best)

    # One factor at a time: all at once would need the weight that many times over.
    plain = group_grid(low, high, 1.0, scheme, scale_dtype)
    _, stored, zero = jax.lax.fori_loop(0, len(factors), step, (jnp.full_like(low, -jnp.inf), *plain))
    if scheme.kind == "mxfp4":
        return stored, zero

    def refit(_: jax.Array, scale: jax.Array) -> jax.Array:
        with_weight, with_itself = products(scale, zero)
        return with_weight / divisor(with_itself)

    found = (jax.lax.fori_loop(0, _REFITS, refit, stored.astype(jnp.float32)).astype(scale_dtype), zero)
    plain_error, found_error = jax.lax.map(
        lambda grid: error(*grid), jax.tree.map(lambda *x: jnp.stack(x), plain, found)
    )
    better = found_error < plain_error
    return jax.tree.map(functools.partial(jnp.where, better), found, plain)


def _products(
    weight_CgM: jax.Array,
    importance_CgM: jax.Array | None,
    scheme: Scheme,
    reduced: tuple[int, ...],
    scale: jax.Array,
    zero: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """sum(w v) and sum(v^2) of each group, for the values v of the codes that float32 scales give."""
    value_of = _value_of(scale, zero, scheme)

    def term(weight: jax.Array, importance: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        value = value_of(weight)
        counted = value if importance is None else value * importance
        return weight * counted, value * counted

    return _sum_groups(term, weight_CgM, importance_CgM, reduced=reduced)


def _error(
    weight_CgM: jax.Array,
    importance_CgM: jax.Array | None,
    scheme: Scheme,
    reduced: tuple[int, ...],
    scale: jax.Array,
    zero: jax.Array | None,
) -> jax.Array:
    """sum((w - s v)^2) of each group, for scales s as they are stored."""
    scale = scale.astype(jnp.float32)
    value_of = _value_of(scale, zero, scheme)

    def term(weight: jax.Array, importance: jax.Array | None) -> jax.Array:
        square = (weight - value_of(weight) * scale) ** 2
        return square if importance is None else square * importance

    return _sum_groups(term, weight_CgM, importance_CgM, reduced=reduced)


def _sum_groups(
    term: Callable[..., Any],
    *arrays: jax.Array | None,
    reduced: tuple[int, ...],
) -> Any:
    """Sums of a term over the rows of each group, and over M if that is reduced.

    `term` takes a row [..., C, 1, M] of each array, None where there is no array, and returns one or a tree of such.
    """
    length = next(array.shape[-2] for array in arrays if array is not None)
    most = length if length <= _WRITTEN_ROWS else _LOOPED_ROWS
    count = max(rows for rows in range(1, most + 1) if length % rows == 0)

    def row(index: jax.Array | int) -> Any:
        return term(*jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=-2), arrays))

    def rows(start: jax.Array | int) -> Any:
        terms = [row(start + i) for i in range(count)]
        return jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *terms)

    total = rows(0)
    if count < length:
        total = jax.lax.fori_loop(
            1, length // count, lambda i, total: jax.tree.map(jnp.add, total, rows(i * count)), total
        )
    if -1 not in reduced:
        return total
    return jax.tree.map(lambda part: part.sum(axis=-1, keepdims=True), total)


def _value_of(scale: jax.Array, zero: jax.Array | None, scheme: Scheme) -> Callable[[jax.Array], jax.Array]:
    """What weights become, in units of the float32 scale."""
    inverse = 1 / divisor(scale)
    if zero is None:
        return lambda weight: scheme.round(weight * inverse)
    shift = zero.astype(jnp.float32)
    return lambda weight: scheme.round(weight * inverse + shift) - shift


def check_in_range(weight: jax.Array, in_range: jax.Array, scale_dtype: np.dtype) -> None:
    """Refuses, outside jit, a weight for which some group has no scale.

    Raises:
        ValueError: saying whether it is the weight that is not finite or `scale_dtype` that is too narrow.
    """
    if not isinstance(in_range, jax.core.Tracer) and not in_range:
        if not jnp.isfinite(weight).all():
            raise ValueError(f"weight of shape {weight.shape} holds NaN or infinity: there is no scale for it")
        raise ValueError(f"a scale is above the range of {scale_dtype.name}: use scale_dtype bfloat16 or float32")


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
