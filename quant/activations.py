"""Rounds activations before the product with a quantized weight, in integers and as a float reference.

Activations are rounded to bfloat16, with 8 bits of precision for each element, or to int8, for W8A8 and W4A8 products.
int8 has one scale per token (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, calls it vector-wise) or per group of
the weight, as llama.cpp's Q8_0 and Q8_K have for every weight in groups.

Dimension key: `K` contraction axis, `C` groups along it, `g` elements of a group.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# Values of `QTensor.activations` besides None, which means no rounding.
ACTIVATIONS = ("bfloat16", "int8-token", "int8-group")
_MAX_CODE = 127
# A factor, rounded here, because XLA turns a division by a constant into a product and other runtimes do not: if the
# last bit of a scale differs, codes near a half differ too.
_RECIPROCAL = np.float32(1 / _MAX_CODE)


def quantize_activations(x: jax.Array, group_size: int | Literal["token"]) -> tuple[jax.Array, jax.Array]:
    """Rounds activations to symmetric int8 codes in -127 ... 127: x is about code * scale.

    scale = max|x| * (1 / 127) of the group, and code = x / scale rounded to nearest, halves to even; in float32. So
    |x - code * scale| <= scale / 2. A group of zeros has scale 0 and codes 0. NaN or infinity anywhere in a group makes
    its scale, and so all its values, not finite, so that the error stays visible.

    Args:
        x: float [..., K].
        group_size: consecutive elements that share a scale; "token": all K.

    Returns:
        Codes, int8 [..., K], and scales, float32 [..., C].

    Raises:
        ValueError: if `x` does not hold floats, or groups do not divide K.
    """
    codes_Cg, scale_C1 = _scaled(x, group_size)
    return codes_Cg.astype(jnp.int8).reshape(x.shape), jnp.squeeze(scale_C1, -1)


def _scaled(x: jax.Array, group_size: int | Literal["token"]) -> tuple[jax.Array, jax.Array]:
    """Returns codes [..., C, g] in float32, and scales [..., C, 1]."""
    if not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 1:
        raise ValueError(f"activations of dtype {x.dtype} and shape {x.shape}: expected floats, [..., K]")
    *lead, length = x.shape
    size = length if group_size == "token" else group_size
    if isinstance(size, str) or size < 1 or length % size:
        raise ValueError(
            f"groups of {group_size!r} for activations of {length} channels: expected a divisor or 'token'"
        )
    x_Cg = x.astype(jnp.float32).reshape(*lead, length // size, size)
    scale_C1 = jnp.max(jnp.abs(x_Cg), axis=-1, keepdims=True) * _RECIPROCAL
    codes_Cg = jnp.round(x_Cg / jnp.where(scale_C1 == 0, 1, scale_C1))
    # The clip is for denormal scales, which have few bits; otherwise the largest code is 127.
    return jnp.clip(codes_Cg, -_MAX_CODE, _MAX_CODE), scale_C1


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_activations(x: jax.Array, group_size: int | Literal["token"]) -> jax.Array:
    """Rounds activations as `quantize_activations` does and returns floats: code * scale.

    Its derivative is that of the identity, the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432): the
    derivative of rounding is 0 almost everywhere, so layers before a rounded one would not learn.

    Args:
        x: float [..., K].
        group_size: as in `quantize_activations`.

    Returns:
        float32 [..., K].

    Raises:
        ValueError: as `quantize_activations`.
    """
    # Codes stay floats: runtimes of exported programs may lack int8.
    codes_Cg, scale_C1 = _scaled(x, group_size)
    return (codes_Cg * scale_C1).reshape(x.shape)


@round_activations.defjvp
def _straight_through(group_size: int | Literal["token"], primals: tuple, tangents: tuple) -> tuple:
    return round_activations(*primals, group_size), tangents[0].astype(jnp.float32)


def check_activations(kind: str | None, ordered: bool) -> None:
    """Checks a `QTensor`'s `activations`, given whether it has an `order`.

    Raises:
        ValueError: for an unknown kind, or for "int8-group" if the weight's groups are scattered (`order`).
    """
    if kind is not None and kind not in ACTIVATIONS:
        raise ValueError(f"activations {kind!r}: expected None or {' or '.join(map(repr, ACTIVATIONS))}")
    if kind == "int8-group" and ordered:
        raise ValueError(
            "activations 'int8-group' beside an order: expected groups of consecutive channels; use 'int8-token'"
        )
