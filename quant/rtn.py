"""Round-to-nearest quantization: a scale per group from the group's own values, and the nearest code for each weight.

Dimension key: `K` contraction axis, `M` outputs, `C` groups along K, `g` elements of a group. Shapes are written for
`axis=-2`. Internally weights are [..., C, g, M], and arrays with one number per group are [..., C, 1, M].
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from quant.clip import search_matrices
from quant.grid import check_in_range, checked_group_size, encode_groups, group_grid, group_range
from quant.packing import merge_groups, split_groups
from quant.qtensor import SCALE_DTYPES, QTensor, scale_values
from quant.scheme import Scheme


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
    """Quantizes a weight by rounding each value to the nearest one that its group's scale can express.

    The scale of a group, before `clip`:

    - int: the value of largest magnitude, with its sign, / -2**(b-1), as in ggml's Q4_0. That value gets code 0
      exactly, and all 2**b codes are used. The symmetric alternative, max|w| / (2**(b-1) - 1), wastes one code, which
      makes a step 14% larger at 4 bits. The price: a value of the other sign beyond 2**(b-1) - 1/2 steps is off by up
      to one step.
    - uint: (max - min) / (2**b - 1), of the range widened to include 0. The zero point is a whole code: 0 stays 0.
    - ternary: mean|w|, and codes round(w / scale) clipped to -1..1 (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764).
    - nf4: max|w| (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
    - mxfp4: 2**(floor(log2(max|w|)) - 2) (OCP Microscaling Formats v1.0, 2023; groups of 32 there). Values
      beyond 6 scales become 6 scales. A tie between two values goes to the one nearer to 0.
    - nvfp4: max|w| / 6, rounded to UE4M3 (ggml's NVFP4, groups of 16 there): from 2**-9 to 448 in steps of an eighth.
    - iq4_nl: the value of largest magnitude, with its sign, / -127, as ggml's IQ4_NL begins its search.

    Codes are chosen with the scale as it is stored, rounded to `scale_dtype`: this costs range but hardly accuracy. So
    a value inside the range is off by at most scale / 2 for int, uint and ternary. A group of zeros gets scale 0. The
    magnitude of any other scale is at least the smallest that `scale_dtype` has (`stored_scale`): nearly-zero weights,
    such as those of untrained tokens, become multiples of that.

    Args:
        weight: float [..., K, M] (`axis=-2`) or [..., M, K] (`axis=-1`).
        scheme: a Scheme or its name, such as "int4".
        group_size: weights along K that share a scale; "channel": all K of an output; "tensor": all of [K, M].
        axis: the contraction axis, -2 or -1.
        scale_dtype: float32, bfloat16 or float16; mxfp4 and nvfp4 have one-byte scales instead.
        clip: "mse" searches for the scale of least squared error. It encodes each group with `clip_factors` times its
            scale, keeps the codes that have the least error with a scale fitted to them, fits that scale by least
            squares, and encodes and fits again. The result is taken only if its error, with the scale as stored, is
            less than that of the plain scale. For mxfp4 and nvfp4, whose scales cannot be fitted, the search takes the
            best factor.
        importance: float [..., K], not negative: the weight of each input channel in that error, for example the mean
            square of its activations, as in llama.cpp's importance matrix. Requires `clip`.

    Returns:
        The quantized weight; its `dtype` is that of `weight`.

    Raises:
        ValueError: for incompatible arguments, and, outside jit, for a weight that is not finite or whose scales are
            above the range of `scale_dtype`. Under jit such groups become NaN.
    """
    scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
    weight, scale_dtype = jnp.asarray(weight), jnp.dtype(scale_dtype)
    size = checked_group_size(weight, scheme, group_size, axis)
    if scale_dtype.name not in SCALE_DTYPES:
        raise ValueError(f"scale_dtype {scale_dtype.name}: expected {' or '.join(SCALE_DTYPES)}")
    if clip not in (None, "mse"):
        raise ValueError(f"clip {clip!r}: expected None or 'mse'")
    if importance is not None:
        importance = checked_importance(importance, weight, axis, clip)
    search, per_tensor = clip is not None, group_size == "tensor"
    quantized, in_range = _quantize(weight, importance, scheme, size, per_tensor, axis, scale_dtype, search)
    check_in_range(weight, in_range, scale_dtype)
    return quantized


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
    """Returns the quantized weight, and whether every scale is finite."""
    weight_CgM = split_groups(weight.astype(jnp.float32), group_size, axis)
    across_M = (-1 if axis == -2 else -3,) if per_tensor else ()
    low, high = group_range(weight_CgM, scheme, (axis, *across_M))
    if search:
        if importance is not None:
            importance = jnp.broadcast_to(importance, (*weight.shape[:-2], weight.shape[axis]))
        scale, zero = search_matrices(weight_CgM, importance, scheme, per_tensor, axis, scale_dtype)
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


def checked_importance(importance: jax.Array, weight: jax.Array, axis: int, clip: str | None) -> jax.Array:
    """Returns importance as float32, checked against the weight."""
    if clip is None:
        raise ValueError("importance without clip: plain rounding to nearest does not use it; set clip='mse'")
    importance = jnp.asarray(importance, jnp.float32)
    expected = (*weight.shape[:-2], weight.shape[axis])
    if importance.shape not in (expected, expected[-1:]):
        raise ValueError(f"importance of shape {importance.shape}: expected one number per input channel, {expected}")
    if not isinstance(importance, jax.core.Tracer) and not (jnp.isfinite(importance) & (importance >= 0)).all():
        raise ValueError("importance holds a value that is negative or not finite: expected mean squares")
    return importance
