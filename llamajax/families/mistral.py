"""Mistral, Ministral and Ministral 3: a window in all layers, in some, in none.

Jiang et al. 2023, arXiv:2310.06825. Reference: transformers' `modeling_mistral.py`, `modeling_ministral.py` and
`modeling_ministral3.py`.
"""

from typing import Any

from llamajax.config import Config
from llamajax.families.family import Family, Format, Keys
from llamajax.families.huggingface import read_windows, write_layer_types

_DEFAULTS = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def _read(keys: Keys) -> dict[str, Any]:
    """Transformers' `MistralConfig`: a window is that of all layers; null, from version 0.2 on, is none."""
    window = keys.or_null("sliding_window")
    return {"layer_kinds": ("full" if window is None else "window",), "window": window}


def _write(config: Config) -> dict[str, Any]:
    return {"sliding_window": config.window}


MISTRAL = Family(
    "mistral",
    huggingface=Format(
        kinds=("mistral",), read=_read, write=_write, defaults=_DEFAULTS, architecture="MistralForCausalLM"
    ),
)


def _read_ministral(keys: Keys) -> dict[str, Any]:
    window = keys.or_null("sliding_window")
    return read_windows(keys, ("full" if window is None else "window",), window)


def _write_ministral(config: Config) -> dict[str, Any]:
    return {"sliding_window": config.window, "layer_types": write_layer_types(config)}


MINISTRAL = Family(
    "ministral",
    huggingface=Format(
        kinds=("ministral",),
        read=_read_ministral,
        write=_write_ministral,
        defaults=_DEFAULTS,
        architecture="MinistralForCausalLM",
    ),
)
