"""Finds the ggml type that holds a weight without loss, or the nearest one."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from quant.description import schemes
from quant.ggml_types import TYPES, Packed, Type, abstract, named, transposed
from quant.mixed import kind_of
from quant.qtensor import QTensor

_FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# By kind and bits of the codes: the types for rows of a multiple of 256, and for other rows of a multiple of 32.
_NEAREST = {
    **{("int", 2): ("Q2_K", "Q4_0"), ("int", 3): ("Q3_K", "Q4_0"), ("int", 4): ("Q4_0", "Q4_0")},
    **{("int", 5): ("Q5_0", "Q5_0"), ("int", 6): ("Q6_K", "Q8_0"), ("int", 8): ("Q8_0", "Q8_0")},
    **{("uint", 2): ("Q2_K", "Q4_1"), ("uint", 3): ("Q3_K", "Q4_1"), ("uint", 4): ("Q4_1", "Q4_1")},
    **{("uint", 5): ("Q5_1", "Q5_1"), ("uint", 6): ("Q6_K", "Q8_0"), ("uint", 8): ("Q8_0", "Q8_0")},
    **{("ternary", 2): ("TQ2_0", "Q4_0"), ("nf4", 4): ("IQ4_NL", "IQ4_NL"), ("iq4_nl", 4): ("IQ4_NL", "IQ4_NL")},
    **{("mxfp4", 4): ("MXFP4", "MXFP4"), ("nvfp4", 4): ("NVFP4", "MXFP4")},
}
_TERNARY_BLOCK = 256
_TWO_LEVELS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K"}


def type_of(weight: Any) -> Type | None:
    """Returns the type that holds a weight without loss, with all its codes and scales.

    A type holds scales in float32 or bfloat16 if float16 represents all of them exactly, and zero points if an offset
    represents them exactly. Only values show this: for an abstract weight of that kind the result is None. ggml's types
    do not store `activations`, which is ignored.

    Args:
        weight: an array or a QTensor [..., M, K] or [..., K, M]; arrays may be abstract.

    Returns:
        The type, or None if there is none.
    """
    if not isinstance(weight, QTensor):
        name = _FLOATS.get(np.dtype(weight.dtype).name) if hasattr(weight, "dtype") else None
        return named(name) if name is not None and not hasattr(weight, "planes") else None
    same = _plain(weight)
    for kind in TYPES.values():
        if kind.packed is None or not kind.packed.returns or weight.shape[weight.axis] % kind.block:
            continue
        if kind.packed.scheme == weight.scheme.name and _kind(same) == _kind(_form(kind, weight)):
            return kind
    return None


def nearest(weight: Any) -> Type:
    """Returns the nearest type for a weight: with as many bits if there is one, else the next larger.

    Args:
        weight: see `type_of`.
    """
    found = type_of(weight)
    if found is not None:
        return found
    if not isinstance(weight, QTensor):
        return named("F32")
    length = weight.shape[weight.axis]
    if length % 32:
        return named("F16")
    scheme = weight.scheme
    # For int codes in groups of 32, types with one level of scales are nearer: they hold the same codes.
    if isinstance(weight.scale, QTensor) and scheme.kind != "int" and scheme.bits in _TWO_LEVELS and length % 256 == 0:
        return named(_TWO_LEVELS[scheme.bits])
    best, otherwise = map(named, _NEAREST[scheme.kind, scheme.bits])
    return best if length % best.block == 0 else otherwise


def holder(weight: Any) -> Type:
    """Returns `type_of(weight)`.

    Raises:
        ValueError: if there is none; the message describes the weight and names the nearest type.
    """
    found = type_of(weight)
    if found is None:
        raise ValueError(f"{described(weight)}: no ggml type holds it; the nearest is {explained(nearest(weight))}")
    return found


def described(weight: Any) -> str:
    """Describes a weight, with properties that ggml may lack: "int4, groups of 128, scales in bfloat16, 8 outliers"."""
    said = schemes(weight)[:1]
    if isinstance(weight, QTensor):
        scale = weight.scale
        if scale.shape[-2:] == (1, 1):
            dtype = scale.scheme.name if isinstance(scale, QTensor) else np.dtype(scale.dtype).name
            said = [weight.scheme.name, f"one scale, in {dtype}"]
        elif not isinstance(scale, QTensor):
            said.append(f"scales in {np.dtype(scale.dtype).name}")
        elif scale.scale.shape[scale.axis] == 1:
            said[0] += " under one float for an output"
        said += ["zero points"] if weight.zero is not None else []
        said += ["an order of its channels"] if weight.order is not None else []
        said += [f"{weight.outlier.shape[weight.axis]} outliers"] if weight.outlier is not None else []
        said += [f"rows of {weight.shape[weight.axis]}"] if weight.shape[weight.axis] % 32 else []
    return ", ".join(said)


def explained(kind: Type) -> str:
    """Describes a type: "Q4_0 (int4, groups of 32, scales in float16)"."""
    packed = kind.packed
    if packed is None:
        return kind.name
    form = abstract(kind, (1, kind.block))
    offset = " and offsets" if packed.offset else ""
    return (
        f"{kind.name} ({packed.scheme}, groups of {form.group_size}, scales{offset} in "
        f"{packed.second or packed.scale_dtype})"
    )


def fitted(weight: QTensor, kind: Type) -> dict[str, np.ndarray]:
    """Returns the parts of a weight by name, as NumPy arrays of a type's dtypes.

    Raises:
        ValueError: if the type cannot hold the weight, or its `axis` is not -1.
    """
    if weight.axis != -1:
        raise ValueError(f"a weight with axis {weight.axis}: expected -1, as ggml has them; use `transposed`")
    same = _plain(weight)
    if weight.shape[-1] % kind.block or _kind(same) != _kind(_form(kind, weight)):
        raise ValueError(f"{described(weight)}: expected what {explained(kind)} holds")
    assert kind.packed is not None
    return {name: np.asarray(part) for name, part in _parts(same, kind.packed).items()}


def _parts(weight: QTensor, packed: Packed) -> dict[str, Any]:
    """Returns the arrays of a weight by their names in FORMAT.md."""

    def find(name: str) -> Any:
        at: Any = weight
        for step in name.split("."):
            at = at[int(step)] if step.isdigit() else getattr(at, step)
        return at

    return {name: find(name) for name in packed.widths}


def _form(kind: Type, weight: QTensor) -> QTensor:
    """Returns a type's abstract weight for the shape and the axis of a weight."""
    shape = weight.shape if weight.axis == -1 else (*weight.shape[:-2], weight.shape[-1], weight.shape[-2])
    form = abstract(kind, shape)
    return form if weight.axis == -1 else transposed(form)


