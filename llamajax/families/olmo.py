"""OLMo 2, with norms after each half of a layer, and of queries and keys over the full width; OLMo 3 adds windows.

OLMo et al. 2025, arXiv:2501.00656. Reference: transformers' `modeling_olmo2.py` and `modeling_olmo3.py`.
"""

from typing import Any

from llamajax.config import Config
from llamajax.families.family import Family, Format, Keys
from llamajax.families.gguf import has_window
from llamajax.families.gguf import read_windows as read_gguf_windows
from llamajax.families.gguf import write_windows as write_gguf_windows
from llamajax.families.huggingface import read_windows, write_layer_types

_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "hidden_act": "silu"}


def _read(keys: Keys) -> dict[str, Any]:
    keys.only("clip_qkv")  # a key of the first OLMo
    bias = keys.flag("attention_bias")
    return {"norms": "after", "query_key_norm": "width", "qkv_bias": bias, "out_bias": bias}


def _write(config: Config) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias}


def _read_gguf(keys: Keys) -> dict[str, Any]:
    return {"norms": "after", "query_key_norm": "width"}


OLMO2 = Family(
    "olmo2",
    huggingface=Format(kinds=("olmo2",), read=_read, write=_write, defaults=_DEFAULTS, architecture="Olmo2ForCausalLM"),
    gguf=Format(kinds=("olmo2",), read=_read_gguf),
)


def _read_olmo3(keys: Keys) -> dict[str, Any]:
    """Reads `Olmo3Config`: `rope_scaling` applies only to layers without a window."""
    return _read(keys) | read_windows(keys, ("window",) * 3 + ("full",), keys.whole_or_null("sliding_window"))


def _write_olmo3(config: Config) -> dict[str, Any]:
    return _write(config) | {"sliding_window": config.window, "layer_types": write_layer_types(config)}


def _read_olmo3_gguf(keys: Keys) -> dict[str, Any]:
    """Reads OLMo 3's keys; in llama.cpp, layers with windows have the same theta, unscaled."""
    theta = keys.number("rope.freq_base", 10000.0)
    keys.only("rope.freq_base_swa", theta)
    return _read_gguf(keys) | read_gguf_windows(keys, period=4) | {"window_rope": {"theta": theta}}


OLMO3 = Family(
    "olmo3",
    huggingface=Format(
        kinds=("olmo3",),
        read=_read_olmo3,
        write=_write_olmo3,
        defaults=_DEFAULTS | {"sliding_window": 4096, "rope_theta": 5e5},
        architecture="Olmo3ForCausalLM",
        window_rope=True,
    ),
    gguf=Format(
        kinds=("olmo2",),
        read=_read_olmo3_gguf,
        write=lambda config: write_gguf_windows(config, period=4),
        applies=has_window,
    ),
)
