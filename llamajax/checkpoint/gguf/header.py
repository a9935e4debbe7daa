"""Reads the header of one GGUF file. Each length and offset in it is checked before it is used."""

import dataclasses
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llamajax.checkpoint.gguf.blocks import Tensor
from llamajax.errors import LlamaJaxError
from llamajax.files import open_regular, shortened
from quant import ggml

# gguf-py's converter of byte orders writes "FUGG" at the head of big-endian files; other big-endian files have "GGUF".
MAGICS = (b"GGUF", b"FUGG")
VERSIONS = (2, 3)

# Gemma 3 has the largest vocabulary in use: 777,000 strings, 9 MB. A string takes more memory than its bytes.
_MOST_STRINGS = 1 << 21
_LARGEST_METADATA = 1 << 26  # a character may take 4 bytes in memory
_LONGEST_NAME = 1024  # ggml's own limit is 63
_MOST_TENSORS = 1 << 16  # the limit for keys as well
_LARGEST_ALIGNMENT = 1 << 16
_DEEPEST_ARRAY = 4

# By the number of a value's type: `struct`'s letter, and NumPy's name without byte order.
NUMBERS = {
    **{0: ("B", "u1"), 1: ("b", "i1"), 2: ("H", "u2"), 3: ("h", "i2"), 4: ("I", "u4"), 5: ("i", "i4")},
    **{6: ("f", "f4"), 10: ("Q", "u8"), 11: ("q", "i8"), 12: ("d", "f8")},
}
BOOL, STRING, ARRAY = 7, 8, 9
ALIGNMENT = 32  # unless `general.alignment` says another


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of one file.

    Attributes:
        path: path of the file.
        version: version of the format.
        byteorder: "little" or "big".
        metadata: every key. Values are int, float, bool, str, a NumPy array of numbers or bools, a list of str, or a
            list of arrays and lists.
        tensors: by name, in the order of the file.
        map: the whole file, mapped.
    """

    path: Path
    version: int
    byteorder: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    map: mmap.mmap


class HeaderReader:
    """Reads one file sequentially from its beginning."""

    def __init__(self, path: Path):
        """Maps the file; checks magic number and version."""
        self.path = path
        with open_regular(path) as file:
            head = file.read(24)
            if len(head) < 24 or head[:4] not in MAGICS:
                raise LlamaJaxError(f"{path}: {len(head)} bytes: expected a GGUF file, of at least 24 bytes")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.size = len(self.map)
        # The byte order is the one in which the version is a small number.
        self.order = "<" if head[4:6] != b"\0\0" else ">"
        (self.version,) = struct.unpack_from(f"{self.order}I", head, 4)
        if self.version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            remedy = ": convert it with llama.cpp of 2023, or use a newer file" if self.version == 1 else ""
            raise LlamaJaxError(
                f"{path}: GGUF version {self.version}, which is not supported: expected version {known}{remedy}"
            )
        self.at = 8
        self.strings = 0
        self.long = struct.Struct(f"{self.order}Q")
        self.window = memoryview(self.map)[: min(self.size, _LARGEST_METADATA)]

    def read(self) -> Header:
        """Reads the header, including the offsets of tensors.

        Raises:
            LlamaJaxError: for anything that violates the format.
        """
        try:
            return self._read()
        except (struct.error, IndexError):
            if self.size > _LARGEST_METADATA:
                self.fail(f"more than {_LARGEST_METADATA} bytes of metadata")
            self.fail("it ends within its header: truncated or damaged")

    def _read(self) -> Header:
        num_tensors, num_keys = self.long_number(), self.long_number()
        # A key takes 13 bytes at least, a tensor 33.
        if num_keys * 13 + num_tensors * 33 > self.size or max(num_keys, num_tensors) > _MOST_TENSORS:
            self.fail(f"{num_tensors} tensors and {num_keys} keys in {self.size} bytes: expected fewer: it is damaged")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.name("key")
            if key in metadata:
                self.fail(f"key {shortened(key)} occurs twice: expected it once")
            metadata[key] = self.value(key, self.number("I"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not is_whole(alignment) or not 0 < alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
            self.fail(
                f"general.alignment is {shortened(alignment)}: expected a power of two, {_LARGEST_ALIGNMENT} at most"
            )
        found = [self.tensor() for _ in range(num_tensors)]
        start = -(-self.at // alignment) * alignment
        tensors = self.placed(found, start, alignment)
        order = "little" if self.order == "<" else "big"
        return Header(self.path, self.version, order, metadata, tensors, self.map)

    def fail(self, what: str) -> NoReturn:
        """Raises an error that names the file."""
        raise LlamaJaxError(f"{self.path}: {what}")

    # ---- Values ------------------------------------------------------------------------------------------------------

    def number(self, letter: str) -> Any:
        """Reads a number, of the type of one of `struct`'s letters."""
        kind = f"{self.order}{letter}"
        (value,) = struct.unpack_from(kind, self.window, self.at)
        self.at += struct.calcsize(kind)
        # Gives 1e-05 rather than 9.999999747378752e-06, which is the same in float32.
        return float(str(np.float32(value))) if letter == "f" else value

    def long_number(self) -> int:
        """Reads a length or count."""
        (value,) = self.long.unpack_from(self.window, self.at)
        self.at += 8
        return value

    def raw(self, length: int, what: str) -> bytes:
        """Reads bytes."""
        if length > len(self.window) - self.at:
            self.fail(f"{what} has {length} bytes, {len(self.window) - self.at} are left: truncated or damaged")
        self.at += length
        return bytes(self.window[self.at - length : self.at])

    def name(self, what: str) -> str:
        """Reads the name of a key or tensor."""
        length = self.long_number()
        if not 0 < length <= _LONGEST_NAME:
            self.fail(f"a {what}'s name has {length} bytes: expected 1 to {_LONGEST_NAME}: it is damaged")
        data = self.raw(length, f"a {what}'s name")
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} {shortened(data)}: expected UTF-8 text: it is damaged")

    def value(self, key: str, kind: int, depth: int = 0) -> Any:
        """Reads a value, whose type is given by its number."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind][0])
        if kind == BOOL:
            value = self.number("B")
            if value > 1:
                self.fail(f"{shortened(key)} is a bool of {value}: expected 0 or 1: it is damaged")
            return bool(value)
        if kind == STRING:
            return self.text(key, self.raw(self.long_number(), shortened(key)))
        if kind == ARRAY:
            return self.array(key, depth + 1)
        self.fail(f"{shortened(key)} is of type {kind}: expected one from 0 to 12: it is damaged")

    def text(self, key: str, data: bytes) -> str:
        """Decodes a string. Bytes that are not UTF-8 are an error in the tokenizer's keys, and replaced elsewhere."""
        try:
            return data.decode("utf-8", "strict" if key.startswith("tokenizer.") else "replace")
        except UnicodeDecodeError as error:
            self.fail(f"{shortened(key)} is {shortened(data)}: expected UTF-8 text ({error.reason} at {error.start})")

    def array(self, key: str, depth: int) -> Any:
        """Reads an array."""
        kind, count = self.number("I"), self.long_number()
        left = len(self.window) - self.at
        if depth > _DEEPEST_ARRAY:
            self.fail(f"{shortened(key)}: arrays in arrays, {depth} deep: expected {_DEEPEST_ARRAY} at most")
        size = {BOOL: 1, STRING: 8, ARRAY: 12}.get(kind) or np.dtype(NUMBERS.get(kind, ("", "u1"))[1]).itemsize
        if count * size > left:
            self.fail(f"{shortened(key)} has {count} elements, {left} bytes are left: truncated or damaged")
        if kind == STRING:
            return self.texts(key, count)
        if kind == ARRAY:
            self.count_strings(key, count)  # an inner array takes as much memory as a string
            return [self.array(key, depth + 1) for _ in range(count)]
        if kind != BOOL and kind not in NUMBERS:
            self.fail(f"{shortened(key)} has elements of type {kind}: expected one from 0 to 12: it is damaged")
        stored = np.dtype("u1" if kind == BOOL else self.order + NUMBERS[kind][1])
        values = np.frombuffer(self.raw(count * size, shortened(key)), stored)
        if kind == BOOL:
            if count and values.max() > 1:
                self.fail(f"{shortened(key)} has bools of {values.max()}: expected 0 or 1: it is damaged")
            return values.astype(bool)
        return values.astype(stored.newbyteorder("="), copy=False)

    def count_strings(self, key: str, count: int) -> None:
        """Refuses more strings than any vocabulary has."""
        self.strings += count
        if self.strings > _MOST_STRINGS:
            self.fail(f"{shortened(key)}: {self.strings} strings: expected at most {_MOST_STRINGS}")

    def texts(self, key: str, count: int) -> list[str]:
        """Reads strings. They are most of a header, so that the loop does as little as possible."""
        self.count_strings(key, count)
        window, unpack, at = self.window, self.long.unpack_from, self.at
        found: list[str] = []
        append = found.append
        try:
            for _ in range(count):
                (length,) = unpack(window, at)
                end = at + 8 + length
                append(str(window[at + 8 : end], "utf-8"))
                at = end
        except UnicodeDecodeError as error:
            self.fail(
                f"{shortened(key)}: element {len(found)} is {shortened(error.object)}: expected UTF-8 text "
                f"({error.reason} at {error.start})"
            )
        if at > len(window):
            self.fail(f"{shortened(key)} ends {at - len(window)} bytes behind the file: truncated or damaged")
        self.at = at
        return found

    # ---- Tensors -----------------------------------------------------------------------------------------------------

    def tensor(self) -> Tensor:
        """Reads a tensor's description, with `start` relative to the first byte of all tensors."""
        name = self.name("tensor")
        rank = self.number("I")
        if not 1 <= rank <= 4:
            self.fail(f"tensor {shortened(name)} has {rank} axes: expected 1 to 4: it is damaged")
        sizes = struct.unpack_from(f"{self.order}{rank}Q", self.window, self.at)
        self.at += 8 * rank
        kind, offset = self.number("I"), self.long_number()
        try:
            return Tensor(name, ggml.named(kind), sizes[::-1], 0, offset)
        except ValueError as error:
            self.fail(f"tensor {shortened(name)}: {error}")

    def placed(self, tensors: list[Tensor], start: int, alignment: int) -> dict[str, Tensor]:
        """Returns the tensors by name, after checking that each lies inside the file and does not overlap another."""
        found: dict[str, Tensor] = {}
        for tensor in tensors:
            name, kind = shortened(tensor.name), tensor.kind
            if tensor.name in found:
                self.fail(f"tensor {name} occurs twice: expected it once")
            if tensor.shape[-1] % kind.block:
                self.fail(
                    f"tensor {name} has rows of {tensor.shape[-1]} in {kind.name}: expected a multiple of {kind.block}"
                )
            if tensor.start % alignment:
                self.fail(f"tensor {name} is at {tensor.start}: expected a multiple of the alignment, {alignment}")
            end = start + tensor.start + tensor.nbytes
            if end > self.size:
                self.fail(f"tensor {name} ends at byte {end} of {self.size}: the file is truncated or damaged")
            found[tensor.name] = dataclasses.replace(tensor, start=start + tensor.start)
        by_place = sorted((tensor for tensor in found.values() if tensor.nbytes), key=lambda tensor: tensor.start)
        for one, other in zip(by_place, by_place[1:], strict=False):
            if one.start + one.nbytes > other.start:
                self.fail(f"tensors {shortened(one.name)} and {shortened(other.name)} overlap: the file is damaged")
        return found


def is_whole(value: Any) -> bool:
    """Whether a metadata value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)
