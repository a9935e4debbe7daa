"""Reads the .bin files of karpathy/llama2.c: version 0 (legacy), 1 (float32) and 2 (Q8_0).

Layouts, from `export.py` and `run.c`/`runq.c` there (little endian):

    version 0   int32 dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; vocab_size is negative where
                the head is not tied. Then float32: embedding, then per kind, all layers of it: attention norm, wq, wk,
                wv, wo, ffn norm, w1, w2, w3; final norm; cos and sin tables (unused); the head if not tied.
    version 1   uint32 magic "ak42", int32 version 1, the same seven int32 (vocab_size positive), uint8 tied; zeros up
                to byte 256. Then float32: attention norms, ffn norms, final norm, embedding, wq, wk, wv, wo, w1, w2,
                w3, the head if not tied.
    version 2   as 1, and an int32 group_size behind `tied`. float32 norms as in version 1; then embedding, wq, wk, wv,
                wo, w1, w2, w3, the head if not tied: per tensor (one per layer) int8 codes and float32 scales, one per
                group; weight = code * scale.

No version holds epsilon or theta: llama2.c fixes them at 1e-5 and 10,000. llama2.c rotates pairs of neighbours,
llamajax rotates halves, so that query and key projections are permuted.
"""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llamajax.checkpoint.source import Source, float_weights, halves_from_pairs
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.files import open_regular
from llamajax.layer_weights import LAYER
from llamajax.parameters import Place, whole_specs

_MAGIC = 0x616B3432  # "ak42"
_HEADER_BYTES = 256


@dataclasses.dataclass(frozen=True)
class _Header:
    version: int
    config: Config
    group_size: int | None
    start: int  # byte at which the tensors begin


def recognise(path: Path) -> bool:
    """Whether a file's first bytes are those of a llama2.c checkpoint."""
    if not path.is_file():
        return False
    head = _read_head(path)
    if len(head) < 28:
        return False
    if struct.unpack_from("<I", head)[0] == _MAGIC:
        return True
    # Version 0 has no magic number: seven plausible sizes are required here; `open_source` checks the file's length.
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", head)
    small = all(0 < value < 1 << 20 for value in (dim, hidden, layers, heads, kv_heads, abs(vocab), context))
    return small and dim % heads == 0 and heads % kv_heads == 0 and layers < 1 << 12


def open_source(path: Path) -> Source:
    """Reads the header and checks that the file has the length that the header implies.

    Raises:
        LlamaJaxError: for a version other than 0, 1 or 2, invalid sizes, or a file of another length.
    """
    header = _read_header(path)
    expected = header.start + sum(size for _, size in _layout(header))
    actual = path.stat().st_size
    if actual != expected:
        kind = "truncated" if actual < expected else "damaged"
        raise LlamaJaxError(f"{path}: {actual} bytes, {kind}: expected {expected} for the sizes in its header")
    if header.version == 2:
        description = f"llama2.c version 2 (Q8_0, group size {header.group_size})"
    else:
        description = f"llama2.c version {header.version} (float32)"
    offsets = _offsets(header)
    return Source(
        description,
        header.config,
        float_weights(header.config, np.float32),
        tuple(offsets),
        lambda place: _read(path, header, place, *offsets[place]),
    )


