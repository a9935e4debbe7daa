"""Writes Hugging Face folders: `config.json` and safetensors with floats, or with ternary projections as in BitNet."""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llamajax.checkpoint.huggingface_words import config_ids, write_words
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families import config_to_hf, shape_of, tensors
from llamajax.families.huggingface_quantization import PACKED, is_converted, scale_name
from llamajax.model import Llama
from llamajax.parameters import Place, Spec, specs, weights_of
from llamajax.tokenizer import Tokenizer
from llamajax.words import Words
from quant import bitnet, quantized

_SHARD_BYTES = 1 << 30
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "uint8": "U8"}


def refusal(model: Llama) -> str | None:
    """Returns why transformers could not read a model's weights, or None if it can."""
    weights = weights_of(model)
    if not any(quantized(weight) for weight in weights.values()):
        return None
    for place, spec in specs(model.config).items():
        if is_converted(spec) != bitnet.holds(weights[place]) or (quantized(weights[place]) and not is_converted(spec)):
            return f"{place} is not in BitNet's form, the only quantized form that llamajax writes for transformers"
    return None


def save(
    model: Llama,
    path: Path,
    tokenizer_bytes: bytes | None = None,
    words: Words | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a folder that `open_source` and transformers read, into `path`, an empty folder.

    `refusal(model)` must be None. `tokenizer_bytes` are written as tokenizer.json or tokenizer.model, even if they are
    no valid tokenizer; `tokenizer` is the tokenizer in them, if they can be read. Weights beyond 1 GiB are written in
    shards with an index. Memory holds a transposed copy of at most one tensor.
    """
    weights = weights_of(jax.tree.map(np.asarray, model))
    shards = _plan_shards(list(_to_write(model.config, weights)))
    weight_map: dict[str, str] = {}
    for number, held in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(path / file, held)
        weight_map |= {tensor.name: file for tensor in held}
    if len(shards) > 1:
        size = sum(tensor.nbytes for held in shards for tensor in held)
        _write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    words = words or Words()
    write_words(path, words, tokenizer_bytes, tokenizer)
    fields = config_to_hf(model.config) | config_ids(words, tokenizer)
    if any(quantized(weight) for weight in weights.values()):
        fields["quantization_config"] = dict(PACKED)
    _write_json(path / "config.json", fields | {"torch_dtype": str(weights[Place("embed_VD")].dtype)})


class _Tensor(NamedTuple):
    """A tensor to be written.

    Attributes:
        name: name in the files.
        dtype: dtype of its elements.
        shape: its shape.
        parts: functions that make its parts, which are concatenated along the rows.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    parts: tuple[Callable[[], np.ndarray], ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def _to_write(config: Config, weights: Mapping[Place, Any]) -> Iterator[_Tensor]:
    """Yields the tensors of a model, in its order."""
    for name, places in tensors(config, "huggingface").items():
        first, shape = weights[places[0]], shape_of(config, places)
        if not bitnet.holds(first):
            parts = tuple(functools.partial(_theirs, weights[place], specs(config)[place]) for place in places)
            yield _Tensor(name, np.dtype(first.dtype), shape, parts)
            continue
        if len(places) > 1:
            raise LlamaJaxError(
                f"{name} is fused from {len(places)} packed weights, but a packed tensor has one scale: write "
                "llamajax's own format instead"
            )
        scale = bitnet.pack(first)[1]
        yield _Tensor(name, np.dtype(np.uint8), bitnet.packed_shape(shape), (functools.partial(_codes, first),))
        yield _Tensor(scale_name(name), scale.dtype, scale.shape, (functools.partial(np.asarray, scale),))


def _theirs(weight: np.ndarray, spec: Spec) -> np.ndarray:
    return weight.T if spec.transposed else weight


def _codes(weight: Any) -> np.ndarray:
    return bitnet.pack(weight)[0]


def _write_shard(path: Path, held: list[_Tensor]) -> None:
    """Writes a safetensors file tensor by tensor, because the library's own function needs all tensors at once.

    The format is the header's length in 8 bytes, the header in JSON (dtype, shape and place of each tensor), and the
    data of all tensors without gaps (github.com/huggingface/safetensors, "Format").
    """
    ordered = sorted(held, key=lambda tensor: -tensor.dtype.itemsize)  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        start, end = end, end + tensor.nbytes
        kind = _DTYPES[tensor.dtype.name]
        header[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in (part for tensor in ordered for part in tensor.parts):
            file.write(np.ascontiguousarray(part()).reshape(-1).view(np.uint8).data)


def _plan_shards(held: list[_Tensor]) -> list[list[_Tensor]]:
    """Groups tensors into shards of at most 1 GiB, or of one tensor that is larger."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in held:
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
