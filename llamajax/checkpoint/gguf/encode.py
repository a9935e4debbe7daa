"""Encodes the header of a GGUF file, version 3, little-endian, and computes the offset of each tensor.

Format: `docs/gguf.md` of ggml.
"""

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llamajax.checkpoint.gguf.header import ALIGNMENT, ARRAY, BOOL, NUMBERS, STRING

_VERSION = 3
# The type's number and `struct` format of each numeric type, by NumPy's name.
_NUMBERS = {np.dtype(name).name: (number, letter) for number, (letter, name) in NUMBERS.items()} | {"bool": (BOOL, "?")}


class Entry(NamedTuple):
    """A tensor's entry in the header.

    Attributes:
        name: name in the file.
        number: number of its type.
        shape: rows first, as in NumPy; the file has the axes in reverse order.
        nbytes: number of bytes of its data.
    """

    name: str
    number: int
    shape: tuple[int, ...]
    nbytes: int


def header(metadata: Mapping[str, Any], entries: Sequence[Entry]) -> bytes:
    """Encodes everything before the data of the first tensor, including the padding.

    Args:
        metadata: values are bool, int, float, str, NumPy arrays of numbers, and lists or tuples of one of these types.
            As llama.cpp expects, an int becomes uint32 (uint64 if it is too large, int32 if it is negative), ints in a
            list become int32, and floats become float32.
        entries: in the order of their data.

    Raises:
        ValueError: for a value of another type, or out of range.
    """
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(entries), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), _value(key, value)]
    for entry, offset in zip(entries, offsets(entries), strict=True):
        parts += [_text(entry.name), struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *entry.shape[::-1])]
        parts.append(struct.pack("<IQ", entry.number, offset))
    whole = b"".join(parts)
    return whole + bytes(padding(len(whole)))


def offsets(entries: Iterable[Entry]) -> list[int]:
    """Returns the offset of each tensor's data from that of the first."""
    found, at = [], 0
    for entry in entries:
        found.append(at)
        at += entry.nbytes + padding(entry.nbytes)
    return found


def padding(size: int) -> int:
    """Returns the number of padding bytes behind data of a size."""
    return -size % ALIGNMENT


def _text(text: str | bytes) -> bytes:
    data = text.encode("utf-8") if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """Encodes a value, with its type in front."""
    try:
        if isinstance(value, np.ndarray | list | tuple):
            return struct.pack("<I", ARRAY) + _elements(value)
        if isinstance(value, str | bytes):
            return struct.pack("<I", STRING) + _text(value)
        number, form = _NUMBERS[_scalar_type(value)]
        return struct.pack(f"<I{form}", number, value)
    except (KeyError, struct.error, OverflowError, UnicodeEncodeError) as error:
        raise ValueError(f"{key}: {str(error)[:100]}: expected a value that GGUF can hold") from None


def _scalar_type(value: Any) -> str:
    if isinstance(value, np.generic):
        return value.dtype.name
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return ("uint32" if value < 1 << 32 else "uint64") if value >= 0 else "int32"
    if isinstance(value, float):
        if not math.isinf(value) and abs(value) > float(np.finfo(np.float32).max):
            raise OverflowError(f"{value} is above the range of float32")
        return "float32"
    raise KeyError(type(value).__name__)


def _elements(values: Any) -> bytes:
    """Encodes the elements of an array, with their type and number in front."""
    if isinstance(values, np.ndarray):
        number, _ = _NUMBERS[values.dtype.name]
        return struct.pack("<IQ", number, values.size) + values.astype(values.dtype.newbyteorder("<")).tobytes()
    if all(isinstance(value, str | bytes) for value in values):
        return struct.pack("<IQ", STRING, len(values)) + b"".join(map(_text, values))
    if all(isinstance(value, bool) for value in values):
        return _elements(np.array(values, bool))
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return _elements(np.array(values, np.int32))
    if all(isinstance(value, float) for value in values):
        return _elements(np.array(values, np.float32))
    raise KeyError("elements of several types")
