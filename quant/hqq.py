"""HQQ: half-quadratic optimisation of the zero points, without data.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models",
https://mobiusml.github.io/hqq_blog/. It minimises the lp norm of a group's error with p < 1, which is dominated by the
many weights that are near a code, not by the few outliers that no scale fits.

Dimension key: `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group. Shapes are written for
`axis=-2`. Internally weights are [..., C, g, M], and arrays with one number per group are [..., C, 1, M].
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from quant.grid import check_in_range, checked_group_size, divisor, encode_groups, group_grid, stored_scale
from quant.packing import merge_groups, split_groups
from quant.qtensor import SCALE_DTYPES, QTensor
from quant.scheme import Scheme


def quantize_hqq(
    weight: jax.Array,
    scheme: Scheme | str,
    *,
    group_size: int | Literal["channel", "tensor"],
    axis: int = -2,
    scale_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    norm: float = 0.7,
    iterations: int = 20,
    beta: float = 10.0,
    kappa: float = 1.01,
) -> QTensor:
    """Quantizes a weight with zero points that are fractions of a code, chosen by half-quadratic optimisation.

    The scale of a group is (max - min) / (2**b - 1) and stays; the zero point starts at -min / scale. The error becomes
    a separate variable e, and these steps alternate (the blog's equations 4 to 7):

        code = round(w / scale + zero)
        e    = shrink(w / scale - (code - zero))        shrink(x) = sign(x) * max(|x| - |x|**(norm - 1) / beta, 0)
        zero = mean over the group of code - (w / scale - e)
        beta = beta * kappa

    Unlike the authors' code, this measures e in steps of a code, not in units of the weight, so that the effect of
    `beta` does not depend on the magnitude of the weights (for weights of 0.02 the authors' code shrinks everything to
    0, which makes the zero point a mean). The best iterate of each group is kept, with errors measured for scales and
    zero points as stored. `quantize_rtn`'s grid counts as an iterate: no group's sum |w - w'|**norm is larger than with
    that grid.

    Args:
        weight: float [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`).
        scheme: a Scheme with a zero point or its name, "uint2" to "uint8".
        group_size: weights along K that share a scale; "channel": all K of an output; "tensor": all of [K, M].
        axis: the contraction axis, -2 or -1.
        scale_dtype: dtype of scales and zero points: float32, bfloat16 or float16. From 6 bits on, bfloat16 zero points
            have no fraction left; float16 zero points have one for all schemes.
        norm: p of the norm, in (0, 1].
        iterations: number of iterations.
        beta: beta of the first iteration; a larger one shrinks less.
        kappa: growth of beta per iteration.

    Returns:
        The quantized weight, with `zero` of `scale_dtype`; its `dtype` is that of `weight`.

    Raises:
        ValueError: for incompatible arguments, and, outside jit, for a weight that is not finite or whose scales are
            above the range of `scale_dtype`. Under jit such groups become NaN.
    """
    scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
    weight, scale_dtype = jnp.asarray(weight), jnp.dtype(scale_dtype)
    size = checked_group_size(weight, scheme, group_size, axis)
    _check_arguments(scheme, scale_dtype, norm, iterations, beta, kappa)
    per_tensor = group_size == "tensor"
    settings = (norm, beta, kappa)
    quantized, in_range = _quantize(weight, settings, scheme, size, per_tensor, axis, scale_dtype, iterations)
    check_in_range(weight, in_range, scale_dtype)
    return quantized


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6, 7))
def _quantize(
    weight: jax.Array,
    settings: tuple[float, float, float],
    scheme: Scheme,
    group_size: int,
    per_tensor: bool,
    axis: int,
    scale_dtype: np.dtype,
    iterations: int,
) -> tuple[QTensor, jax.Array]:
    """Returns the quantized weight, and whether every scale and zero point is finite."""
    weight_CgM = split_groups(weight.astype(jnp.float32), group_size, axis)
    reduced = (axis, -1 if axis == -2 else -3) if per_tensor else (axis,)
    scale, zero = _search_zero(weight_CgM, settings, scheme, reduced, scale_dtype, iterations)
    codes_KM = merge_groups(encode_groups(weight_CgM, scale, zero, scheme), axis)
    quantized = QTensor.from_codes(
        codes_KM, jnp.squeeze(scale, axis), scheme, zero=jnp.squeeze(zero, axis), axis=axis, dtype=weight.dtype
    )
    return quantized, (jnp.isfinite(scale) & jnp.isfinite(zero)).all()


def _search_zero(
    weight_CgM: jax.Array,
    settings: tuple[float, float, float],
    scheme: Scheme,
    reduced: tuple[int, ...],
    scale_dtype: np.dtype,
    iterations: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the scales and zero points of least lp error among the iterates, as stored, [..., C, 1, M]."""
    norm, beta, kappa = settings
    low, high = weight_CgM.min(axis=reduced, keepdims=True), weight_CgM.max(axis=reduced, keepdims=True)
    scale = stored_scale((high - low) / scheme.max_code, scale_dtype)
    step = divisor(scale.astype(jnp.float32))

    def distance(scale: jax.Array, zero: jax.Array) -> jax.Array:
        codes_CgM = encode_groups(weight_CgM, scale, zero, scheme).astype(jnp.float32)
        return codes_CgM - zero.astype(jnp.float32)

    def loss(scale: jax.Array, zero: jax.Array) -> jax.Array:
        error_CgM = distance(scale, zero) * scale.astype(jnp.float32) - weight_CgM
        return jnp.sum(jnp.abs(error_CgM) ** norm, axis=reduced, keepdims=True)

    def improve(i: jax.Array, state: tuple) -> tuple:
        best, zero, beta = state
        stored = zero.astype(scale_dtype)
        new = (loss(scale, stored), scale, stored)
        # A zero point that overflows has a loss of NaN, which is not less.
        best = jax.tree.map(functools.partial(jnp.where, new[0] < best[0]), new, best)
        # The iteration continues from the unrounded zero point: steps smaller than bfloat16's would all be lost.
        residual_CgM = weight_CgM / step - distance(scale, zero)
        fault_CgM = _shrink(residual_CgM, beta, norm) - residual_CgM
        return best, zero + jnp.mean(fault_CgM, axis=reduced, keepdims=True), beta * kappa

    rounded_scale, rounded_zero = group_grid(low, high, 1.0, scheme, scale_dtype)
    assert rounded_zero is not None  # schemes with a zero point only
    rounded_zero = rounded_zero.astype(scale_dtype)
    best = (loss(rounded_scale, rounded_zero), rounded_scale, rounded_zero)
    start = (best, -low / step, jnp.float32(beta))
    (_, scale, zero), _, _ = jax.lax.fori_loop(0, iterations + 1, improve, start)
    return scale, zero


def _shrink(x: jax.Array, beta: jax.Array, norm: jax.Array | float) -> jax.Array:
    """Generalised soft threshold, the approximate proximal operator of |x|**norm / beta (Chartrand & Yin 2016)."""
    magnitude = jnp.abs(x)
    # 0**(norm - 1) is infinite; such a threshold leaves 0, which is correct, and no NaN.
    return jnp.sign(x) * jnp.maximum(magnitude - magnitude ** (norm - 1) / beta, 0)


def _check_arguments(
    scheme: Scheme, scale_dtype: np.dtype, norm: float, iterations: int, beta: float, kappa: float
) -> None:
    """Checks the arguments of `quantize_hqq` except weight, group size and axis."""
    if scheme.kind != "uint":
        raise ValueError(f"scheme {scheme.name}: expected uint2 to uint8, because HQQ optimises zero points")
    if scale_dtype.name not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype {scale_dtype.name}: expected {' or '.join(SCALE_DTYPES)}")
    if not 0 < norm <= 1:
        raise ValueError(f"norm {norm}: expected more than 0 and at most 1, as 0.7")
    if iterations < 0:
        raise ValueError(f"iterations {iterations}: expected at least 0, as 20")
    if not (beta > 0 and kappa > 0):
        raise ValueError(f"beta {beta} and kappa {kappa}: expected positive numbers, as 10 and 1.01")
