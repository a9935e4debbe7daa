"""BitNet b1.58 2B4T (Ma et al. 2025, arXiv:2504.12285): squared ReLU, and norms before the output and down projections.

llama.cpp's architecture `bitnet` is the predecessor, a reproduction with 3B parameters (1bitLLM/bitnet_b1_58-3B), which
always uses SiLU. `bitnet-b1.58` and `bitnet-25` are the architectures of Microsoft's fork, in which 2B4T was published.

Ternary weights and int8 activations are not a switch of the family. They are properties of the weights (`quant.QTensor`
with scheme "ternary" and `activations`) and of how the files are packed (`huggingface_quantization`).
"""

from typing import Any

from llamajax.config import Config
from llamajax.families.family import Family, Format, Keys
from llamajax.families.gguf import check_tied


def _read(keys: Keys) -> dict[str, Any]:
    """Reads transformers' `BitNetConfig`: `attention_bias` applies to all four projections of attention."""
    keys.only("hidden_act", "relu2")
    bias = keys.flag("attention_bias")
    return {"sub_norms": True, "activation": "relu_squared", "qkv_bias": bias, "out_bias": bias}


def _write(config: Config) -> dict[str, Any]:
    return {"hidden_act": "relu2", "attention_bias": config.qkv_bias}


def _write_gguf(config: Config) -> dict[str, Any]:
    check_tied(config, "bitnet")
    return {}


def _read_3b_gguf(keys: Keys) -> dict[str, Any]:
    keys.only("hidden_activation", "silu")
    return {"sub_norms": True}


BITNET = Family(
    "bitnet",
    huggingface=Format(
        kinds=("bitnet",),
        read=_read,
        write=_write,
        defaults={
            "vocab_size": 128256,
            "hidden_size": 2560,
            "intermediate_size": 6912,
            "num_hidden_layers": 30,
            "num_attention_heads": 20,
            "num_key_value_heads": 5,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
        },
        architecture="BitNetForCausalLM",
    ),
    gguf=Format(
        kinds=("bitnet-b1.58", "bitnet-25"),
        read=lambda keys: {"sub_norms": True, "activation": "relu_squared"},
        write=_write_gguf,
        int8_tokens=True,
    ),
)
BITNET_3B = Family(
    "bitnet-3b",
    gguf=Format(kinds=("bitnet",), read=_read_3b_gguf, write=_write_gguf, int8_tokens=True),
)
