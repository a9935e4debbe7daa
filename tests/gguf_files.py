"""GGUF files for tests, written by the `gguf` package: tiny LLaMAs whose tensors have whatever type a test asks for."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import llamajax

Kind = gguf.GGMLQuantizationType

CONFIG = llamajax.Config(
    vocab_size=320,
    width=256,
    ffn_width=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=64,
    context_length=128,
    tied_embeddings=True,
)

# Places of float16 numbers in a block, from ggml-common.h.
_HALVES = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q6_K: (208,),
    Kind.TQ1_0: (52,),
    Kind.TQ2_0: (64,),
    **dict.fromkeys((Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K), (0, 2)),
}
# Largest scale of a block, so that weights stay below about 0.5.
_LARGEST = {Kind.Q8_0: 0.003, Kind.Q3_K: 0.004, Kind.Q4_K: 0.0005, Kind.Q5_K: 0.0003, Kind.Q6_K: 0.0001}
_NO_HALVES = (Kind.MXFP4, Kind.NVFP4, Kind.IQ1_M)


def blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Returns blocks of random codes and small scales, uint8 [rows, bytes], also such as no quantizer would write."""
    rng = np.random.default_rng([seed, int(kind), rows, columns])
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        floats = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
        return np.ascontiguousarray(gguf.quants.quantize(floats, kind)).view(np.uint8).reshape(rows, -1)
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    made = rng.integers(0, 256, (rows * columns // weights, nbytes), np.uint8)
    if kind not in _NO_HALVES:
        for at in _HALVES.get(kind, (0,)):
            scales = (rng.uniform(-1, 1, len(made)) * _LARGEST.get(kind, 0.01)).astype("<f2")
            made[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    elif kind == Kind.MXFP4:
        made[:, 0] = rng.integers(116, 122, len(made))
    elif kind == Kind.NVFP4:
        made[:, :4] = rng.integers(0x10, 0x20, (len(made), 4))
    else:  # the scale's upper four bits
        made[:, -1] = made[:, -1] & 0x0F | 0x20
    return made.reshape(rows, -1)


def dequantized(data: np.ndarray, kind: Kind) -> np.ndarray:
    """Dequantizes by the gguf package; Q1_0 as ggml-quants.c does: bit 1 is the scale, bit 0 its negative."""
    if kind != Kind.Q1_0:
        return np.asarray(gguf.quants.dequantize(data, kind), np.float32)
    made = data.reshape(-1, 18)
    scale = made[:, :2].copy().view("<f2").astype(np.float32)
    return np.where(np.unpackbits(made[:, 2:], axis=1, bitorder="little") == 1, scale, -scale).reshape(len(data), -1)


def shapes(config: llamajax.Config) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a LLaMA's tensors, rows first, by llama.cpp's names."""
    width, queries, keys = config.width, config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    layer = {
        "attn_norm": (width,),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_norm": (width,),
        "ffn_gate": (config.ffn_width, width),
        "ffn_up": (config.ffn_width, width),
        "ffn_down": (width, config.ffn_width),
    }
    made: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, width)}
    for number in range(config.num_layers):
        made |= {f"blk.{number}.{name}.weight": shape for name, shape in layer.items()}
    made |= {"output_norm.weight": (width,)}
    return made if config.tied_embeddings else made | {"output.weight": (config.vocab_size, width)}


def metadata_of(config: llamajax.Config) -> dict[str, Any]:
    """Returns the metadata that converters write for a LLaMA: unsigned integers and floats of 32 bits."""
    return {
        "general.name": "tiny",
        "general.type": "model",
        "llama.block_count": np.uint32(config.num_layers),
        "llama.context_length": np.uint32(config.context_length),
        "llama.embedding_length": np.uint32(config.width),
        "llama.feed_forward_length": np.uint32(config.ffn_width),
        "llama.attention.head_count": np.uint32(config.num_heads),
        "llama.attention.head_count_kv": np.uint32(config.num_kv_heads),
        "llama.attention.layer_norm_rms_epsilon": np.float32(config.norm_eps),
        "llama.rope.freq_base": np.float32(config.rope_theta),
        "llama.rope.dimension_count": np.uint32(config.head_size),
        "llama.vocab_size": np.uint32(config.vocab_size),
        "general.quantization_version": np.uint32(2),
    }


@dataclasses.dataclass
class Made:
    """A file and its content.

    Attributes:
        path: the file.
        config: config of the model.
        blocks: type and uint8 [rows, bytes], little-endian, of each tensor.
    """

    path: Path
    config: llamajax.Config
    blocks: dict[str, tuple[Kind, np.ndarray]]

    def weights(self) -> dict[str, np.ndarray]:
        """Dequantizes each tensor by the gguf package, to float32, in the file's orientation and RoPE layout."""
        made = {}
        for name, (kind, data) in self.blocks.items():
            shape = shapes(self.config).get(name, (-1,))
            made[name] = dequantized(data, kind).reshape(shape)
        return made


_VALUE_TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    str: gguf.GGUFValueType.STRING,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    np.uint16: gguf.GGUFValueType.UINT16,
    np.uint32: gguf.GGUFValueType.UINT32,
    np.int32: gguf.GGUFValueType.INT32,
    np.uint64: gguf.GGUFValueType.UINT64,
    np.float32: gguf.GGUFValueType.FLOAT32,
    np.float64: gguf.GGUFValueType.FLOAT64,
}


def write(
    path: Path,
    kind: Kind | Callable[[str], Kind] = Kind.F32,
    config: llamajax.Config = CONFIG,
    metadata: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    **options: Any,
) -> Made:
    """Writes a model.

    Args:
        path: file to write.
        kind: type of all matrices, or a function from a tensor's name to its type.
        config: config of the model.
        metadata: keys with other values; None leaves a key out.
        extra: float32 tensors beside the model's.
        options: options of `gguf.GGUFWriter`.
    """
    made = {}
    for number, (name, shape) in enumerate(shapes(config).items()):
        if len(shape) == 1:
            norm = np.random.default_rng(number).uniform(0.5, 1.5, shape).astype(np.float32)
            made[name] = (Kind.F32, norm.view(np.uint8).reshape(1, -1))
        else:
            of_this = kind(name) if callable(kind) and not isinstance(kind, Kind) else kind
            made[name] = (of_this, blocks(of_this, *shape, seed=number))
    values = metadata_of(config) | dict(metadata or {})
    architecture = values.pop("general.architecture", "llama")
    writer = gguf.GGUFWriter(path, architecture, **options)
    for key, value in values.items():
        if isinstance(value, list | np.ndarray):
            writer.add_array(key, list(value))
        elif value is not None:
            writer.add_key_value(key, value if isinstance(value, str) else value, _VALUE_TYPES[type(value)])
    for name, (of_this, data) in made.items():
        if len(shapes(config)[name]) == 1:
            writer.add_tensor(name, data.reshape(-1).view("<f4"))
        else:
            stored = data.view("<f4") if of_this == Kind.F32 else data.view("<f2") if of_this == Kind.F16 else data
            writer.add_tensor(name, stored, raw_dtype=of_this)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
        made[name] = (Kind.F32, np.ascontiguousarray(array, "<f4").view(np.uint8).reshape(1, -1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Made(path, config, made)
