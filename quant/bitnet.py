"""Converts BitNet b1.58 layers of transformers to `QTensor`s and back: ternary codes, one scale, int8 activations.

    weight_KM = bitnet.unpack(packed_rK, scale)        # of a file: uint8 [M / 4, K] and its scale [1]
    packed_rK, scale = bitnet.pack(weight_KM)          # the same bytes
    weight_KM = bitnet.rounded(master_KM)              # of floats, as layers round them online

In transformers (integrations/bitnet.py, `pack_weights`) a byte holds the codes of four outputs that are M / 4 apart; in
FORMAT.md it holds the codes of four inputs that are K / 4 apart. The codes and their values are the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quant.mixed import kind_of
from quant.qtensor import SCALE_DTYPES, QTensor
from quant.rtn import quantize_rtn
from quant.scheme import SCHEMES

__all__ = ["abstract", "holds", "pack", "packed_shape", "rounded", "unpack", "with_int8_tokens"]

_CODES = 4  # in a byte
_TERNARY = SCHEMES["ternary"]
# transformers' `ActQuant`: codes of -128 to 127 with one scale for each token.
_ACTIVATIONS = "int8-token"


def unpack(packed_rK: np.ndarray, scale: np.ndarray, dtype: Any = np.float32, *, divides: bool = False) -> QTensor:
    """Converts packed codes to a weight with the same codes.

    Args:
        packed_rK: uint8 [M / 4, K], K a multiple of 4.
        scale: float [1], the factor of the codes.
        dtype: dtype of the weight that the QTensor replaces.
        divides: whether codes are divided by the scale (`BitLinear`) rather than multiplied (`AutoBitLinear`); then the
            result has its reciprocal, in float32.

    Returns:
        A QTensor [K, M] of NumPy arrays.

    Raises:
        ValueError: for other shapes or dtypes, or a code other than 0, 1 and 2.
    """
    if packed_rK.ndim != 2 or packed_rK.dtype != np.uint8 or packed_rK.shape[1] % _CODES or scale.size != 1:
        raise ValueError(
            f"codes {packed_rK.dtype} {packed_rK.shape} with a scale {scale.shape}: expected uint8 [M / 4, K] with K a "
            f"multiple of {_CODES}, and one scale"
        )
    packed_Kr = np.ascontiguousarray(packed_rK.T)
    length, quarter = packed_Kr.shape
    plane = np.empty((length // _CODES, _CODES * quarter), np.uint8)
    for part in range(_CODES):
        codes_Kr = packed_Kr >> np.uint8(2 * part) & np.uint8(3)
        if codes_Kr.max(initial=0) > _TERNARY.max_code:
            raise ValueError("holds the code 3: expected 0, 1 and 2, which stand for -1, 0 and 1")
        plane[:, part * quarter : (part + 1) * quarter] = _merged(np.split(codes_Kr, _CODES))
    if divides:
        with np.errstate(divide="ignore"):
            scale = np.float32(1) / scale.astype(np.float32)
    return _weight(plane, scale.reshape(1, 1), dtype)


def pack(weight: QTensor) -> tuple[np.ndarray, np.ndarray]:
    """Undoes `unpack`, bit for bit.

    Returns:
        uint8 [M / 4, K], and the scale [1], by which codes are multiplied.

    Raises:
        ValueError: for a weight that this form cannot hold (`holds`).
    """
    if not holds(weight):
        raise ValueError(f"a weight of shape {weight.shape}: expected ternary codes with one scale, and int8 tokens")
    plane = np.asarray(weight.planes[0])
    by_input = [plane >> np.uint8(2 * slot) & np.uint8(3) for slot in range(_CODES)]
    by_output = [
        np.concatenate(quarters) for quarters in zip(*(np.split(codes, _CODES, 1) for codes in by_input), strict=True)
    ]
    return np.ascontiguousarray(_merged(by_output).T), np.asarray(weight.scale).reshape(1)


def rounded(weight: Any, dtype: Any = np.float32) -> QTensor:
    """Quantizes floats [K, M] as layers round them online (`WeightQuant`): the scale is the mean magnitude, float32.

    Raises:
        ValueError: if K is not a multiple of 4, or the weight is not finite.
    """
    made = quantize_rtn(jnp.asarray(weight, jnp.float32), _TERNARY, group_size="tensor", scale_dtype=np.float32)
    return _weight(np.asarray(made.planes[0]), np.asarray(made.scale), dtype)


def abstract(shape: tuple[int, ...], dtype: Any, scale_dtype: Any) -> QTensor:
    """Returns what `unpack` returns for a weight of shape [K, M], with `jax.ShapeDtypeStruct` for arrays.

    Raises:
        ValueError: if K or M is not a multiple of 4.
    """
    length, outputs = shape
    packed_shape((outputs, length))
    plane = jax.ShapeDtypeStruct((length // _CODES, outputs), np.dtype(np.uint8))
    return _weight(plane, jax.ShapeDtypeStruct((1, 1), np.dtype(scale_dtype)), dtype)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the shape of the packed codes of a tensor [M, K].

    Raises:
        ValueError: if K or M is not a multiple of 4.
    """
    outputs, length = shape
    if length % _CODES or outputs % _CODES:
        raise ValueError(f"ternary codes of {length} inputs and {outputs} outputs: expected multiples of {_CODES}")
    return outputs // _CODES, length


def with_int8_tokens(weight: Any) -> Any:
    """Sets a ternary weight's activations to int8, as BitNet has them; returns others unchanged. May be abstract."""
    is_ternary = isinstance(weight, QTensor) and weight.scheme == _TERNARY
    return dataclasses.replace(weight, activations=_ACTIVATIONS) if is_ternary else weight


def holds(weight: Any) -> bool:
    """Whether `pack` accepts a weight; its arrays may be abstract."""
    if not isinstance(weight, QTensor) or weight.scheme != _TERNARY or weight.axis != -2 or weight.ndim != 2:
        return False
    if isinstance(weight.scale, QTensor) or np.dtype(weight.scale.dtype).name not in SCALE_DTYPES:
        return False
    same = dataclasses.replace(weight, activations=_ACTIVATIONS, order=None, outlier=None, outlier_index=None)
    if kind_of(weight) != kind_of(same):
        return False
    return tuple(weight.scale.shape) == (1, 1) and weight.shape[1] % _CODES == 0


def _merged(codes: list[np.ndarray]) -> np.ndarray:
    """Merges four arrays of codes to bytes, the first in the low bits."""
    return codes[0] | codes[1] << np.uint8(2) | codes[2] << np.uint8(4) | codes[3] << np.uint8(6)


def _weight(plane: Any, scale: Any, dtype: Any) -> QTensor:
    return QTensor((plane,), scale, scheme=_TERNARY, axis=-2, dtype=np.dtype(dtype), activations=_ACTIVATIONS)