def _kind(weight: QTensor) -> Any:
    """Returns `kind_of` without the fields `dtype` and `activations`."""
    return kind_of(_bare(weight))


def _bare(weight: Any) -> Any:
    """Sets `dtype` to float32 and `activations` to None, in both levels of a weight."""
    if not isinstance(weight, QTensor):
        return weight
    scale, offset = _bare(weight.scale), _bare(weight.offset)
    return dataclasses.replace(weight, scale=scale, offset=offset, dtype=np.dtype("float32"), activations=None)


def _plain(weight: QTensor) -> QTensor:
    """Converts scales to float16, and zero points to offsets, where that represents all of them exactly."""
    if weight.scheme.kind == "ternary":
        weight = _in_blocks(weight)
    scale, offset = _half(weight.scale), _half(weight.offset)
    if weight.zero is None or not _is_concrete(weight.zero) or not _is_concrete(weight.scale):
        return dataclasses.replace(weight, scale=scale, offset=offset)
    if weight.scheme.kind != "uint" or isinstance(weight.scale, QTensor) or weight.offset is not None:
        return weight
    # Products of a float16 with a code, or with a uint8 zero point, are exact in float32.
    exact = np.asarray(weight.zero).dtype == np.uint8
    shifted = -(np.asarray(weight.zero, np.float32) * np.asarray(weight.scale, np.float32))
    half = _half(np.where(shifted == 0, np.float32(0), shifted))
    if not exact or half.dtype != np.float16 or scale.dtype != np.float16:
        return dataclasses.replace(weight, scale=scale)
    return dataclasses.replace(weight, scale=scale, zero=None, offset=half)


def _in_blocks(weight: QTensor) -> QTensor:
    """Converts ternary codes with one scale per tensor (BitNet) to TQ2_0's groups of 256, which repeat the scale."""
    axis, length = weight.axis, weight.shape[weight.axis]
    one = not isinstance(weight.scale, QTensor) and tuple(weight.scale.shape[-2:]) == (1, 1)
    if not one or length % _TERNARY_BLOCK or not _is_concrete(weight.planes[0]) or not _is_concrete(weight.scale):
        return weight
    plane = np.moveaxis(np.asarray(weight.planes[0]), axis, -1)
    codes = np.concatenate([plane >> np.uint8(shift) & np.uint8(3) for shift in (0, 2, 4, 6)], axis=-1)
    runs = codes.reshape(*codes.shape[:-1], -1, 4, _TERNARY_BLOCK // 4)
    packed = functools.reduce(np.bitwise_or, (runs[..., slot, :] << np.uint8(2 * slot) for slot in range(4)))
    shape = list(weight.shape)
    shape[axis] = length // _TERNARY_BLOCK
    planes: Any = (np.ascontiguousarray(np.moveaxis(packed.reshape(plane.shape), -1, axis)),)
    scale: Any = np.broadcast_to(np.asarray(weight.scale), tuple(shape))
    return dataclasses.replace(weight, planes=planes, scale=scale)


def _half(plane: Any) -> Any:
    """Converts float32 and bfloat16 to float16 if that is exact; returns others unchanged."""
    if isinstance(plane, QTensor):
        return dataclasses.replace(plane, scale=_half(plane.scale))
    if plane is None or not _is_concrete(plane) or np.dtype(plane.dtype).name not in ("float32", "bfloat16"):
        return plane
    wide = np.asarray(plane).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        half = wide.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32).view(np.uint32), wide.view(np.uint32)) else plane


def _is_concrete(plane: Any) -> bool:
    """Whether an array has values, so is neither abstract nor traced."""
    return not any(isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) for leaf in jax.tree.leaves(plane))
