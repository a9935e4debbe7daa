"""Architecture names of GGUF files, and the order of rows in their tensors."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from llamajax.checkpoint.source import halves_order
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families import FAMILIES
from llamajax.families.family import format_of
from llamajax.files import shortened

# Tensors that no program reads: inverse frequencies as in Meta's own files, which old converters wrote (llama.cpp's
# MODEL_TENSOR_SKIP, gguf-py/gguf/constants.py).
UNUSED = ("attn_rot_embd.weight",)
# Weights whose outputs RoPE rotates. The value is the field of `Config` with the number of heads, or "" for a weight
# that all heads share.
_ROTATED = {
    "attention.query_DQ": "num_heads",
    "attention.query_bias_Q": "num_heads",
    "attention.query_norm_Q": "num_heads",
    "attention.query_norm_H": "",
    "attention.key_DM": "num_kv_heads",
    "attention.key_bias_M": "num_kv_heads",
    "attention.key_norm_M": "num_kv_heads",
    "attention.key_norm_H": "",
}


def row_orders(config: Config) -> Mapping[str, np.ndarray]:
    """Returns, by weight name, the file's row for each row of ours; weights with equal orders are left out.

    In files of some architectures (`Names.pairs`), the two coordinates that RoPE rotates are neighbours (2i, 2i + 1).
    llama.cpp decides this by the architecture's name alone: `llama_model_rope_type` in src/llama-model.cpp,
    LLAMA_ROPE_TYPE_NORM. Its converter reorders the rows of a Hugging Face model for them (`permute`).
    """
    if not format_of(config, "gguf").names.pairs:
        return MappingProxyType({})
    return MappingProxyType(
        {
            name: halves_order((getattr(config, heads) if heads else 1) * config.head_size, config.head_size)
            for name, heads in _ROTATED.items()
        }
    )


def architecture_of(path: object, metadata: Mapping[str, object]) -> str:
    """Returns the architecture of a file that holds a language model.

    Raises:
        LlamaJaxError: for a file that holds something else, which the message names, or an unsupported architecture.
    """
    name, kind = metadata.get("general.architecture"), metadata.get("general.type")
    others = {
        "mmproj": "a multimodal projector (images or sound, for llama.cpp's --mmproj)",
        "adapter": f"an adapter ({shortened(metadata.get('adapter.type', 'lora'))}) for a model",
        "imatrix": "an importance matrix, statistics for llama.cpp's quantizer",
        "vocab": "a vocabulary",
        "clip": "a multimodal projector (images or sound, for llama.cpp's --mmproj)",
    }
    found = others.get(str(kind)) or others.get(str(name))
    if found is None and kind is not None and str(kind) != "model":
        found = f"of general.type {shortened(kind)}"
    if found is not None:
        raise LlamaJaxError(f"{path}: is {found}, not a language model: give the file of the model itself")
    known = [kind for family in FAMILIES.values() if family.gguf is not None for kind in family.gguf.kinds]
    if not isinstance(name, str) or name not in known:
        what = f"architecture {shortened(name)} is not supported" if name is not None else "names no architecture"
        expected = ", ".join(dict.fromkeys(known))
        raise LlamaJaxError(f"{path}: {what}: expected general.architecture to be one of {expected}")
    return name
