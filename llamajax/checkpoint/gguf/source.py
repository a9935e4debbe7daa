"""Reads a GGUF file as a `Source`: types that quant/FORMAT.md covers stay packed, with codes and scales unchanged.

Rows of query and key projections whose RoPE coordinates are neighbours are reordered, packed or not: no block extends
over several rows.
"""

import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llamajax.checkpoint.gguf.blocks import Tensor
from llamajax.checkpoint.gguf.config import check_quantization, config_of, sampling_of, unknown_keys
from llamajax.checkpoint.gguf.container import Gguf, is_gguf, open_gguf
from llamajax.checkpoint.gguf.names import UNUSED, architecture_of, row_orders
from llamajax.checkpoint.gguf.rope import TENSORS, read_tensors
from llamajax.checkpoint.gguf.words import words_of
from llamajax.checkpoint.source import Source, Stored
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families import pieces, shape_of, tensors
from llamajax.families.family import format_of
from llamajax.files import shortened
from llamajax.parameters import Place, specs
from llamajax.workers import workers
from quant import bitnet, ggml

_MOST_THREADS = 8
EMBEDDING = "token_embd.weight"


def recognise(path: Path) -> bool:
    """Whether a file is GGUF, whatever its name."""
    return is_gguf(path)


def open_source(path: Path, ignore_keys: Collection[str] = ()) -> Source:
    """Reads the header of a model.

    Args:
        path: the file, or one part of a split file.
        ignore_keys: metadata keys to ignore.

    Raises:
        LlamaJaxError: for a damaged file, a file without a supported language model, unsupported metadata, or tensors
            that are not those of the model.
    """
    file = open_gguf(path)
    metadata = {key: value for key, value in file.metadata.items() if key not in ignore_keys}
    architecture = architecture_of(path, file.metadata)
    if "general.architecture" in ignore_keys:
        raise LlamaJaxError("'general.architecture' cannot be ignored: the architecture depends on it")
    check_quantization(path, metadata)
    config, notes = _config(path, file, architecture, ignore_keys)
    unused = _check_tensors(path, file, config)
    reader = _Reader(path, file, config)
    sampling, not_done = sampling_of(path, metadata)
    words = words_of(path, metadata, config.vocab_size, sampling)
    notes += not_done
    unknown = unknown_keys(metadata, architecture, words.consumed)
    if unknown:
        notes.append(f"{path}: unknown keys, not read: {', '.join(map(shortened, unknown[:8]))}{_more(unknown, 8)}")
    if unused:
        notes.append(f"{path}: tensors without effect, not read: {', '.join(unused[:3])}{_more(unused, 3)}")
    expanded = reader.expanded()
    if expanded:
        notes.append(f"{path}: {expanded} are read as floats: llamajax quantize packs them")
    return Source(
        _description(file, config),
        config,
        reader.abstract,
        tuple(sorted(reader.parts, key=lambda place: reader.parts[place].start)),
        reader.read,
        reader.fill,
        tokenizer_bytes=words.tokenizer_bytes,
        tokenizer_problem=words.problem,
        words=words.words,
        notes=tuple(notes),
        expanded=expanded,
        stored={place: Stored(part.kind.name, part.nbytes) for place, part in reader.parts.items()},
        metadata=file.metadata,
    )


