"""GPTQ: rounds one input channel after another and moves each rounding error into the channels still to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. It minimises the squared error of a layer's outputs, ||x w - x w'||^2 over calibration inputs x, which
depends on the inputs only through the Hessian H = x' x / T.

Dimension key: `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group, `T` samples (tokens).
Internally `n` rows are processed, `s` at a time.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from quant.clip import padded_factors, search_clip
from quant.descent import descend
from quant.grid import (
    check_in_range,
    checked_group_size,
    divisor,
    encode_groups,
    group_grid,
    group_range,
    stored_scale,
)
from quant.hessian import inverse_factor
from quant.packing import check_group, split_groups
from quant.qtensor import SCALE_DTYPES, QTensor, scale_values
from quant.scheme import AnyBits, Scheme

# Sums over thousands of channels and tokens: TPUs and GPUs would otherwise multiply float32 in bfloat16 or TF32.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Quantized scales: the largest code stands for this many times the largest plain scale of an output, because weights
# grow by the errors that are moved into them.
SCALE_HEADROOM = 1.1


def quantize_gptq(
    weight: jax.Array,
    hessian: jax.Array,
    scheme: Scheme | str,
    *,
    group_size: int | Literal["channel", "tensor"],
    axis: int = -2,
    scale_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    clip: Literal["mse"] | None = None,
    act_order: bool = False,
    damping: float = 0.01,
    block_size: int = 128,
    scales: QTensor | None = None,
    scale_scheme: Scheme | str | None = None,
    descent: int = 0,
) -> QTensor:
    """Quantizes a weight by GPTQ (arXiv:2210.17323), to codes and scales of the same form as `quantize_rtn`'s.

    Channels are quantized in order. U is the upper Cholesky factor of the inverse Hessian. The rounding error of
    channel k, divided by U[k, k] and multiplied by U[k, j], is subtracted from every later channel j, which makes up
    for part of the error. A group's scale and zero point are those of `quantize_rtn` for its weights **as they are when
    its first channel is reached**, for every group and block size: updates are deferred only for groups not yet begun.

    The Hessian is damped by `damping` times its mean diagonal. If float32 cannot factorize the result (a pivot is lost
    in rounding; with few samples H is singular), damping grows tenfold, from at least 0.001, until it can. Channels
    that never see an input (H[k, k] = 0) get weight 0 and diagonal 1, and do not count in that mean.

    Args:
        weight: float [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`). Matrices of leading axes are done in turn.
        hessian: float [..., K, K], of the inputs, by `hessian` or `add_to_hessian`; its scale does not matter.
        scheme: a Scheme or its name, such as "int4"; any kind.
        group_size: weights along K that share a scale; "channel": all K of an output; "tensor": all of [K, M].
        axis: the contraction axis, -2 or -1.
        scale_dtype: float32, bfloat16 or float16; mxfp4 and nvfp4 have one-byte scales instead.
        clip: "mse" chooses each group's scale as `quantize_rtn` does, weighing channel k's squared error by
            1 / U[k, k]^2, its cost in GPTQ's own objective.
        act_order: quantize channels in the order of falling H[k, k], so that many channels are left to make up for the
            errors of those that matter most. Groups then consist of neighbours in that order, and the result has an
            `order` (g_idx elsewhere), unless a group is all of K.
        damping: fraction of the mean diagonal of H that is added to the diagonal.
        block_size: at most how many channels go between two updates of all the others. It affects speed only: the
            result is the same but for the rounding of float32 sums.
        scales: the same weight, quantized in another way with the same scheme, groups and axis, without zero points,
            order and outliers. Its scales and offsets, in any form, stay, and only codes are chosen.
        scale_scheme: int scheme of quantized scales, with one float for all scales of an output, if `scheme` is int or
            iq4_nl. The float is chosen before any error is moved (`SCALE_HEADROOM`), the scales' codes as groups are
            reached.
        descent: sweeps of coordinate descent afterwards (`descent.descend`). They change codes, and also scales in
            groups of fewer than 256, unless `scales` is given.

    Returns:
        The quantized weight; its `dtype` is that of `weight`.

    Raises:
        ValueError: for incompatible arguments, and, outside jit, for a weight or Hessian that is not finite or scales
            above the range of `scale_dtype`. Under jit such weights become NaN or arbitrary.
    """
    scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
    weight, hessian, scale_dtype = jnp.asarray(weight), jnp.asarray(hessian), jnp.dtype(scale_dtype)
    size = checked_group_size(weight, scheme, group_size, axis)
    _check_arguments(weight, hessian, axis, scale_dtype, clip, damping, block_size)
    _check_descent(descent, scheme, group_size)
    second = _checked_second(scale_scheme, scheme, group_size, weight.shape[axis], scales)
    grid = _Grid(scheme, size, group_size == "tensor", scale_dtype, clip is not None, second)
    fixed = None if scales is None else _fixed(scales, weight, scheme, size, axis, act_order)
    of_bits, grid = _bits_as_data(grid)
    parts, in_range = _quantize(weight, hessian, damping, fixed, of_bits, grid, axis, act_order, block_size, descent)
    check_in_range(weight, in_range, scale_dtype)
    quantized = _packed(*parts, scheme, second, axis, weight.dtype)
    return quantized if scales is None else dataclasses.replace(quantized, scale=scales.scale, offset=scales.offset)


def _bits_as_data(grid: "_Grid") -> tuple[tuple[AnyBits, Any] | None, "_Grid"]:
    """Returns what depends on the number of bits, as data, and a grid for any number: one program serves them all."""
    scheme = grid.scheme
    if scheme.kind not in ("int", "uint"):
        return None, grid
    factors = padded_factors(scheme, grid.group_size) if grid.search else None
    return (AnyBits.of(scheme), factors), dataclasses.replace(grid, scheme=Scheme(scheme.kind, 8))


def _check_descent(descent: int, scheme: Scheme, group_size: int | str) -> None:
    if descent < 0 or (descent and (scheme.scale_code or group_size == "tensor")):
        raise ValueError(
            f"descent {descent} for {scheme.name}, group_size {group_size!r}: expected 0 or more, and more than 0 only "
            "with scales per group or channel that are not one-byte codes"
        )


def _checked_second(
    name: Scheme | str | None, scheme: Scheme, group_size: int | str, length: int, scales: QTensor | None
) -> Scheme | None:
    """Returns the scheme of quantized scales, checked."""
    if name is None:
        return None
    second = Scheme.named(name) if isinstance(name, str) else name
    if not scheme.signed_scales or second.kind != "int":
        raise ValueError(f"{scheme.name} with scales in {second.name}: expected int or iq4_nl with int")
    if isinstance(group_size, str) or scales is not None:
        said = "given scales" if scales is not None else f"group_size {group_size!r}"
        raise ValueError(f"scale_scheme {second.name} beside {said}: expected a number as group_size, and scales=None")
    check_group(length // group_size, length // group_size, second.bits)
    return second


def _fixed(
    scales: QTensor, weight: jax.Array, scheme: Scheme, group_size: int, axis: int, act_order: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the given scales and offsets, checked, as float32 [..., C, M]."""
    like = (scales.scheme, scales.shape, scales.group_size, scales.axis, scales.zero, scales.order, scales.outlier)
    if act_order or like != (scheme, weight.shape, group_size, axis, None, None, None):
        raise ValueError(
            f"scales of a weight {scales.shape}, {scales.scheme.name} in groups of {scales.group_size}: expected "
            f"{weight.shape}, {scheme.name} in groups of {group_size}, without zero points, order and outliers, and "
            "act_order=False"
        )
    scale = scale_values(scales.scale, scheme)
    offset = jnp.zeros_like(scale) if scales.offset is None else scale_values(scales.offset, scheme)
    return jax.tree.map(lambda x: x if axis == -2 else x.swapaxes(-1, -2), (scale, offset))


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Gives groups of weights [g, M] their scales and codes. Hashable: static under jit."""

    scheme: Scheme
    group_size: int
    per_tensor: bool
    scale_dtype: np.dtype
    search: bool
    second: Scheme | None = None  # of quantized scales
    factors: tuple[jax.Array, jax.Array] | None = None  # of the search, if the scheme's bits are data

    def fit(
        self, weight_gM: jax.Array, importance_g1: jax.Array, unit_1M: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Returns scale as stored and zero point, [1, M] or [1, 1], and whether scales are in range, bool [1, 1].

        A quantized scale is returned as code times unit, float32.
        """
        reduced = (-2, -1) if self.per_tensor else (-2,)
        low, high = group_range(weight_gM, self.scheme, reduced)
        scale_dtype = self.scale_dtype if unit_1M is None else np.dtype("float32")
        if self.search:
            scale, zero = search_clip(
                weight_gM, low, high, importance_g1, self.scheme, reduced, scale_dtype, factors=self.factors
            )
        else:
            scale, zero = group_grid(low, high, 1.0, self.scheme, scale_dtype)
        if unit_1M is not None:
            scale = self._multiple(scale, unit_1M.astype(jnp.float32))
        return scale, zero, jnp.isfinite(scale_values(scale, self.scheme)).all(keepdims=True)

    def unit(self, weight_KM: jax.Array) -> jax.Array:
        """Returns the unit of scales' codes, [1, M]: the last code is `SCALE_HEADROOM` times the largest scale."""
        assert self.second is not None
        groups_CgM = split_groups(weight_KM, self.group_size, -2)
        scale, _ = group_grid(
            *group_range(groups_CgM, self.scheme, (-2,)), SCALE_HEADROOM, self.scheme, np.dtype("float32")
        )
        return stored_scale(jnp.abs(scale).max(-3) / (self.second.bias - 1), self.scale_dtype)

    def stored(self, scale_1M: jax.Array, unit_1M: jax.Array | None) -> jax.Array:
        """Returns the nearest scale that can be stored, float32."""
        if unit_1M is None:
            return stored_scale(scale_1M, self.scale_dtype).astype(jnp.float32)
        return self._multiple(scale_1M, unit_1M.astype(jnp.float32))

    def _multiple(self, scale_1M: jax.Array, unit_1M: jax.Array) -> jax.Array:
        """Returns the nearest multiple of the unit that has a code; it is 0 only if the scale is 0."""
        assert self.second is not None
        most = self.second.bias - 1
        code = jnp.clip(jnp.round(scale_1M / divisor(unit_1M)), -most, most)
        return jnp.where(code == 0, jnp.sign(scale_1M), code) * unit_1M

    def round(self, weight_nM: jax.Array, scale: jax.Array, zero: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns the nearest codes, uint8 [n, M], and their values, float32 [n, M]."""
        codes_nM = encode_groups(weight_nM, scale, zero, self.scheme)
        value_nM = self.scheme.decode(codes_nM)
        value_nM = value_nM if zero is None else value_nM - zero.astype(jnp.float32)
        return codes_nM, value_nM * scale_values(scale, self.scheme)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _quantize(
    weight: jax.Array,
    hessian: jax.Array,
    damping: float | jax.Array,
    fixed: tuple[jax.Array, jax.Array] | None,
    of_bits: tuple[AnyBits, Any] | None,
    grid: _Grid,
    axis: int,
    act_order: bool,
    block_size: int,
    descent: int,
) -> tuple[tuple, jax.Array]:
    """Returns codes, scale, zero, order and unit along the weight's own axis, and whether every scale is finite.

    `of_bits` holds the scheme and the factors that replace those of the grid.
    """
    if of_bits is not None:
        grid = dataclasses.replace(grid, scheme=of_bits[0], factors=of_bits[1])
    weight_KM = weight.astype(jnp.float32) if axis == -2 else weight.astype(jnp.float32).swapaxes(-1, -2)
    options: dict[str, Any] = {
        "damping": damping,
        "grid": grid,
        "act_order": act_order,
        "block_size": block_size,
        "descent": descent,
    }
    one: Callable[..., tuple] = functools.partial(_quantize_matrix, **options)
    if weight.ndim == 2:
        parts = one(weight_KM, hessian, fixed)
    else:
        # One matrix at a time, not vmap, so that memory stays that of one matrix.
        matrices = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-2:]), (weight_KM, hessian, fixed))
        parts = jax.lax.map(lambda each: one(*each), matrices)
        parts = jax.tree.map(lambda part: part.reshape(*weight.shape[:-2], *part.shape[1:]), parts)
    codes, scale, zero, in_range, order, unit = (
        parts if axis == -2 else jax.tree.map(lambda x: x.swapaxes(-1, -2), parts)
    )
    return (codes, scale, zero, order, unit), in_range.all()


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _packed(
    codes: jax.Array,
    scale: jax.Array,
    zero: jax.Array | None,
    order: jax.Array | None,
    unit: jax.Array | None,
    scheme: Scheme,
    second: Scheme | None,
    axis: int,
    dtype: np.dtype,
) -> QTensor:
    """Packs the results of `_quantize` as a QTensor; scales that are multiples of units become codes."""
    stored: Any = scale
    if second is not None:
        assert unit is not None
        scale_codes = second.encode(scale / divisor(unit.astype(jnp.float32)))
        stored = QTensor.from_codes(scale_codes, unit, second, axis=axis)
    return QTensor.from_codes(codes, stored, scheme, zero=zero, order=order, axis=axis, dtype=dtype)


def _quantize_matrix(
    weight_KM: jax.Array,
    hessian_KK: jax.Array,
    fixed: tuple[jax.Array, jax.Array] | None,
    *,
    damping: float | jax.Array,
    grid: _Grid,
    act_order: bool,
    block_size: int,
    descent: int,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array | None, jax.Array | None]:
    """Returns codes [K, M], scale and zero [C, M], in range [C, 1], order [K, 1], unit [1, M]; some may be None."""
    hessian_KK, length = hessian_KK.astype(jnp.float32), weight_KM.shape[0]
    diagonal_K = jnp.diagonal(hessian_KK)
    order_K = jnp.argsort(-diagonal_K, stable=True) if act_order else jnp.arange(length)
    weight_KM = jnp.where(diagonal_K[:, None] == 0, 0, weight_KM)
    if act_order:
        weight_KM, hessian_KK = weight_KM[order_K], hessian_KK[order_K][:, order_K]
    factor_KK = inverse_factor(hessian_KK, damping)
    sizes = _block_sizes(length, grid.group_size, block_size)
    scale_KM = None
    if fixed is not None:
        scale_KM, offset_KM = (jnp.repeat(part, grid.group_size, 0) for part in fixed)
        weight_KM = weight_KM - offset_KM  # rounding does not change offsets
    unit = None if grid.second is None else grid.unit(weight_KM)
    codes_KM, _, (scale, zero, in_range) = _sweep(weight_KM, factor_KK, sizes, grid, None, scale_KM, unit)
    if descent:
        stored = None if fixed is not None else functools.partial(grid.stored, unit_1M=unit)
        damped_KK = hessian_KK + damping * diagonal_K.mean() * jnp.diag(jnp.where(diagonal_K == 0, 0.0, 1.0))
        found = codes_KM, scale.astype(jnp.float32), zero
        codes_KM, fitted = descend(*found, weight_KM, damped_KK, grid.scheme, descent, stored)
        scale = fitted.astype(scale.dtype)
    if act_order and grid.group_size == length:
        # A single group needs no order: codes go back to their channels' positions.
        return codes_KM[jnp.argsort(order_K)], scale, zero, in_range, None, unit
    return codes_KM, scale, zero, in_range, order_K[:, None].astype(jnp.int32) if act_order else None, unit


def _block_sizes(length: int, group_size: int, block_size: int) -> tuple[int, ...]:
    """Returns the sizes that rows are cut into, level by level: blocks and groups, the larger first, then single rows.

    Block sizes divide groups, or the reverse, so that no group begins with updates outstanding.
    """
    if group_size <= block_size:
        block = group_size * _largest_divisor(length // group_size, block_size // group_size)
    else:
        block = _largest_divisor(group_size, block_size)
    return tuple(sorted({block, group_size, 1}, reverse=True))


def _largest_divisor(number: int, limit: int) -> int:
    """Returns the largest divisor of a number that is at most the limit."""
    return max(divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0)


def _sweep(
    weight_nM: jax.Array,
    factor_nn: jax.Array,
    sizes: tuple[int, ...],
    grid: _Grid,
    fitted: Any,
    scale_nM: jax.Array | None = None,
    unit_1M: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Quantizes rows from the first to the last.

    sizes[0] rows at a time are quantized by a sweep with sizes[1:]. Then one matrix product moves their errors into all
    later rows (and, to keep shapes static, into earlier ones, which are not read again). These are the paper's lazy
    batches, at every level; the smallest has rank 1.

    `weight_nM` includes the errors of all rows before it. `factor_nn` is its part of U. `fitted` is the result of
    `grid.fit` for the rows' group, if they are only part of one. `scale_nM` are the rows' scales, if they are given
    instead of fitted. `unit_1M` is passed to `grid.fit`. Returns codes, uint8 [n, M]; errors divided by U's diagonal,
    float32 [n, M]; and the stacked results of `grid.fit` for the groups that begin here.
    """
    if not sizes:
        scale, zero, _ = fitted
        codes_1M, value_1M = grid.round(weight_nM, scale, zero)
        return codes_1M, (weight_nM - value_1M) / factor_nn, None
    size, *smaller = sizes
    begins_group = size == grid.group_size

    def step(weight_nM: jax.Array, start: jax.Array | int) -> tuple[jax.Array, tuple]:
        weight_sM = jax.lax.dynamic_slice_in_dim(weight_nM, start, size)
        factor_sn = jax.lax.dynamic_slice_in_dim(factor_nn, start, size)
        factor_ss = jax.lax.dynamic_slice_in_dim(factor_sn, start, size, axis=1)
        scale_sM = None if scale_nM is None else jax.lax.dynamic_slice_in_dim(scale_nM, start, size)
        own = fitted
        if begins_group and scale_sM is not None:
            own = scale_sM[:1], None, jnp.isfinite(scale_sM[:1]).all(keepdims=True)
        elif begins_group:
            own = grid.fit(weight_sM, jnp.diagonal(factor_ss)[:, None] ** -2, unit_1M)
        codes_sM, error_sM, groups = _sweep(weight_sM, factor_ss, tuple(smaller), grid, own, scale_sM, unit_1M)
        return weight_nM - _matmul(factor_sn.T, error_sM), (codes_sM, error_sM, own if begins_group else groups)

    if size == len(weight_nM):
        return step(weight_nM, 0)[1]
    _, parts = jax.lax.scan(step, weight_nM, jnp.arange(0, len(weight_nM), size))
    return jax.tree.map(lambda part: part.reshape(-1, part.shape[-1]), parts)


def _check_arguments(
    weight: jax.Array,
    hessian: jax.Array,
    axis: int,
    scale_dtype: np.dtype,
    clip: str | None,
    damping: float,
    block_size: int,
) -> None:
    """Checks the arguments of `quantize_gptq` except the group size."""
    if scale_dtype.name not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype {scale_dtype.name}: expected {' or '.join(SCALE_DTYPES)}")
    if clip not in (None, "mse"):
        raise ValueError(f"clip {clip!r}: expected None or 'mse'")
    if not isinstance(damping, jax.core.Tracer) and not (0 <= damping and math.isfinite(damping)):
        raise ValueError(f"damping {damping}: expected a fraction of the mean diagonal, 0 or more, such as 0.01")
    if block_size < 1:
        raise ValueError(f"block_size {block_size}: expected at least 1")
    expected = (*weight.shape[:-2], weight.shape[axis], weight.shape[axis])
    if hessian.shape != expected or not jnp.issubdtype(hessian.dtype, jnp.floating):
        raise ValueError(f"hessian of dtype {hessian.dtype} and shape {hessian.shape}: expected floats, {expected}")
    if isinstance(hessian, jax.core.Tracer):
        return
    if not jnp.isfinite(hessian).all():
        raise ValueError("hessian holds NaN or infinity: expected the mean of x x' over finite inputs x")
    if (jnp.diagonal(hessian, axis1=-2, axis2=-1) < 0).any():
        raise ValueError("hessian has a negative diagonal entry: expected the mean of x x' over inputs x")
