"""Opens GGUF files, version 2 and 3, of either byte order, whole or split: metadata, and tensors as blocks of bytes.

    file = open_gguf(path)
    file.metadata["llama.block_count"]                 # 30
    file.tensors["blk.0.attn_q.weight"].kind.name      # Q4_1
    file.blocks("blk.0.attn_q.weight")                 # uint8 [576, 360], in the file's own memory

Format: `docs/gguf.md` of ggml, as llama.cpp's `gguf.cpp` and `gguf-split` interpret it. Every length and offset in the
file is checked against the file's size before it is used. Files are mapped, so they open fast. As with every mapped
file, the process dies if another process truncates the file while it is being read.
"""

import dataclasses
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llamajax.checkpoint.gguf.blocks import Tensor, turned
from llamajax.checkpoint.gguf.header import MAGICS, Header, HeaderReader, is_whole
from llamajax.errors import LlamaJaxError
from llamajax.files import open_regular, shortened

_MOST_PARTS = 1 << 10
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A file, or all parts of a split file, whose header was read and checked.

    Attributes:
        path: path of the file; of the first part, if it is split.
        version: version of the format.
        byteorder: "little" or "big".
        metadata: every key except those of splitting. Values are int, float, bool, str, a NumPy array of numbers or
            bools, a list of str, or a list of arrays and lists.
        tensors: by name, in the order of the file.
        maps: each part, mapped.
    """

    path: Path
    version: int
    byteorder: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    maps: tuple[mmap.mmap, ...]

    def blocks(self, name: str) -> np.ndarray:
        """Returns the bytes of a tensor, uint8 [rows, bytes of a row]; numbers in them are always little-endian.

        The result is a view of the mapped file, or a copy if the file is big-endian.

        Raises:
            LlamaJaxError: for a type whose big-endian form is undefined.
        """
        tensor = self.tensors[name]
        data = np.frombuffer(self.maps[tensor.file], np.uint8, tensor.nbytes, tensor.start)
        blocks = data.reshape(-1, tensor.row_bytes) if tensor.nbytes else data.reshape(0, tensor.row_bytes)
        if self.byteorder == "little":
            return blocks
        made = turned(blocks, tensor.kind)
        if made is None:
            raise LlamaJaxError(
                f"{self.path}: {shortened(name)} is of type {tensor.kind.name} in a big-endian file, which ggml "
                "does not define: expected a little-endian file"
            )
        return made

    def release(self, name: str) -> None:
        """Releases the memory of the pages that hold a tensor's bytes; the bytes may be read again."""
        tensor = self.tensors[name]
        start = -(-tensor.start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.maps[tensor.file].madvise(mmap.MADV_DONTNEED, start, length)


def is_gguf(path: Path) -> bool:
    """Whether a file begins with the magic number of GGUF."""
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(4) in MAGICS


def open_gguf(path: str | Path) -> Gguf:
    """Reads the header of a file; if it is a part of a split file, reads the headers of all parts.

    Raises:
        LlamaJaxError: for a damaged file, an unknown version or tensor type, or parts that do not belong together.
    """
    path = Path(path)
    part = HeaderReader(path).read()
    count = part.metadata.get("split.count", 0)
    if is_whole(count) and count <= 1:
        _check_whole(path, part)
        return _joined([part])
    paths = _paths_of_parts(path, count)
    parts = [part if each == path else _part(each) for each in paths]
    for number, (each, part) in enumerate(zip(paths, parts, strict=True)):
        said = tuple(part.metadata.get(f"split.{key}") for key in ("no", "count"))
        if said != (number, count):
            raise LlamaJaxError(
                f"{each}: its metadata says part {shortened(said)}: expected {(number, count)} by its name"
            )
        if part.byteorder != parts[0].byteorder:
            raise LlamaJaxError(f"{each}: its byte order differs from that of {paths[0]}: they do not belong together")
    return _joined(parts)


def _check_whole(path: Path, part: Header) -> None:
    """Checks that a file that is not split has part number 0."""
    if part.metadata.get("split.no", 0) != 0:
        raise LlamaJaxError(f"{path}: split.no is {shortened(part.metadata['split.no'])} in the only part: expected 0")


def _paths_of_parts(path: Path, count: Any) -> list[Path]:
    """Returns the paths of all parts of a split file, by the name of one part."""
    if not is_whole(count) or not 1 < count <= _MOST_PARTS:
        raise LlamaJaxError(f"{path}: split.count is {shortened(count)}: expected a number from 1 to {_MOST_PARTS}")
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise LlamaJaxError(
            f"{path}: one of {count} parts, which are found by name: expected a name such as "
            f"model-00001-of-{count:05}.gguf: restore the name under which it was published"
        )
    paths = [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [each for each in paths if not each.is_file()]
    if missing:
        raise LlamaJaxError(
            f"{missing[0]}: no such file: {path.name} is one of {count} parts ({len(missing)} missing): put them into "
            "one folder"
        )
    return paths


def _part(path: Path) -> Header:
    if not is_gguf(path):
        raise LlamaJaxError(f"{path}: not a GGUF file: expected a part of a split GGUF file")
    return HeaderReader(path).read()


def _joined(parts: list[Header]) -> Gguf:
    """Joins parts to one file: the metadata of the first part, the tensors of all."""
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise LlamaJaxError(f"{part.path}: tensor {shortened(name)} is in two parts: expected it in one")
            tensors[name] = dataclasses.replace(tensor, file=number)
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if not is_whole(expected) or expected != len(tensors):
        raise LlamaJaxError(
            f"{parts[0].path}: split.tensors.count is {shortened(expected)}: expected {len(tensors)}, the tensors of "
            "all parts: they do not belong together"
        )
    metadata = {key: value for key, value in parts[0].metadata.items() if not key.startswith("split.")}
    first, mapped = parts[0], tuple(part.map for part in parts)
    return Gguf(first.path, first.version, first.byteorder, metadata, tensors, mapped)
