"""Writes a model as a GGUF file that llama.cpp loads; packed weights become ggml types bit for bit.

A weight that no ggml type holds is an error, before anything is written. The metadata are those of llama.cpp's
converter for the architecture. Rows of query and key projections go from halves to pairs, and 1 is added to norms,
where the converter does the same.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llamajax.checkpoint.checks import check_fits
from llamajax.checkpoint.gguf.config import FIELDS, QUANTIZATION_VERSION, SAMPLING_KEYS, config_of
from llamajax.checkpoint.gguf.encode import Entry, header, padding
from llamajax.checkpoint.gguf.names import row_orders
from llamajax.checkpoint.gguf.rope import write_rope, write_tensors
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families import shape_of, tensors
from llamajax.families.family import format_of
from llamajax.files import check_absent, new_file, shortened
from llamajax.model import Llama
from llamajax.parameters import Place, Spec, specs, weights_of
from llamajax.tokenizer import Tokenizer
from llamajax.tokenizer.gguf import to_metadata
from llamajax.words import Words
from quant import ggml, is_weight, values

# `enum llama_ftype` in llama.h, by the type of most of the matrices' bytes.
_FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 15},
    **{"Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39},
}
_SAMPLING = {name: key for key, name in SAMPLING_KEYS.items()}


class _Tensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        entry: its entry in the header.
        kind: its type.
        data: returns its bytes, as an array.
    """

    entry: Entry
    kind: ggml.Type
    data: Callable[[], np.ndarray]


def check_name(path: Path) -> None:
    """Refuses a path that does not end in .gguf, so that callers can check it before other work."""
    if path.suffix != ".gguf":
        raise LlamaJaxError(f"{path}: GGUF is one file: expected a name that ends in .gguf")


def save(model: Llama, path: Path, tokenizer: Tokenizer | None, words: Words | None, dtype: Any = None) -> None:
    """Writes the file tensor by tensor, with one tensor in memory beside the model; it appears whole, or not at all.

    Args:
        model: the model; leaves may be NumPy arrays.
        path: path of the file; must not exist.
        tokenizer: written into the file, with its chat template.
        words: default sampling parameters are written into the file.
        dtype: dtype of all matrices, packed ones included; by default, matrices stay as they are. Vectors are float32.

    Raises:
        LlamaJaxError: for a weight that no ggml type holds (the message names it and the nearest type), a family
            without GGUF, a path that does not end in .gguf, or a path that exists.
    """
    config = model.config
    of_model = keys_of(config)
    check_name(path)
    check_absent(path)
    weights = weights_of(jax.tree.map(np.asarray, model))
    made = list(_tensors(weights, config, dtype))
    metadata = _metadata(config, path.stem, made) | of_model | _tokenizer_metadata(tokenizer, config)
    for key, value in (words or Words()).sampling.items():
        metadata[_SAMPLING[key]] = int(value) if key == "top_k" else float(value)
    try:
        head = header(metadata, [tensor.entry for tensor in made])
    except ValueError as error:
        raise LlamaJaxError(f"{path}: metadata: {error}") from None
    with new_file(path) as partial, open(partial, "wb") as file:
        file.write(head)
        for tensor in made:
            data = np.ascontiguousarray(tensor.data()).reshape(-1).view(np.uint8)
            assert data.nbytes == tensor.entry.nbytes, tensor.entry
            file.write(data.data)
            file.write(bytes(padding(data.nbytes)))


def keys_of(config: Config) -> dict[str, Any]:
    """Returns the metadata that describe a model's architecture.

    Raises:
        LlamaJaxError: if the family has no GGUF form, or GGUF cannot express one of the config's fields.
    """
    form = format_of(config, "gguf")
    architecture = form.kinds[0]
    of_model: dict[str, Any] = {
        **{key: getattr(config, field) for key, field in FIELDS.items()},
        "vocab_size": config.vocab_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.rotated_size,
        **write_rope(config),
        **form.write(config),
    }
    said = {f"{architecture}.{key}": value for key, value in of_model.items()}
    # RoPE scalings stored as tensors are not compared: `write_tensors` writes them.
    read, _, _ = config_of("GGUF", architecture, said, config.vocab_size, tensors(config, "gguf"))
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(read, field.name)
        both = isinstance(ours, float) and isinstance(theirs, float)
        same = math.isclose(ours, theirs, rel_tol=1e-12) if both else ours == theirs
        if not same and field.name not in ("family", "rope_scaling"):
            raise LlamaJaxError(
                f"{field.name} is {shortened(ours)}: a GGUF of architecture {architecture!r} can only "
                f"express {shortened(theirs)}: expected a config of that architecture"
            )
    return said


