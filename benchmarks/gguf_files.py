"""Writes GGUF files of any LLaMA weights with the `gguf` package, for benchmarks and tests with llama.cpp.

These files do not depend on `llamajax convert --to=gguf`, need no vocabulary, and can hold given blocks of any type.
"""

import ctypes
import math
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

import llamajax
from llamajax.families import tensors
from llamajax.parameters import Place, specs, weights_of

# (place, Hugging Face's name) -> a tensor in Hugging Face's orientation, or its rows as bytes of blocks.
Read = Callable[[Place, str], np.ndarray]


def write_gguf(path: Path | str, config: llamajax.Config, read: Read, kind: str = "F32") -> None:
    """Writes a model as GGUF, tensor by tensor, without a vocabulary, because llama.cpp is given ids.

    Args:
        path: the file to write.
        config: the architecture, without RoPE scaling.
        read: returns a tensor: floats of any dtype for F32, F16 and BF16; uint8 [M, bytes of a row] for other kinds.
        kind: the type of the matrices. Vectors are float32, as llama.cpp requires.
    """
    assert config.rope_scaling is None, "RoPE scaling is not written"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    written = []
    for theirs, (place,) in tensors(config, "huggingface").items():
        shape = stored_shape(config, place)
        stored = gguf.GGMLQuantizationType[kind if len(shape) == 2 else "F32"]
        block, size = gguf.GGML_QUANT_SIZES[stored]
        length = math.prod(shape) // block * size
        name = names.get_name(theirs, (".weight",))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), length, raw_dtype=stored)
        written.append((place, theirs, stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for place, theirs, stored in written:
        array = read(place, theirs)
        if array.dtype != np.uint8:
            array = gguf.quantize(np.ascontiguousarray(array, np.float32), stored)
        if place.name in ("attention.query_DQ", "attention.key_DM"):
            array = _pairs_from_halves(array, config.head_size)
        writer.write_tensor_data(np.ascontiguousarray(array))
    writer.close()


def stored_shape(config: llamajax.Config, place: Place) -> tuple[int, ...]:
    """The shape of a tensor in the orientation of Hugging Face and GGUF: outputs first."""
    spec = specs(config)[place]
    return spec.shape(config)[::-1] if spec.transposed else spec.shape(config)


def read_model(model: llamajax.Llama) -> Read:
    """Makes a `read` for `write_gguf` from a model, whose float weights are [in, out] and the embedding [V, D]."""
    weights = {place: np.asarray(weight) for place, weight in weights_of(model).items()}
    return lambda place, theirs: weights[place].T if specs(model.config)[place].transposed else weights[place]


def read_random(config: llamajax.Config, seed: int = 0) -> Read:
    """Makes a `read` for `write_gguf` that draws floats as large as at the start of training; norms are ones."""
    generator = np.random.default_rng(seed)

    def read(place: Place, theirs: str) -> np.ndarray:
        del theirs
        shape = stored_shape(config, place)
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return generator.standard_normal(shape, np.float32) * np.float32(0.02)

    return read


def _pairs_from_halves(rows: np.ndarray, head_size: int) -> np.ndarray:
    """Reorders rows of queries or keys so that rows that rotate together are neighbours, as in llama.cpp's LLaMA.

    The inverse of `checkpoint.source.halves_from_pairs`; the same as `permute` in llama.cpp's convert_hf_to_gguf.py.
    """
    heads = rows.reshape(-1, 2, head_size // 2, rows.shape[-1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


# ---- llama.cpp's quantizer ------------------------------------------------------------------------------------------


def quantize_gguf(
    source: Path | str,
    target: Path | str,
    kind: str,
    importance: dict[str, np.ndarray] | None = None,
    *,
    threads: int = 2,
    pure: bool = False,
) -> None:
    """Quantizes a file with llama.cpp's own quantizer (needs the extra `llamacpp`).

    Args:
        source: a GGUF file of floats; of any types for ALL_F32.
        target: the file to write.
        kind: a file type of llama.h without its prefix, say MOSTLY_Q4_K_M, or ALL_F32.
        importance: tensor name -> mean squares of the inputs.
        threads: the number of threads.
        pure: whether all matrices get the same type.
    """
    import llama_cpp

    llama_cpp._logger.set_verbose(False)
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    params.allow_requantize, params.pure = kind == "ALL_F32", pure
    if importance:
        entry = llama_cpp.llama_model_imatrix_data
        floats = ctypes.POINTER(ctypes.c_float)
        entries = [entry(name.encode(), mean.ctypes.data_as(floats), mean.size) for name, mean in importance.items()]
        params.imatrix = (entry * (len(entries) + 1))(*entries)  # The last entry stays null and marks the end.
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not quantize {source} to {kind}")


def tensors_of(path: Path | str) -> tuple[dict[str, str], int, int]:
    """Returns the type of each tensor of a GGUF file, the bytes of all tensors, and their elements."""
    held = gguf.GGUFReader(path).tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in held}
    return kinds, sum(int(tensor.n_bytes) for tensor in held), sum(int(tensor.n_elements) for tensor in held)