def _more(names: Sequence[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _description(file: Gguf, config: Config) -> str:
    """Describes version and types, the most frequent type first."""
    types = [file.tensors[name].kind.name for name in tensors(config, "gguf")]
    counts = sorted({name: types.count(name) for name in types}.items(), key=lambda item: -item[1])
    parts = f", {len(file.maps)} parts" if len(file.maps) > 1 else ""
    order = "" if file.byteorder == "little" else ", big-endian"
    return f"GGUF version {file.version}{order}{parts} ({', '.join(f'{count} {name}' for name, count in counts)})"


def _config(path: Path, file: Gguf, architecture: str, ignore_keys: Collection[str]) -> tuple[Config, list[str]]:
    """Reads the config from metadata and RoPE tensors; also returns notes."""
    if not file.tensors:
        raise LlamaJaxError(f"{path}: holds a vocabulary and no tensors: give the file of the model itself")
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        shape = "is missing" if embedding is None else f"has shape {embedding.shape}: expected (vocabulary, width)"
        raise LlamaJaxError(f"{path}: tensor {EMBEDDING!r} {shape}")
    config, keys, notes = config_of(path, architecture, file.metadata, embedding.shape[0], file.tensors, ignore_keys)
    numbers = {}
    for name in TENSORS:
        tensor = file.tensors.get(name)
        if tensor is None:
            continue
        if tensor.kind.name != "F32" or tensor.nbytes > 1 << 20:
            raise LlamaJaxError(f"{path}: {name} is {tensor.shape} in {tensor.kind.name}: expected F32 numbers")
        numbers[name] = file.blocks(name).view("<f4").reshape(tensor.shape)
    return read_tensors(path, config, keys, numbers), notes


def _check_tensors(path: Path, file: Gguf, config: Config) -> list[str]:
    """Refuses a file whose tensors are not those of the model; returns the names of tensors without effect.

    Raises:
        LlamaJaxError: if a weight is missing or has another shape, or a tensor does not belong to the model.
    """
    expected = tensors(config, "gguf")
    unused = [name for name in file.tensors if name.endswith(UNUSED)]
    surplus = sorted(set(file.tensors) - set(expected) - set(unused) - set(TENSORS))
    if surplus:
        raise LlamaJaxError(
            f"{path}: tensor {shortened(surplus[0])} does not belong to the model ({len(surplus)} such): this release "
            "does not support it"
        )
    missing = [name for name in expected if name not in file.tensors]
    if missing:
        raise LlamaJaxError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} such)")
    for name, places in expected.items():
        tensor, shape = file.tensors[name], shape_of(config, places)
        if tensor.shape != shape:
            raise LlamaJaxError(f"{path}: {name} has shape {tensor.shape}: expected {shape} by the metadata")
        kind = tensor.kind
        if kind.packed is None and kind.dtype is None and not kind.dequantized:
            raise LlamaJaxError(f"{path}: {name} is of type {kind.name}: expected a type for weights")
        if len(shape) == 1 and kind.dtype is None:
            raise LlamaJaxError(f"{path}: {name} is of type {kind.name}: expected F32, F16 or BF16 for a vector")
    return unused


class _Part(NamedTuple):
    """The part of a tensor that is one weight.

    Attributes:
        tensor: the tensor in the file.
        rows: the rows that are the weight, None for all.
        shape: shape of the weight, rows first.
    """

    tensor: Tensor
    rows: slice | None
    shape: tuple[int, ...]

    @property
    def kind(self) -> ggml.Type:
        """The type of the tensor."""
        return self.tensor.kind

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return math.prod(self.shape[:-1]) * self.tensor.row_bytes

    @property
    def start(self) -> tuple[int, int]:
        """The number of the split file's part, and the byte offset of the weight in it."""
        first = self.rows.start if self.rows is not None else 0
        return self.tensor.file, self.tensor.start + first * self.tensor.row_bytes


