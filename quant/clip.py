"""Searches for scales of least squared error, which clip the largest weights of a group to resolve the others better.

Shapes as in `rtn.py`: weights are [..., C, g, M], and arrays with one number per group are [..., C, 1, M].

Sums over a group are written as sums of rows [M]: on a CPU, XLA vectorises elementwise code over M, but not a reduction
that is fused with the computation of its terms.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quant.grid import divisor, group_grid, group_range
from quant.qtensor import scale_values
from quant.scheme import Scheme

# Largest step between two factors that `clip="mse"` tries, in codes of the largest weight and in the factor itself.
_CODE_STEP, _FACTOR_STEP = 0.4, 0.1
# With weighted errors: how much less than the others the largest weight of a group may count, and how much larger the
# steps in codes are. On SmolLM2-135M, twice as many factors in a wider range have 0.2% less error.
_LEAST_COUNTED, _WEIGHTED_STEP = 1 / 16, 2
_LEAST_CLIP = 0.3
_MOST_FACTORS = 48
_REFITS = 2
# Weights per block of the search: in float32 they stay in a CPU's cache.
_BLOCK_WEIGHTS = 2**20
# A sum over a group is unrolled up to the first number of rows; beyond it is a loop over parts of the second.
_WRITTEN_ROWS, _LOOPED_ROWS = 32, 8


def clip_factors(scheme: Scheme, group_size: int, *, weighted: bool = False) -> tuple[float, ...]:
    """Returns the factors that `clip="mse"` tries on the scale of a group of `group_size` weights, the plain 1 first.

    Factors below 1 clip the largest weights and resolve the others better. The limit: with L codes from 0 to the
    largest weight, clipping that weight alone to a factor f adds (1 - f)^2, in units of its square, and takes
    (1 - f^2) g / (12 L^2) from the rounding errors. That is a gain down to f = (1 - a) / (1 + a) with a = g / (12 L^2);
    the code uses 8 instead of 12, which leaves room for groups that round worse than most. With `weighted` errors the
    largest weight may count less than the others, down to `_LEAST_COUNTED` as much.

    Factors above 1, until the largest weight leaves one code free, help small groups whose weights happen to lie near
    those codes; for int that covers both signs. int also gets negative factors: with the other sign the largest weight
    has one code less, and they end where it is clipped as much.
    ternary: the mean magnitude is not the scale of least error, which for normal weights is 1.5 times as large.
    mxfp4: powers of two only.
    """
    if scheme.kind == "mxfp4":
        return (1.0, 2.0, 0.5)
    if scheme.kind == "ternary":
        return (1.0, *_spaced(2.5, _LEAST_CLIP, _CODE_STEP))
    levels = 2 ** (scheme.bits - 1)
    gain = group_size / (8 * levels**2) / (_LEAST_COUNTED if weighted else 1)
    step = _CODE_STEP / levels * (_WEIGHTED_STEP if weighted else 1)
    least = max((1 - gain) / (1 + gain), _LEAST_CLIP)
    most = levels / (levels - 1)
    factors = _spaced(most, least, step)
    if scheme.signed_scales and most * least <= 1:
        factors += tuple(-factor for factor in _spaced(1.0, most * least, step))
    return (1.0, *factors)


def padded_factors(scheme: Scheme, group_size: int) -> tuple[jax.Array, jax.Array]:
    """Returns `clip_factors` padded to one length for all schemes, float32, and the number of factors, int32."""
    factors = clip_factors(scheme, group_size)
    padded = np.ones(1 + 2 * _MOST_FACTORS, np.float32)
    padded[: len(factors)] = factors
    return jnp.asarray(padded), jnp.int32(len(factors))


def _spaced(most: float, least: float, step: float) -> tuple[float, ...]:
    """Returns factors from the most to the least, both included, that are at most a step apart."""
    count = min(math.ceil((most - least) / min(step, _FACTOR_STEP)) + 1, _MOST_FACTORS)
    return tuple(float(factor) for factor in np.linspace(most, least, count))


def search_matrices(
    weight_CgM: jax.Array,
    importance: jax.Array | None,
    scheme: Scheme,
    per_tensor: bool,
    axis: int,
    scale_dtype: np.dtype,
) -> tuple[jax.Array, jax.Array | None]:
    """Runs `search_clip` along either axis, one matrix after another, each in blocks."""
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
    """Applies a function of arrays in blocks along their first axis and joins the results, to limit memory."""
    length = len(arrays[0])
    size = max(1, _BLOCK_WEIGHTS * length // arrays[0].size)
    if whole or size >= length:
        return function(*arrays)

    def block(start: jax.Array | int) -> Any:
        return function(*jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, start, size), arrays))

    def step(i: jax.Array, made: Any) -> Any:
        # XLA clamps the start of slices and updates: the last block recomputes what it shares with the one before.
        return jax.tree.map(
            lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, i * size, 0), made, block(i * size)
        )

    made = jax.tree.map(lambda part: jnp.zeros((length, *part.shape[1:]), part.dtype), jax.eval_shape(block, 0))
    return jax.lax.fori_loop(0, -(-length // size), step, made)


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
    factors: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns scales and zero points as stored, found by the search that `quantize_rtn` describes.

    `weighted` says that importance differs by much inside groups (see `clip_factors`). `factors` holds the result of
    `padded_factors`, if the scheme's bits are data.

    For given values v of the codes, the error sum((w - s v)^2) is least for s = sum(w v) / sum(v^2), where it is
    sum(w v)^2 / sum(v^2) less than sum(w^2). So a factor costs two sums, and no pass over the errors.
    """
    group_size = math.prod(weight_CgM.shape[axis] for axis in reduced)
    if factors is None:
        known = clip_factors(scheme, group_size, weighted=weighted)
        factors = jnp.asarray(known, jnp.float32), jnp.int32(len(known))
    tried, count = factors
    products = functools.partial(_products, weight_CgM, importance_CgM, scheme, reduced)
    error = functools.partial(_error, weight_CgM, importance_CgM, scheme, reduced)

    def attempt(factor: jax.Array | float) -> tuple:
        stored, zero = group_grid(low, high, factor, scheme, scale_dtype)
        scale = scale_values(stored, scheme)
        with_weight, with_itself = products(scale, zero)
        if scheme.scale_code:
            return scale * (2 * with_weight - scale * with_itself), stored, zero
        return with_weight**2 / divisor(with_itself), stored, zero

    def step(i: jax.Array, best: tuple) -> tuple:
        new = attempt(tried[i])
        # A factor whose scale overflows has a gain of NaN or 0 and is never taken.
        return jax.tree.map(functools.partial(jnp.where, new[0] > best[0]), new, best)

    # One factor at a time: all at once would need the weight that many times over.
    plain = group_grid(low, high, 1.0, scheme, scale_dtype)
    _, stored, zero = jax.lax.fori_loop(0, count, step, (jnp.full_like(low, -jnp.inf), *plain))
    if scheme.scale_code:
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
    """Returns sum(w v) and sum(v^2) of each group, for the values v of the codes that float32 scales give."""
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
    """Returns sum((w - s v)^2) of each group, for scales s as stored."""
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
    """Sums a term over the rows of each group, and over M if that axis is in `reduced`.

    `term` takes a row [..., C, 1, M] of each array (None for None) and returns such a row or a tree of rows.
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
    """Returns the function that rounds weights to values of codes, in units of the float32 scale."""
    inverse = 1 / divisor(scale)
    if zero is None:
        return lambda weight: scheme.round(weight * inverse)
    shift = zero.astype(jnp.float32)
    return lambda weight: scheme.round(weight * inverse + shift) - shift
