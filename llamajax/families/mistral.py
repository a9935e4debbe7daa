"""Mistral, Ministral and Ministral 3: a window in all layers, in some layers, or in none.

Jiang et al. 2023, arXiv:2310.06825. Reference: transformers' `modeling_mistral.py`, `modeling_ministral.py` and
`modeling_ministral3.py`.
"""

from typing import Any

from llamajax.config import Config
from llamajax.families.family import Family, Format, Keys, Names
from llamajax.families.gguf import has_window, read_window, scale, write_window
from llamajax.families.huggingface import read_window_of_all, read_windows, write_layer_types
from llamajax.families.huggingface_rope import rope_value

_DEFAULTS = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def _read(keys: Keys) -> dict[str, Any]:
    """Reads transformers' `MistralConfig`: a window applies to all layers; null (from version 0.2 on) means none."""
    return read_window_of_all(keys)


def _write(config: Config) -> dict[str, Any]:
    return {"sliding_window": config.window}


MISTRAL = Family(
    "mistral",
    huggingface=Format(
        kinds=("mistral",), read=_read, write=_write, defaults=_DEFAULTS, architecture="MistralForCausalLM"
    ),
    # llama.cpp has no architecture for Mistral, and ignores the window.
    gguf=Format(
        kinds=("llama",),
        read=read_window,
        write=lambda config: write_window(config) if config.window else {},
        names=Names(pairs=True),
        applies=has_window,
    ),
)


def _read_ministral(keys: Keys) -> dict[str, Any]:
    window = keys.whole_or_null("sliding_window")
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


def _read_ministral3(keys: Keys) -> dict[str, Any]:
    """Reads `Ministral3Config`: the RoPE parameters also say how queries grow, and from which length on."""
    rope_value(keys, "max_position_embeddings")  # has no effect there
    beta = rope_value(keys, "llama_4_scaling_beta")
    length = rope_value(keys, "original_max_position_embeddings", own=False)
    temperature = {"beta": beta, "length": keys.take("max_position_embeddings") if length is None else length}
    return _read(keys) | {"query_temperature": None if beta is None else temperature}


def _write_ministral3(config: Config) -> dict[str, Any]:
    temperature = config.query_temperature
    own = {} if temperature is None else {"rope_scaling": {"llama_4_scaling_beta": temperature.beta}}
    return _write(config) | own


_BETA, _ORIGINAL = "attention.temperature_scale", "rope.scaling.original_context_length"  # in GGUF


def _read_ministral3_gguf(keys: Keys) -> dict[str, Any]:
    """Reads Ministral 3's keys; queries grow beyond YaRN's original context."""
    beta = scale(keys, _BETA)
    if beta is None:
        return {}
    return {"query_temperature": {"beta": beta, "length": keys.take(_ORIGINAL, keys.take("context_length"))}}


def _write_ministral3_gguf(config: Config) -> dict[str, Any]:
    temperature = config.query_temperature
    if temperature is None:
        return {}
    said = {_BETA: temperature.beta}
    return said if config.rope_scaling is not None else said | {_ORIGINAL: temperature.length}


MINISTRAL3 = Family(
    "ministral3",
    huggingface=Format(
        kinds=("ministral3",),
        read=_read_ministral3,
        write=_write_ministral3,
        defaults={
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        architecture="Ministral3ForCausalLM",
    ),
    gguf=Format(kinds=("mistral3",), read=_read_ministral3_gguf, write=_write_ministral3_gguf, names=Names(pairs=True)),
)