class _Reader:
    """Reads the weights of one file."""

    def __init__(self, path: Path, file: Gguf, config: Config):
        """Determines the form of each weight in memory."""
        self.path, self.file = path, file
        self.specs = specs(config)
        self.parts = {
            place: _Part(file.tensors[piece.tensor], piece.rows, shape_of(config, (place,)))
            for place, piece in pieces(config, "gguf").items()
        }
        self.orders = row_orders(config)
        self.dtype = self._dtype()
        self.int8_tokens = format_of(config, "gguf").int8_tokens
        self.abstract = {place: self._abstract(place) for place in self.specs}

    def expanded(self) -> str:
        """Describes weights that are packed in the file but floats in memory; "" for none."""
        names = [part.kind.name for part in self.parts.values() if part.kind.dequantized]
        return ", ".join(f"{names.count(name)} weights of type {name}" for name in dict.fromkeys(names))

    def _dtype(self) -> np.dtype:
        """Returns the dtype of floats: a 16-bit type if all matrices have it and it holds all vectors without loss.

        A model computes in one dtype. In files whose matrices have 16 bits, norms are float32: converters widened them.
        """
        kinds = {part.kind.dtype for place, part in self.parts.items() if self.specs[place].is_matrix}
        one = kinds.pop() if len(kinds) == 1 else None
        if one not in ("float16", "bfloat16"):
            return np.dtype(np.float32)
        dtype = np.dtype(one)
        with np.errstate(over="ignore"):
            for place in self.specs:
                norm = None if self.specs[place].is_matrix else self._floats(place)
                if norm is not None and not np.array_equal(norm, norm.astype(dtype).astype(norm.dtype)):
                    return np.dtype(np.float32)
        return dtype

    def _abstract(self, place: Place) -> Any:
        """Returns a weight as it will be in memory, of `jax.ShapeDtypeStruct`s."""
        part, spec = self.parts[place], self.specs[place]
        kind = part.kind
        if kind.packed is not None:
            weight = self._as_multiplied(ggml.abstract(kind.name, part.shape))
            return ggml.transposed(weight) if spec.transposed else weight
        dtype = kind.dtype if spec.is_only_looked_up and kind.dtype else self.dtype
        return jax.ShapeDtypeStruct(part.shape[::-1] if spec.transposed else part.shape, np.dtype(dtype))

    def _blocks(self, place: Place) -> np.ndarray:
        """Returns blocks by row, with the rows in our order; a vector is one row, in the file's order."""
        part = self.parts[place]
        blocks = self.file.blocks(part.tensor.name)
        if part.rows is not None:
            blocks = blocks[part.rows]
        order = self.orders.get(place.name) if self.specs[place].is_matrix else None
        return blocks if order is None else blocks[order]

    def _floats(self, place: Place) -> np.ndarray:
        """Reads a weight as floats, in the file's orientation."""
        part, spec = self.parts[place], self.specs[place]
        try:
            array = ggml.floats(part.kind.name, self._blocks(place)).reshape(part.shape)
        except ValueError as error:
            raise LlamaJaxError(f"{self.path}: {part.tensor.name}: {error}") from None
        if not spec.is_matrix and place.name in self.orders:
            array = array[self.orders[place.name]]
        # llama.cpp's files hold the sum of a norm's weights and the offset, because it adds none when it multiplies.
        return array.astype(np.float32) - np.float32(spec.offset) if spec.offset else array

    def _as_multiplied(self, weight: Any) -> Any:
        """Sets what the family rounds activations to before they are multiplied with a packed weight."""
        return bitnet.with_int8_tokens(weight) if self.int8_tokens else weight

    def read(self, place: Place) -> Any:
        """Reads one weight, as `Source.read`."""
        part, spec = self.parts[place], self.specs[place]
        if part.kind.packed is None:
            array = self._floats(place)
            return array.T if spec.transposed else array
        weight = self._as_multiplied(ggml.unpack(part.kind.name, self._blocks(place)))
        self.file.release(part.tensor.name)
        return ggml.transposed(weight) if spec.transposed else weight

    def fill(self, places: Sequence[Place], weights: Sequence[Any]) -> None:
        """Reads several weights, as `Source.fill`, in threads: NumPy releases the GIL while it copies."""

        def one(place: Place, into: Any) -> None:
            for target, array in zip(jax.tree.leaves(into), jax.tree.leaves(self.read(place)), strict=True):
                np.copyto(target, array, casting="same_kind")
            self.file.release(self.parts[place].tensor.name)  # the floats were a view of the file

        with workers(min(_MOST_THREADS, len(places), os.cpu_count() or 1)) as pool:
            for done in [pool.submit(one, place, into) for place, into in zip(places, weights, strict=True)]:
                done.result()
