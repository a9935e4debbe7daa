"""Descriptions of weights in files: shapes, dtypes and schemes as JSON, and the abstract weights that they describe."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from quant.mixed import Mixed
from quant.qtensor import QTensor
from quant.scheme import Scheme
from quant.weight import is_weight

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
_PART_DTYPES = (*WEIGHT_DTYPES, "uint8", "int32")
_PARTS = ("scale", "zero", "offset", "order", "outlier", "outlier_index")
_LARGEST_AXIS = 1 << 40


def describe(weight: Any) -> dict[str, Any]:
    """Describes a weight of one type: shape and dtype of an array; scheme, axis, dtype and parts of a `QTensor`.

    Raises:
        ValueError: for a weight of several types, or one that is laid out for a backend.
    """
    if isinstance(weight, QTensor):
        parts = {name: getattr(weight, name) for name in _PARTS}
        return {
            "scheme": weight.scheme.name,
            "axis": weight.axis,
            "dtype": str(weight.dtype),
            **({"activations": weight.activations} if weight.activations else {}),
            "planes": [describe(plane) for plane in weight.planes],
            **{name: describe(part) for name, part in parts.items() if part is not None},
        }
    if is_weight(weight):
        raise ValueError(f"a {type(weight).__name__} of shape {weight.shape}: expected an array or a QTensor")
    return {"shape": list(weight.shape), "dtype": str(np.dtype(weight.dtype))}


def abstract_weight(entry: Mapping[str, Any], level: int = 0) -> Any:
    """Undoes `describe`, with `jax.ShapeDtypeStruct` for arrays.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError: for entries that `describe` does not write.
    """
    if "scheme" not in entry:
        if entry["dtype"] not in (WEIGHT_DTYPES if level == 0 else _PART_DTYPES) or set(entry) != {"shape", "dtype"}:
            raise ValueError(f"dtype {str(entry['dtype'])[:40]!r}: expected one of {', '.join(WEIGHT_DTYPES)}")
        if not all(isinstance(size, int) and 0 < size < _LARGEST_AXIS for size in entry["shape"]):
            raise ValueError(f"shape {str(entry['shape'])[:80]}: expected positive integers")
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])
    unknown = set(entry) - {"scheme", "axis", "dtype", "activations", "planes", *_PARTS}
    if unknown or level > 1 or entry["dtype"] not in WEIGHT_DTYPES:
        raise ValueError("expected a scheme, axis, dtype, planes and scales, in at most two levels")
    parts = {name: abstract_weight(entry[name], level + 1) for name in _PARTS if name in entry}
    planes = tuple(abstract_weight(plane, level + 1) for plane in entry["planes"])
    static = {"scheme": Scheme.named(entry["scheme"]), "axis": entry["axis"], "dtype": np.dtype(entry["dtype"])}
    return QTensor(planes, **parts, **static, activations=entry.get("activations")).validate()


def schemes(weight: Any) -> list[str]:
    """Describes a weight for messages: "int4, groups of 32, scales in int8", or a dtype.

    The list has several entries if the layers differ.
    """
    if isinstance(weight, Mixed):
        return list(dict.fromkeys(scheme for stack in weight.stacks for scheme in schemes(stack)))
    if is_weight(weight):
        scheme = getattr(weight, "scheme", None)
        name = f"{scheme.name}, " if scheme is not None else ""
        scales = _scale_scheme(weight)
        levels = f", scales in {scales}" if scales else ""
        return [f"{name}groups of {weight.group_size}{levels}" + ("" if isinstance(weight, QTensor) else ", laid out")]
    return [str(np.dtype(weight.dtype))]


def kinds(weight: Any) -> list[str]:
    """Names all that determines a product, shorter than `schemes`: "int4-g32", "int8-g32 + 4 outliers x int8-token"."""
    if isinstance(weight, Mixed):
        return list(dict.fromkeys(kind for stack in weight.stacks for kind in kinds(stack)))
    if not isinstance(weight, QTensor):
        return [str(np.dtype(weight.dtype))]
    outliers = f" + {weight.outlier.shape[weight.axis]} outliers" if weight.outlier is not None else ""
    activations = f" x {weight.activations}" if weight.activations else ""
    levels = f"-{_scale_scheme(weight)}" if _scale_scheme(weight) else ""
    return [f"{weight.scheme.name}-g{weight.group_size}{levels}{outliers}{activations}"]


def _scale_scheme(weight: Any) -> str | None:
    """Returns the name of the scheme of quantized scales, or None."""
    scale = weight.scale if isinstance(weight, QTensor) else None
    return scale.scheme.name if isinstance(scale, QTensor) else None
