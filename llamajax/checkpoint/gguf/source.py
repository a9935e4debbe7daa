"""A GGUF file as a `Source`: what quant/FORMAT.md holds stays packed as it is in the file, codes and scales unchanged.

Rows of q and k that stand in pairs are reordered, packed or not: blocks never go over several rows.
"""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llamajax.checkpoint.gguf.blocks import Tensor
from llamajax.checkpoint.gguf.config import check_ignored, check_quantization, config_of, sampling_of, unknown_keys
from llamajax.checkpoint.gguf.container import Gguf, is_gguf, open_gguf
from llamajax.checkpoint.gguf.names import (
    HEAD,
    ROPE_FACTORS,
    UNUSED,
    Architecture,
    architecture_of,
    tensor_names,
)
from llamajax.checkpoint.gguf.rope import with_factors
from llamajax.checkpoint.gguf.words import words_of
from llamajax.checkpoint.source import Source, Stored, halves_order
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.files import shortened
from llamajax.parameters import Place, Spec, specs
from llamajax.workers import workers
from quant import ggml

_MOST_THREADS = 8
EMBEDDING = "token_embd.weight"


def recognise(path: Path) -> bool:
    """Whether a file is GGUF, whatever its name."""
    return is_gguf(path)


def open_source(path: Path, ignore_keys: Collection[str] = ()) -> Source:
    """Reads the header of a model.

    Args:
        path: the file, or one of the parts of a split one.
        ignore_keys: of the metadata, to be read over.

    Raises:
        LlamaJaxError: for a damaged file, one that holds no language model that we know, metadata that ask for
            something else, or tensors that are not those of the model.
    """
    file = open_gguf(path)
    metadata = {key: value for key, value in file.metadata.items() if key not in ignore_keys}
    architecture = architecture_of(path, metadata)
    check_ignored(ignore_keys, architecture.name)
    check_quantization(path, metadata)
    config, notes = _config(path, file, architecture, metadata)
    tensors, unused = _tensors(path, file, config)
    reader = _Reader(path, file, config, architecture, tensors)
    sampling, not_done = sampling_of(path, metadata)
    words = words_of(path, metadata, config.vocab_size, sampling)
    notes += not_done
    unknown = unknown_keys(metadata, architecture.name, words.consumed)
    if unknown:
        notes.append(
            f"{path}: keys that nothing here reads: {', '.join(map(shortened, unknown[:8]))}{_more(unknown, 8)}"
        )
    if unused:
        notes.append(f"{path}: tensors of no effect, not read: {', '.join(unused[:3])}{_more(unused, 3)}")
    expanded = reader.expanded()
    if expanded:
        notes.append(f"{path}: {expanded} are read as floats: llamajax quantize packs them")
    return Source(
        _description(file, tensors),
        config,
        reader.abstract,
        tuple(sorted(tensors, key=lambda place: (tensors[place].file, tensors[place].start))),
        reader.read,
        reader.fill,
        tokenizer_bytes=words.tokenizer_bytes,
        tokenizer_problem=words.problem,
        words=words.words,
        notes=tuple(notes),
        expanded=expanded,
        stored={place: Stored(tensor.kind.name, tensor.nbytes) for place, tensor in tensors.items()},
        metadata=file.metadata,
    )


def _more(names: Sequence[str], shown: int) -> str:
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _description(file: Gguf, tensors: Mapping[Place, Tensor]) -> str:
    """Version and types, the most frequent first."""
    types = [tensor.kind.name for tensor in tensors.values()]
    counts = sorted({name: types.count(name) for name in types}.items(), key=lambda item: -item[1])
    parts = f", {len(file.maps)} parts" if len(file.maps) > 1 else ""
    order = "" if file.byteorder == "little" else ", big-endian"
    return f"GGUF version {file.version}{order}{parts} ({', '.join(f'{count} {name}' for name, count in counts)})"


