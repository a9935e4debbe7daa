"""GPTQ: rounding one input channel after the other, each time moving its error into the channels still to come.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323. It minimises the squared error of a layer's outputs, ||x w - x w'||^2 over calibration inputs x, which
depends on the inputs only through the Hessian H = x' x / T.

Dimension key: `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group, `T` samples (tokens).
Inside, `n` rows are in hand, of which `s` at a time are quantized.
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

# Of scales in codes the largest code stands for so many times the largest plain scale of an output: weights grow by
# what is moved into them.
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

    Channels are quantized in order. With U the upper Cholesky factor of the inverse Hessian, the rounding error of
    channel k, divided by U[k, k], is subtracted from every later channel j times U[k, j]: what that channel can make
    up for. A group's scale and zero point are those of `quantize_rtn` for its weights **as they are when its first
    channel is reached**, for every group and block size: updates are late only for groups that have not begun.

    The Hessian is damped by `damping` times its mean diagonal. If float32 cannot factorize that (a pivot is lost in
    rounding; with few samples H is singular), damping grows tenfold, from at least 0.001, until it can. Channels that
    never see an input (H[k, k] = 0) get weight 0, diagonal 1, and no part in that mean.

    Args:
        weight: float [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`). Leading axes are done one after the other.
        hessian: float [..., K, K], of the inputs, by `hessian` or `add_to_hessian`; its scale does not matter.
        scheme: a Scheme or its name, as "int4"; any kind.
        group_size: weights along K that share a scale; "channel": all K of an output; "tensor": all of [K, M].
        axis: the contraction axis, -2 or -1.
        scale_dtype: float32, bfloat16 or float16; mxfp4 and nvfp4 have scales of a byte instead.
        clip: "mse" chooses each group's scale as `quantize_rtn` does, weighing channel k's squared error by
            1 / U[k, k]^2: what GPTQ's own objective charges for it.
        act_order: quantize channels in the order of falling H[k, k], while many are left to make up for the errors
            of those that matter most. Groups are then of neighbours in that order, and the result has an `order`
            (g_idx elsewhere), unless a group is all of K.
        damping: fraction of the mean diagonal of H that is added to it.
        block_size: at most how many channels go between two updates of all the others. For speed only: the result is
            the same but for the rounding of float32 sums.
        scales: the same weight, quantized in another way with the same scheme, groups and axis, without zero points,
            order and outliers: its scales and offsets stay, whatever they are made of, and only codes are chosen.
        scale_scheme: that of scales which are codes themselves, an int as `scheme` is, under a float for all of an
            output. The float is chosen before anything is moved (`SCALE_HEADROOM`), the codes as groups are reached.
        descent: sweeps of coordinate descent behind it (`descent.descend`), which change codes and, where they are the
            quantizer's to choose, scales of groups of fewer than 256.

    Returns:
        The quantized weight; its `dtype` is that of `weight`.

    Raises:
        ValueError: for arguments that do not fit each other, and, outside jit, for a weight or Hessian that is not
            finite or scales above the range of `scale_dtype`. Under jit such weights become NaN or arbitrary.
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
    """What differs between numbers of bits, as data, and a grid that is the same for all: one program serves them."""
    scheme = grid.scheme
    if scheme.kind not in ("int", "uint"):
        return None, grid
    factors = padded_factors(scheme, grid.group_size) if grid.search else None
    return (AnyBits.of(scheme), factors), dataclasses.replace(grid, scheme=Scheme(scheme.kind, 8))


def _check_descent(descent: int, scheme: Scheme, group_size: int | str) -> None:
    if descent < 0 or (descent and (scheme.scale_code or group_size == "tensor")):
        raise ValueError(
            f"descent {descent} of {scheme.name}, {group_size!r}: expected 0 or more, with scales of groups"
        )


def _checked_second(
    name: Scheme | str | None, scheme: Scheme, group_size: int | str, length: int, scales: QTensor | None
) -> Scheme | None:
    """The scheme of scales in codes, checked."""
    if name is None:
        return None
    second = Scheme.named(name) if isinstance(name, str) else name
    if scheme.kind != "int" or second.kind != "int":
        raise ValueError(f"{scheme.name} with scales in {second.name}: expected int with int")
    if isinstance(group_size, str) or scales is not None:
        said = "scales that stay" if scales is not None else f"group_size {group_size!r}"
        raise ValueError(f"scale_scheme {second.name} beside {said}: expected groups of a number, scales to be chosen")
    check_group(length // group_size, length // group_size, second.bits)
    return second


def _fixed(
    scales: QTensor, weight: jax.Array, scheme: Scheme, group_size: int, axis: int, act_order: bool
) -> tuple[jax.Array, jax.Array]:
    """Scales and offsets that stay, float32 [..., C, M]."""
    like = (scales.scheme, scales.shape, scales.group_size, scales.axis, scales.zero, scales.order, scales.outlier)
    if act_order or like != (scheme, weight.shape, group_size, axis, None, None, None):
        raise ValueError(
            f"scales of {scales.shape}, {scales.scheme.name} in groups of {scales.group_size}: expected those of "
            f"{weight.shape}, {scheme.name} and {group_size}, without zero points, order and outliers"
        )
    scale = scale_values(scales.scale, scheme)
    offset = jnp.zeros_like(scale) if scales.offset is None else scale_values(scales.offset, scheme)
    return jax.tree.map(lambda x: x if axis == -2 else x.swapaxes(-1, -2), (scale, offset))


@dataclasses.dataclass(frozen=True)
class _Grid:
    """How groups of weights [g, M] get scales and codes. Hashable: static under jit."""

    scheme: Scheme
    group_size: int
    per_tensor: bool
    scale_dtype: np.dtype
    search: bool
    second: Scheme | None = None  # of scales in codes
    factors: tuple[jax.Array, jax.Array] | None = None  # of the search, where the scheme's bits are data

    def fit(
        self, weight_gM: jax.Array, importance_g1: jax.Array, unit_1M: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """Scale as it is stored and zero point, [1, M] or [1, 1], and whether scales are in range, bool [1, 1].

        Of scales in codes it is code times unit, float32.
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
        """What codes of scales are multiplied with, [1, M]: the plain scale of largest magnitude has the last code."""
        assert self.second is not None
        groups_CgM = split_groups(weight_KM, self.group_size, -2)
        scale, _ = group_grid(
            *group_range(groups_CgM, self.scheme, (-2,)), SCALE_HEADROOM, self.scheme, np.dtype("float32")
        )
        return stored_scale(jnp.abs(scale).max(-3) / (self.second.bias - 1), self.scale_dtype)

    def stored(self, scale_1M: jax.Array, unit_1M: jax.Array | None) -> jax.Array:
        """The nearest scale that can be stored, float32."""
        if unit_1M is None:
            return stored_scale(scale_1M, self.scale_dtype).astype(jnp.float32)
        return self._multiple(scale_1M, unit_1M.astype(jnp.float32))

    def _multiple(self, scale_1M: jax.Array, unit_1M: jax.Array) -> jax.Array:
        """The nearest whole number of units that has a code and is not 0 where the scale is not."""
        assert self.second is not None
        most = self.second.bias - 1
        code = jnp.clip(jnp.round(scale_1M / divisor(unit_1M)), -most, most)
        return jnp.where(code == 0, jnp.sign(scale_1M), code) * unit_1M

    def round(self, weight_nM: jax.Array, scale: jax.Array, zero: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Nearest codes, uint8 [n, M], and what they stand for, float32 [n, M]."""
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
    """Codes, scale, zero, order and unit along the weight's own axis, and whether every scale is finite.

    `of_bits` are what stands in for the grid's scheme, and its factors.
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
        # One matrix at a time, not vmap: memory stays that of one.
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
    """The weight of what `_quantize` made; scales that are whole numbers of units become codes under these."""
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
    """Codes [K, M], scale and zero [C, M], in range [C, 1], order [K, 1], unit [1, M]; None where there is none."""
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
        weight_KM = weight_KM - offset_KM  # which rounding does not change
    unit = None if grid.second is None else grid.unit(weight_KM)
    codes_KM, _, (scale, zero, in_range) = _sweep(weight_KM, factor_KK, sizes, grid, None, scale_KM, unit)
    if descent:
        stored = None if fixed is not None else functools.partial(grid.stored, unit_1M=unit)
        damped_KK = hessian_KK + damping * diagonal_K.mean() * jnp.diag(jnp.where(diagonal_K == 0, 0.0, 1.0))
        found = codes_KM, scale.astype(jnp.float32), zero
        codes_KM, fitted = descend(*found, weight_KM, damped_KK, grid.scheme, descent, stored)
        scale = fitted.astype(scale.dtype)
    if act_order and grid.group_size == length:
        # One group needs no order: codes go back to where their channels are.
        return codes_KM[jnp.argsort(order_K)], scale, zero, in_range, None, unit
    return codes_KM, scale, zero, in_range, order_K[:, None].astype(jnp.int32) if act_order else None, unit


def _block_sizes(length: int, group_size: int, block_size: int) -> tuple[int, ...]:
    """Sizes that the rows are cut into, each into the next: blocks and groups, the larger first, then single rows.

    Blocks are made to divide groups, or groups blocks, so that no group begins with updates outstanding.
    """
    if group_size <= block_size:
        block = group_size * _largest_divisor(length // group_size, block_size // group_size)
    else:
        block = _largest_divisor(group_size, block_size)
    return tuple(sorted({block, group_size, 1}, reverse=True))


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is at most the limit."""
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

    sizes[0] rows at a time, themselves by a sweep with sizes[1:], then one matrix product moves their errors into all
    rows that follow (and, for a static shape, into those before, which nobody reads again). These are the paper's
    lazy batches, at every level: rank 1 inside the smallest.

    `weight_nM` has the errors of all rows before it taken in, `factor_nn` is its part of U, `fitted` what `grid.fit`
    made of the group that the rows are in, if they are less than one; `scale_nM` are the scales of rows, where they are
    given, and nothing is to be fitted; `unit_1M` is for `grid.fit`. Returns codes uint8 [n, M], errors divided by U's
    diagonal float32 [n, M], and `grid.fit` of the groups begun, stacked.
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
    """Checks what `quantize_gptq` takes, but for the group size."""
    if scale_dtype.name not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype {scale_dtype.name}: expected {' or '.join(SCALE_DTYPES)}")
    if clip not in (None, "mse"):
        raise ValueError(f"clip {clip!r}: expected None or 'mse'")
    if not isinstance(damping, jax.core.Tracer) and not (0 <= damping and math.isfinite(damping)):
        raise ValueError(f"damping {damping}: expected a fraction of the mean diagonal, not negative, as 0.01")
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
