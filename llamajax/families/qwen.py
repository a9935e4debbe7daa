"""Qwen2 and 2.5, with biases; Qwen3, with norms of queries and keys; the R1 distillations of Qwen.

Yang et al. 2024, arXiv:2407.10671; 2025, arXiv:2505.09388. Reference: transformers' `modeling_qwen2.py` and
`modeling_qwen3.py`.
"""

from typing import Any

from llamajax.config import Config, LayerKind
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Family, Format, Keys
from llamajax.families.huggingface import read_windows, write_layer_types
from llamajax.fields import LARGEST_DIMENSION
from llamajax.files import shortened

_DEFAULTS = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def _read_kinds(keys: Keys) -> dict[str, Any]:
    """Reads the kinds of layers: if windows are used, the layers from `max_window_layers` on have one."""
    window, first = keys.whole_or_null("sliding_window"), keys.take("max_window_layers")
    if type(first) is not int or not 0 <= first <= LARGEST_DIMENSION:
        raise LlamaJaxError(f"{keys.source}: max_window_layers is {shortened(first)}: expected a number of layers")
    if not keys.flag("use_sliding_window"):
        window = None
    layers = range(keys.take("num_hidden_layers"))
    pattern: list[LayerKind] = ["window" if window is not None and layer >= first else "full" for layer in layers]
    return read_windows(keys, pattern, window)


def _write_kinds(config: Config) -> dict[str, Any]:
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": write_layer_types(config),
    }


def _read_qwen2(keys: Keys) -> dict[str, Any]:
    keys.only("use_mrope", False)
    return {"qkv_bias": True} | _read_kinds(keys)


QWEN2 = Family(
    "qwen2",
    huggingface=Format(
        kinds=("qwen2",),
        read=_read_qwen2,
        write=_write_kinds,
        defaults=_DEFAULTS,
        architecture="Qwen2ForCausalLM",
    ),
    gguf=Format(kinds=("qwen2",), read=lambda keys: {"qkv_bias": True}),
)


def _read_qwen3(keys: Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias")
    return {"query_key_norm": "head", "qkv_bias": bias, "out_bias": bias} | _read_kinds(keys)


def _write_qwen3(config: Config) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias} | _write_kinds(config)


QWEN3 = Family(
    "qwen3",
    huggingface=Format(
        kinds=("qwen3",),
        read=_read_qwen3,
        write=_write_qwen3,
        defaults=_DEFAULTS | {"head_dim": 128},
        architecture="Qwen3ForCausalLM",
    ),
    gguf=Format(kinds=("qwen3",), read=lambda keys: {"query_key_norm": "head"}),
)