def _config(
    path: Path, file: Gguf, architecture: Architecture, metadata: Mapping[str, Any]
) -> tuple[Config, list[str]]:
    """The config, by metadata and tensors."""
    if not file.tensors:
        raise LlamaJaxError(f"{path}: holds no tensors, a vocabulary alone: give the file of the model itself")
    embedding = file.tensors.get(EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        shape = "is missing" if embedding is None else f"has shape {embedding.shape}: expected (vocabulary, width)"
        raise LlamaJaxError(f"{path}: tensor {EMBEDDING!r} {shape}")
    name, tied = architecture.name, HEAD not in file.tensors
    config, notes = config_of(path, name, metadata, embedding.shape[0], tied)
    factors = file.tensors.get(ROPE_FACTORS)
    if factors is not None:
        if factors.kind.name != "F32" or factors.nbytes > 1 << 20:
            raise LlamaJaxError(
                f"{path}: {ROPE_FACTORS} is {factors.shape} in {factors.kind.name}: expected F32 numbers"
            )
        divisors = file.blocks(ROPE_FACTORS).view("<f4").reshape(factors.shape)
        original = metadata.get(f"{name}.rope.scaling.original_context_length")
        config = with_factors(path, config, divisors, original)
    return config, notes


def _tensors(path: Path, file: Gguf, config: Config) -> tuple[dict[Place, Tensor], list[str]]:
    """The tensor that each weight is, and those that are of no effect.

    Raises:
        LlamaJaxError: if a weight is missing or of another shape, or a tensor is of nothing.
    """
    if config.num_layers > len(file.tensors):  # before the names of so many layers are listed
        raise LlamaJaxError(
            f"{path}: {config.num_layers} layers by its metadata, but {len(file.tensors)} tensors: some are missing"
        )
    expected = tensor_names(config)
    unused = [name for name in file.tensors if name.endswith(UNUSED)]
    surplus = sorted(set(file.tensors) - set(expected) - set(unused) - {ROPE_FACTORS})
    if surplus:
        raise LlamaJaxError(
            f"{path}: tensor {shortened(surplus[0])} belongs to nothing in the model ({len(surplus)} such): this "
            "release does not know what it is for"
        )
    missing = [name for name in expected if name not in file.tensors]
    if missing:
        raise LlamaJaxError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} such)")
    found = {}
    for name, place in expected.items():
        tensor, spec = file.tensors[name], specs(config)[place]
        shape = _theirs(spec, config)
        if tensor.shape != shape:
            raise LlamaJaxError(f"{path}: {name} has shape {tensor.shape}: expected {shape} by the metadata")
        kind = tensor.kind
        if kind.packed is None and kind.dtype is None and not kind.dequantized:
            raise LlamaJaxError(f"{path}: {name} is of type {kind.name}: expected a type that weights are stored in")
        if not spec.is_matrix and kind.dtype is None:
            raise LlamaJaxError(f"{path}: {name} is of type {kind.name}: expected F32, F16 or BF16 of a norm")
        found[place] = tensor
    return found, unused


def _theirs(spec: Spec, config: Config) -> tuple[int, ...]:
    """The shape that a file has of a weight."""
    shape = spec.shape(config)
    return shape[::-1] if spec.transposed else shape


class _Reader:
    """Reads the weights of one file."""

    def __init__(
        self, path: Path, file: Gguf, config: Config, architecture: Architecture, tensors: Mapping[Place, Tensor]
    ):
        """Foresees what each weight will be."""
        self.path, self.file, self.tensors = path, file, tensors
        self.specs = specs(config)
        self.kinds = {place: tensor.kind for place, tensor in tensors.items()}
        self.orders = {}
        if architecture.in_pairs:
            for name, heads in architecture.rotated.items():
                self.orders[name] = halves_order(getattr(config, heads) * config.head_size, config.head_size)
        self.dtype = self._dtype()
        self.abstract = {place: self._abstract(place) for place in self.specs}

    def expanded(self) -> str:
        """Which weights take more memory than in the file, being floats there; "" for none."""
        names = [kind.name for kind in self.kinds.values() if kind.dequantized]
        return ", ".join(f"{names.count(name)} weights of type {name}" for name in dict.fromkeys(names))

    def _dtype(self) -> np.dtype:
        """Of floats that meet activations: 16 bits where all of them are of one such type, or are without loss.

        A model computes in one dtype. Norms are float32 in files whose matrices have 16 bits; converters widened them.
        """
        kinds = {kind.dtype for place, kind in self.kinds.items() if self.specs[place].is_matrix}
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
        """A weight as it will be, of `jax.ShapeDtypeStruct`s."""
        kind, spec = self.kinds[place], self.specs[place]
        if kind.packed is not None:
            weight = ggml.abstract(kind.name, self.tensors[place].shape)
            return ggml.transposed(weight) if spec.transposed else weight
        shape = self.tensors[place].shape
        dtype = kind.dtype if spec.is_only_looked_up and kind.dtype else self.dtype
        return jax.ShapeDtypeStruct(shape[::-1] if spec.transposed else shape, np.dtype(dtype))

    def _blocks(self, place: Place) -> np.ndarray:
        """Blocks by row, the rows in our order."""
        blocks = self.file.blocks(self.tensors[place].name)
        order = self.orders.get(place.name)
        return blocks if order is None else blocks[order]

    def _floats(self, place: Place) -> np.ndarray:
        """A weight that is floats, in the file's orientation."""
        try:
            array = ggml.floats(self.kinds[place].name, self._blocks(place))
        except ValueError as error:
            raise LlamaJaxError(f"{self.path}: {self.tensors[place].name}: {error}") from None
        return array.reshape(self.tensors[place].shape)

    def read(self, place: Place) -> Any:
        """One weight, as of `Source`."""
        kind, spec = self.kinds[place], self.specs[place]
        if kind.packed is None:
            array = self._floats(place)
            return array.T if spec.transposed else array
        weight = ggml.unpack(kind.name, self._blocks(place))
        self.file.release(self.tensors[place].name)
        return ggml.transposed(weight) if spec.transposed else weight

    def fill(self, places: Sequence[Place], weights: Sequence[Any]) -> None:
        """Several weights at once, as of `Source`, in threads: NumPy lets go of Python while it copies."""

        def one(place: Place, into: Any) -> None:
            for target, array in zip(jax.tree.leaves(into), jax.tree.leaves(self.read(place)), strict=True):
                np.copyto(target, array, casting="same_kind")
            self.file.release(self.tensors[place].name)  # floats were a view

        with workers(min(_MOST_THREADS, len(places), os.cpu_count() or 1)) as pool:
            for done in [pool.submit(one, place, into) for place, into in zip(places, weights, strict=True)]:
                done.result()
