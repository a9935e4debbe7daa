"""Writes a model as a GGUF file that llama.cpp loads: packed weights as the ggml types that they are, bit for bit.

What no ggml type holds is an error, before anything is written. Metadata are those of llama.cpp's convert_hf_to_gguf.py
for architecture `llama`; rows of q and k go from halves to pairs, as it has them.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llamajax.checkpoint.checks import check_fits
from llamajax.checkpoint.gguf.config import FIELDS, QUANTIZATION_VERSION, SAMPLING_KEYS
from llamajax.checkpoint.gguf.encode import Entry, header, padding
from llamajax.checkpoint.gguf.names import ARCHITECTURES, ROPE_FACTORS, tensor_names
from llamajax.checkpoint.gguf.rope import divisors_of
from llamajax.checkpoint.source import halves_order
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.files import check_absent, new_file
from llamajax.model import Llama
from llamajax.parameters import Place, specs, weights_of
from llamajax.tokenizer import Tokenizer
from llamajax.tokenizer.gguf import to_metadata
from llamajax.words import Words
from quant import ggml, is_weight, values

_ARCHITECTURE = ARCHITECTURES["llama"]
# `enum llama_ftype` in llama.h, by the type that most weights have.
_FILE_TYPES = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11, "Q4_K": 15},
    **{"Q5_K": 17, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "TQ2_0": 37, "MXFP4": 38, "NVFP4": 39},
}
_SAMPLING = {name: key for key, name in SAMPLING_KEYS.items()}


class _Tensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        entry: what the header says of it.
        kind: its type.
        data: makes its bytes, an array.
    """

    entry: Entry
    kind: ggml.Type
    data: Callable[[], np.ndarray]


def check_name(path: Path) -> None:
    """Refuses a path that no GGUF file has, before any work is done for it."""
    if path.suffix != ".gguf":
        raise LlamaJaxError(f"{path}: GGUF is one file: expected a name that ends in .gguf")


def save(model: Llama, path: Path, tokenizer: Tokenizer | None, words: Words | None, dtype: Any = None) -> None:
    """Writes the file, tensor by tensor: in memory is one at a time beside the model. It appears whole, or not at all.

    Args:
        model: leaves may be NumPy arrays.
        path: of the file; must not exist.
        tokenizer: goes into the file, with its chat template.
        words: defaults of sampling go into it.
        dtype: of floats; packed weights become floats in it too. As they are unless given.

    Raises:
        LlamaJaxError: for a weight in a form that no ggml type holds, naming it and the nearest one that holds
            something like it; for a model of another family, a path of another suffix or one that exists.
    """
    config = model.config
    if config.family != Config.family:
        raise LlamaJaxError(f"a model of family {config.family!r} as GGUF: expected {Config.family!r}")
    check_name(path)
    check_absent(path)
    weights = weights_of(jax.tree.map(np.asarray, model))
    tensors = list(_tensors(weights, config, dtype))
    metadata = _metadata(config, path.stem, tensors) | _tokenizer_metadata(tokenizer, config)
    for key, value in (words or Words()).sampling.items():
        metadata[_SAMPLING[key]] = int(value) if key == "top_k" else float(value)
    try:
        head = header(metadata, [tensor.entry for tensor in tensors])
    except ValueError as error:
        raise LlamaJaxError(f"{path}: metadata: {error}") from None
    with new_file(path) as partial, open(partial, "wb") as file:
        file.write(head)
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.data()).reshape(-1).view(np.uint8)
            assert data.nbytes == tensor.entry.nbytes, tensor.entry
            file.write(data.data)
            file.write(bytes(padding(data.nbytes)))


def _metadata(config: Config, name: str, tensors: list[_Tensor]) -> dict[str, Any]:
    """What describes the model, and what its architecture is."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.entry.shape) > 1:
            sizes[tensor.kind.name] = sizes.get(tensor.kind.name, 0) + tensor.entry.nbytes
    most = max(sizes, key=sizes.__getitem__)
    said: dict[str, Any] = {
        "general.architecture": _ARCHITECTURE.name,
        "general.type": "model",
        "general.name": name,
        "general.file_type": _FILE_TYPES[most],
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    of_model: dict[str, Any] = {
        **{key: getattr(config, field) for key, field in FIELDS.items()},
        "vocab_size": config.vocab_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_size,
        "rope.freq_base": float(config.rope_theta),
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        of_model |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    elif scaling is not None:  # by the tensor; without effect in llama.cpp, but this makes it certain what made that
        of_model["rope.scaling.original_context_length"] = scaling.original_context_length
    return said | {f"{_ARCHITECTURE.name}.{key}": value for key, value in of_model.items()}


def _tokenizer_metadata(tokenizer: Tokenizer | None, config: Config) -> dict[str, Any]:
    """What is said of the vocabulary: a token for each row of the embedding."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    return dict(to_metadata(tokenizer, config.vocab_size))


def _tensors(weights: Mapping[Place, Any], config: Config, dtype: Any) -> Iterator[_Tensor]:
    """The tensors in the order of the file: RoPE's divisors if there are any, then that of `specs`."""
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        factors = divisors_of(config, config.rope_scaling).astype(np.float32)
        yield _tensor(ROPE_FACTORS, ggml.named("F32"), factors.shape, lambda: factors)
    for name, place in tensor_names(config).items():
        spec, weight = specs(config)[place], weights[place]
        shape = spec.shape(config)
        shape = shape[::-1] if spec.transposed else shape
        order = None
        heads = _ARCHITECTURE.rotated.get(place.name)
        if heads is not None:
            order = np.argsort(halves_order(getattr(config, heads) * config.head_size, config.head_size))
        wanted = np.dtype(dtype) if dtype is not None and spec.is_matrix else None
        if not spec.is_matrix:
            wanted = np.dtype(np.float32)
        kind = _type(place, weight) if wanted is None else ggml.nearest(jax.ShapeDtypeStruct(shape, wanted))
        yield _tensor(name, kind, shape, functools.partial(_data, place, weight, wanted, spec.transposed, order))


def _tensor(name: str, kind: ggml.Type, shape: tuple[int, ...], data: Callable[[], np.ndarray]) -> _Tensor:
    nbytes = int(np.prod(shape[:-1], dtype=np.int64)) * kind.row_bytes(shape[-1])
    return _Tensor(Entry(name, kind.number, shape, nbytes), kind, data)


def _type(place: Place, weight: Any) -> ggml.Type:
    """The type that a weight is in the file."""
    found = ggml.type_of(weight)
    if found is None:
        raise LlamaJaxError(
            f"{place} is {ggml.described(weight)}: no ggml type holds it, the nearest is "
            f"{ggml.explained(ggml.nearest(weight))}: quantize the model again with --types=ggml, or give --dtype for "
            "floats"
        )
    return found


def _data(place: Place, weight: Any, dtype: np.dtype | None, transposed: bool, order: np.ndarray | None) -> np.ndarray:
    """A tensor's bytes, rows first, the rows in the order of the file."""
    if dtype is not None:
        floats = np.asarray(values(weight)) if is_weight(weight) else np.asarray(weight)
        with np.errstate(over="ignore"):
            weight = floats.astype(dtype)
        check_fits(str(place), floats, weight)
    rows = ggml.pack(ggml.transposed(weight) if transposed else weight)[1]
    return rows if order is None else rows[order]
