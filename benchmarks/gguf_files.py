"""GGUF files that benchmarks and tests give llama.cpp, written by the `gguf` package: any weights of a LLaMA's shape.

Ours are written by `llamajax convert --to=gguf`; these are independent of it, need no vocabulary, and hold blocks of
any type as they are given.
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

# (its place, Hugging Face's name) -> a tensor in Hugging Face's orientation, or its rows as bytes of blocks.
Read = Callable[[Place, str], np.ndarray]


def write_gguf(path: Path | str, config: llamajax.Config, read: Read, kind: str = "F32") -> None:
    """Writes a model as GGUF, tensor by tensor, without a vocabulary: llama.cpp is given ids.

    Args:
        path: file to write.
        config: the architecture, without RoPE scaling.
        read: floats of any dtype for F32, F16 and BF16; uint8 [M, bytes of a row] for other kinds.
        kind: of the matrices. Vectors are float32, as llama.cpp wants them.
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
    """Of a tensor in Hugging Face's orientation, which is GGUF's: outputs first."""
    spec = specs(config)[place]
    return spec.shape(config)[::-1] if spec.transposed else spec.shape(config)


def read_model(model: llamajax.Llama) -> Read:
    """A `read` of `write_gguf`: our float weights are [in, out], the embedding [V, D]."""
    weights = {place: np.asarray(weight) for place, weight in weights_of(model).items()}
    return lambda place, theirs: weights[place].T if specs(model.config)[place].transposed else weights[place]


def read_random(config: llamajax.Config, seed: int = 0) -> Read:
    """A `read` of `write_gguf`: random floats, as large as training starts from; norms are ones."""
    generator = np.random.default_rng(seed)

    def read(place: Place, theirs: str) -> np.ndarray:
        del theirs
        shape = stored_shape(config, place)
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return generator.standard_normal(shape, np.float32) * np.float32(0.02)

    return read


def _pairs_from_halves(rows: np.ndarray, head_size: int) -> np.ndarray:
    """Reorders the rows of a query or key projection to neighbours that rotate together, as llama.cpp's LLaMA does.

    The inverse of `checkpoint.source.halves_from_pairs`; `permute` in llama.cpp's convert_hf_to_gguf.py.
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
    """llama.cpp's own quantization of a file, by the extra `llamacpp`.

    Args:
        source: of floats; of anything for ALL_F32.
        target: file to write.
        kind: a file type of llama.h without its prefix, say MOSTLY_Q4_K_M, or ALL_F32.
        importance: tensor name -> mean squares of the inputs.
        threads: that quantize.
        pure: give all matrices the one type.
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
        params.imatrix = (entry * (len(entries) + 1))(*entries)  # The last one stays null: the end.
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp could not quantize {source} to {kind}")


def tensors_of(path: Path | str) -> tuple[dict[str, str], int, int]:
    """A GGUF file's tensors: the type of each, the bytes of all, the elements of all."""
    held = gguf.GGUFReader(path).tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in held}
    return kinds, sum(int(tensor.n_bytes) for tensor in held), sum(int(tensor.n_elements) for tensor in held)