def _metadata(config: Config, name: str, made: list[_Tensor]) -> dict[str, Any]:
    """Returns the metadata that describe the file."""
    sizes: dict[str, int] = {}
    for tensor in made:
        if len(tensor.entry.shape) > 1:
            sizes[tensor.kind.name] = sizes.get(tensor.kind.name, 0) + tensor.entry.nbytes
    most = max(sizes, key=sizes.__getitem__)
    return {
        "general.architecture": format_of(config, "gguf").kinds[0],
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[most],
        "general.quantization_version": QUANTIZATION_VERSION,
    }


def _tokenizer_metadata(tokenizer: Tokenizer | None, config: Config) -> dict[str, Any]:
    """Returns the metadata of the vocabulary, with a token for each row of the embedding."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    return dict(to_metadata(tokenizer, config.vocab_size))


def _tensors(weights: Mapping[Place, Any], config: Config, dtype: Any) -> Iterator[_Tensor]:
    """Yields the tensors in the order of the file: RoPE's divisors if there are any, then weights as in `specs`."""
    for name, numbers in write_tensors(config).items():
        yield _tensor(name, ggml.named("F32"), numbers.shape, functools.partial(np.asarray, numbers))
    orders = row_orders(config)
    for name, places in tensors(config, "gguf").items():
        shape = shape_of(config, places)
        wanted = None if dtype is None else np.dtype(dtype)
        wanted = np.dtype(np.float32) if len(shape) == 1 else wanted
        if wanted is None:
            kind = _type(name, {place: weights[place] for place in places})
        else:
            kind = ggml.nearest(jax.ShapeDtypeStruct(shape, wanted))
        parts = [
            functools.partial(_data, place, specs(config)[place], weights[place], wanted, orders.get(place.name))
            for place in places
        ]
        yield _tensor(name, kind, shape, functools.partial(_joined, parts))


def _joined(parts: Sequence[Callable[[], np.ndarray]]) -> np.ndarray:
    """Returns the bytes of several weights, concatenated along the rows."""
    return np.concatenate([part() for part in parts]) if len(parts) > 1 else parts[0]()


def _tensor(name: str, kind: ggml.Type, shape: tuple[int, ...], data: Callable[[], np.ndarray]) -> _Tensor:
    nbytes = int(np.prod(shape[:-1], dtype=np.int64)) * kind.row_bytes(shape[-1])
    return _Tensor(Entry(name, kind.number, shape, nbytes), kind, data)


def _type(name: str, weights: Mapping[Place, Any]) -> ggml.Type:
    """Returns the type of a tensor in the file."""
    types = {}
    for place, weight in weights.items():
        found = ggml.type_of(weight)
        if found is None:
            raise LlamaJaxError(
                f"{place} is {ggml.described(weight)}: no ggml type holds it, the nearest is "
                f"{ggml.explained(ggml.nearest(weight))}: quantize the model again with --types=ggml, or give --dtype "
                "for floats"
            )
        types[place] = found
    if len({kind.name for kind in types.values()}) > 1:
        said = ", ".join(f"{place} is {kind.name}" for place, kind in types.items())
        raise LlamaJaxError(
            f"{name} holds {len(types)} weights in one type, but {said}: quantize the model again with one scheme for "
            "all of them, or give --dtype for floats"
        )
    return next(iter(types.values()))


def _data(place: Place, spec: Spec, weight: Any, dtype: np.dtype | None, order: np.ndarray | None) -> np.ndarray:
    """Returns a weight's bytes in a tensor, rows first and in the order of the file; a vector is one row."""
    if dtype is not None:
        floats = np.asarray(values(weight)) if is_weight(weight) else np.asarray(weight)
        if spec.offset:
            floats = floats.astype(np.float32) + np.float32(spec.offset)
        with np.errstate(over="ignore"):
            weight = floats.astype(dtype)
        check_fits(str(place), floats, weight)
    theirs = None if order is None else np.argsort(order)
    if not spec.is_matrix:
        return ggml.pack(weight if theirs is None else weight[theirs])[1]
    rows = ggml.pack(ggml.transposed(weight) if spec.transposed else weight)[1]
    return rows if theirs is None else rows[theirs]
