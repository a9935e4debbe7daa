"""Activations rounded before they meet a quantized weight, and how a float reference stands for it.

To bfloat16, 8 bits of precision for each element; or to int8, what W8A8 and W4A8 products multiply with. Then one scale
for each token (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, calls it vector-wise) or for each of the weight's
groups, as llama.cpp's Q8_0 and Q8_K do for every weight in groups.

Dimension key: `K` contraction axis, `C` groups along it, `g` elements of a group.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

# Values of `QTensor.activations`, beside None for activations as they come.
ACTIVATIONS = ("bfloat16", "int8-token", "int8-group")
_MAX_CODE = 127
# A factor, rounded here: XLA makes one of a division by a constant, other runtimes divide, and where the last bit of a
# scale differs so do codes near a half.
_RECIPROCAL = np.float32(1 / _MAX_CODE)


def quantize_activations(x: jax.Array, group_size: int | Literal["token"]) -> tuple[jax.Array, jax.Array]:
    """Rounds activations to int8 codes in -127 ... 127, symmetric: x is about code * scale.

    scale = max|x| * (1 / 127) of the group, and code = x / scale rounded to nearest, halves to even; in float32. So
    |x - code * scale| <= scale / 2. A group of zeros has scale 0 and codes 0. NaN or infinity anywhere in a group
    gives it a scale that is not finite, and with that values that are not: nothing wrong looks right.

    Args:
        x: float [..., K].
        group_size: consecutive elements that share a scale; "token": all K.

    Returns:
        Codes, int8 [..., K], and scales, float32 [..., C].

    Raises:
        ValueError: if `x` is not of floats, or groups do not divide K.
    """
    codes_Cg, scale_C1 = _scaled(x, group_size)
    return codes_Cg.astype(jnp.int8).reshape(x.shape), jnp.squeeze(scale_C1, -1)


def _scaled(x: jax.Array, group_size: int | Literal["token"]) -> tuple[jax.Array, jax.Array]:
    """Codes [..., C, g] in float32, and scales [..., C, 1]."""
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
    # The largest is 127 but for denormal scales, which have few bits left.
    return jnp.clip(codes_Cg, -_MAX_CODE, _MAX_CODE), scale_C1


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def round_activations(x: jax.Array, group_size: int | Literal["token"]) -> jax.Array:
    """What `quantize_activations` makes of activations, as floats: code * scale.

    Its derivative is that of the identity, the straight-through estimator (Bengio et al. 2013, arXiv:1308.3432):
    rounding's own is 0 almost everywhere, and nothing below a rounded layer would learn.

    Args:
        x: float [..., K].
        group_size: as in `quantize_activations`.

    Returns:
        float32 [..., K].

    Raises:
        ValueError: as `quantize_activations`.
    """
    # Never int8, which runtimes of exported programs may lack.
    codes_Cg, scale_C1 = _scaled(x, group_size)
    return (codes_Cg * scale_C1).reshape(x.shape)


@round_activations.defjvp
def _straight_through(group_size: int | Literal["token"], primals: tuple, tangents: tuple) -> tuple:
    return round_activations(*primals, group_size), tangents[0].astype(jnp.float32)


def check_activations(kind: str | None, ordered: bool) -> None:
    """Checks a `QTensor`'s `activations`, given whether it has an `order`.

    Raises:
        ValueError: for a kind that there is not, or groups of activations where the weight's groups are scattered.
    """
    if kind is not None and kind not in ACTIVATIONS:
        raise ValueError(f"activations {kind!r}: expected None or {' or '.join(map(repr, ACTIVATIONS))}")
    if kind == "int8-group" and ordered:
        raise ValueError(
            "activations 'int8-group' beside an order: its groups are scattered channels, use 'int8-token'"
        )