def _read_head(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read(_HEADER_BYTES)


def _read_header(path: Path) -> _Header:
    head = _read_head(path)
    if len(head) < 28:
        raise LlamaJaxError(f"{path}: {len(head)} bytes, truncated: expected a llama2.c header")
    group_size = None
    if struct.unpack_from("<I", head)[0] != _MAGIC:
        version, sizes, start = 0, list(struct.unpack_from("<7i", head)), 28
        tied = sizes[5] > 0
    else:
        if len(head) < _HEADER_BYTES:
            raise LlamaJaxError(f"{path}: {len(head)} bytes, truncated: expected a header of {_HEADER_BYTES}")
        version, *sizes, tied_byte = struct.unpack_from("<i7iB", head, 4)
        tied, start = bool(tied_byte), _HEADER_BYTES
        if version not in (1, 2):
            raise LlamaJaxError(f"{path}: llama2.c version {version} is not supported: expected 0, 1 or 2")
        if version == 2:
            (group_size,) = struct.unpack_from("<i", head, 37)
    dim, hidden, layers, heads, kv_heads, vocab, context = sizes
    config = Config.from_dict(
        {
            "vocab_size": abs(vocab) if version == 0 else vocab,
            "width": dim,
            "ffn_width": hidden,
            "num_layers": layers,
            "num_heads": heads,
            "num_kv_heads": kv_heads,
            "head_size": dim // heads if heads > 0 else 0,
            "context_length": context,
            "tied_embeddings": tied,
        },
        str(path),
    )
    if dim % heads:
        raise LlamaJaxError(f"{path}: width is {dim}: expected a multiple of its {heads} heads")
    if group_size is not None:
        _check_groups(path, config, group_size)
    return _Header(version, config, group_size, start)


def _check_groups(path: Path, config: Config, group_size: int) -> None:
    for name, (rows, columns) in _matrix_shapes(config).items():
        if group_size < 1 or rows * columns % group_size:
            raise LlamaJaxError(
                f"{path}: group size {group_size}: expected a divisor of {name}'s {rows * columns} weights"
            )


# The order of the layers' matrices, each for all layers: wq, wk, wv, wo, w1, w2, w3.
_MATRICES = (
    *("attention.query_DQ", "attention.key_DM", "attention.value_DM", "attention.out_QD"),
    *("ffn.gate_DF", "ffn.down_FD", "ffn.up_DF"),
)


def _matrix_shapes(config: Config) -> dict[str, tuple[int, int]]:
    """Returns the shape [out, in] of each matrix in the files, by our names."""
    specs = whole_specs(config) | {name: LAYER[name] for name in _MATRICES}
    ours = {name: spec.shape(config) for name, spec in specs.items() if spec.is_matrix}
    return {
        name: (shape[1], shape[0]) if specs[name].transposed else (shape[0], shape[1]) for name, shape in ours.items()
    }


def _order(header: _Header) -> list[str]:
    """Returns names in file order; a layer's weight stands for those of all layers, `rope` for two unused tables."""
    norms = ["attention_norm.weight_D", "ffn_norm.weight_D"]
    if header.version == 0:
        order = ["embed_VD", norms[0], *_MATRICES[:4], norms[1], *_MATRICES[4:], "norm.weight_D", "rope"]
    else:
        order = [*norms, "norm.weight_D", "embed_VD", *_MATRICES]
    return order if header.config.tied_embeddings else [*order, "head_VD"]


def _layout(header: _Header) -> Iterator[tuple[str, int]]:
    """Yields each name in file order with its number of bytes (for all layers)."""
    config, shapes = header.config, _matrix_shapes(header.config)
    for name in _order(header):
        layers = config.num_layers if name in LAYER else 1
        if name == "rope":
            yield name, config.context_length * config.head_size * 4
        elif name not in shapes:
            yield name, layers * config.width * 4
        elif header.group_size is None:
            yield name, layers * shapes[name][0] * shapes[name][1] * 4
        else:
            weights = layers * shapes[name][0] * shapes[name][1]
            yield name, weights + weights // header.group_size * 4


def _offsets(header: _Header) -> dict[Place, tuple[int, int]]:
    """Returns the offset and the number of bytes of each weight, in file order."""
    places, offset = {}, header.start
    for name, size in _layout(header):
        stacked = name in LAYER
        count = header.config.num_layers if stacked else 1
        if name != "rope":
            for layer in range(count):
                part = offset + layer * (size // count)
                places[Place(name, layer if stacked else None)] = (part, size // count)
        offset += size
    return places


def _read(path: Path, header: _Header, place: Place, offset: int, size: int) -> np.ndarray:
    with open_regular(path) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) != size:
        raise LlamaJaxError(f"{path}: truncated while reading {place}: expected {size} bytes")
    return _ours(place.name, _decode(data, _matrix_shapes(header.config).get(place.name), header.group_size), header)


def _decode(data: bytes, shape: tuple[int, int] | None, group_size: int | None) -> np.ndarray:
    """Decodes one tensor as float32: a norm if it has no matrix shape, Q8_0 if there is a group size."""
    if shape is None:
        return np.frombuffer(data, "<f4")
    if group_size is None:
        return np.frombuffer(data, "<f4").reshape(shape)
    weights = shape[0] * shape[1]
    codes = np.frombuffer(data, np.int8, weights).reshape(-1, group_size)
    scales = np.frombuffer(data, "<f4", offset=weights)
    return (codes * scales[:, None]).reshape(shape)


def _ours(name: str, array: np.ndarray, header: _Header) -> np.ndarray:
    """Converts [out, in] with pairs as neighbours to [in, out] with pairs as halves; embeddings stay [V, D]."""
    if name in ("attention.query_DQ", "attention.key_DM"):
        array = halves_from_pairs(array, header.config.head_size)
    return array.T if name in LAYER and LAYER[name].transposed else array
