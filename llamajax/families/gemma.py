"""Gemma, Gemma 2 and the text of Gemma 3: norms of 1 + w, embeddings times sqrt(D), GELU; windows from 2 on.

Gemma Team 2024, arXiv:2403.08295 and arXiv:2408.00118; 2025, arXiv:2503.19786. Reference: transformers'
`modeling_gemma.py`, `modeling_gemma2.py` and `modeling_gemma3.py`.
"""

from typing import Any

from llamajax.config import MOST_LAYERS, Config, LayerKind
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Family, Format, Keys, Names
from llamajax.families.gguf import above_zero, check_tied, query_scale
from llamajax.families.gguf import read_windows as read_gguf_windows
from llamajax.families.gguf import write_windows as write_gguf_windows
from llamajax.families.huggingface import read_windows, write_layer_types

_DEFAULTS = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 16,
    "head_dim": 256,
    "tie_word_embeddings": True,
}
_DEFAULTS_2 = _DEFAULTS | {
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_DEFAULTS_3 = _DEFAULTS_2 | {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_SCORE_CAP, _LOGIT_CAP = "attn_logit_softcapping", "final_logit_softcapping"  # in GGUF
# Files of transformers 5 may have both keys; the second is the older one, and has precedence.
_PATTERN = ("_sliding_window_pattern", "sliding_window_pattern")
# For families in which both halves of a layer have a norm before and after them.
_NAMES = Names(renamed={"ffn_norm.weight_D": "model.layers.{}.pre_feedforward_layernorm.weight"})


def _read(keys: Keys) -> dict[str, Any]:
    """Reads transformers' `GemmaConfig`; "gelu" in early configs means the tanh approximation, as in its code."""
    keys.only("hidden_act", "gelu_pytorch_tanh", "gelu")
    keys.only("hidden_activation", "gelu_pytorch_tanh")
    keys.only("use_bidirectional_attention", False)
    bias, width = keys.flag("attention_bias"), keys.take("hidden_size")
    return {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "embedding_scale": float(width) ** 0.5,
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _write(config: Config) -> dict[str, Any]:
    return {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": config.qkv_bias}


def _read_gguf(keys: Keys) -> dict[str, Any]:
    return {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "embedding_scale": float(keys.number("embedding_length")) ** 0.5,
    }


def _write_gguf(config: Config) -> dict[str, Any]:
    check_tied(config, config.family)
    return {}


GEMMA = Family(
    "gemma",
    huggingface=Format(kinds=("gemma",), read=_read, write=_write, defaults=_DEFAULTS, architecture="GemmaForCausalLM"),
    gguf=Format(kinds=("gemma",), read=_read_gguf, write=_write_gguf),
)


def _read_capped(keys: Keys, pattern: tuple[LayerKind, ...]) -> dict[str, Any]:
    """Reads the keys that Gemma 2 and 3 add, as `Gemma2Config` does; null means no cap."""
    keys.only("cache_implementation", "hybrid")
    keys.only("sliding_window_size", keys.whole_or_null("sliding_window"))
    scalar, head_size = keys.number("query_pre_attn_scalar", low=0.0, above=True), keys.whole_or_null("head_dim")
    return _read(keys) | {
        "norms": "both",
        "query_scale": None if scalar == head_size else scalar**-0.5,
        "score_cap": keys.number_or_null("attn_logit_softcapping"),
        "logit_cap": keys.number_or_null("final_logit_softcapping"),
        **read_windows(keys, pattern, keys.whole_or_null("sliding_window")),
    }


def _write_capped(config: Config) -> dict[str, Any]:
    return _write(config) | {
        "query_pre_attn_scalar": config.head_size if config.query_scale is None else round(config.query_scale**-2),
        "attn_logit_softcapping": config.score_cap,
        "final_logit_softcapping": config.logit_cap,
        "sliding_window": config.window,
        "layer_types": write_layer_types(config),
    }


def _read_gemma2_gguf(keys: Keys) -> dict[str, Any]:
    """Reads Gemma 2's keys; missing caps and a missing window default to Gemma 2's values."""
    return _read_gguf(keys) | {
        "norms": "both",
        "query_scale": query_scale(keys, largest=46),
        "score_cap": above_zero(keys, _SCORE_CAP, 50.0),
        "logit_cap": above_zero(keys, _LOGIT_CAP, 30.0),
        **read_gguf_windows(keys, period=2, default=4096),
    }


def _write_gemma2_gguf(config: Config) -> dict[str, Any]:
    caps = {_SCORE_CAP: config.score_cap, _LOGIT_CAP: config.logit_cap}
    said = {key: cap for key, cap in caps.items() if cap is not None}
    return _write_gguf(config) | said | write_gguf_windows(config, period=2)


GEMMA2 = Family(
    "gemma2",
    huggingface=Format(
        kinds=("gemma2",),
        read=lambda keys: _read_capped(keys, ("window", "full")),
        write=_write_capped,
        defaults=_DEFAULTS_2,
        architecture="Gemma2ForCausalLM",
        names=_NAMES,
    ),
    gguf=Format(kinds=("gemma2",), read=_read_gemma2_gguf, write=_write_gemma2_gguf),
)


def _read_gemma3(keys: Keys) -> dict[str, Any]:
    """Reads `Gemma3TextConfig`: layers with a window have their own RoPE; the pattern is a number in older files."""
    keys.read |= set(_PATTERN)
    *_, size = 6, *(keys.whole(key, MOST_LAYERS) for key in _PATTERN if key in keys)
    local: LayerKind = "window"
    pattern: tuple[LayerKind, ...] = (*[local] * (size - 1), "full")
    read = _read_capped(keys, pattern)
    if read["score_cap"] is not None:
        # transformers has the key but ignores it, so no model can have been trained with it.
        raise LlamaJaxError(f"{keys.source}: attn_logit_softcapping is {read['score_cap']}: expected null for Gemma 3")
    return read | {"query_key_norm": "head"}


def _read_gemma3_gguf(keys: Keys) -> dict[str, Any]:
    """Reads Gemma 3's keys; the RoPE of layers with a window is unscaled, and its theta defaults to 10,000."""
    windows = read_gguf_windows(keys, period=6)
    theta = keys.number("rope.freq_base_swa", 10000.0)
    return _read_gguf(keys) | {
        "norms": "both",
        "query_key_norm": "head",
        "query_scale": query_scale(keys, largest=62),
        "logit_cap": above_zero(keys, _LOGIT_CAP, None),
        "window_rope": {"theta": theta} if windows.get("window") else None,
        **windows,
    }


def _write_gemma3_gguf(config: Config) -> dict[str, Any]:
    said = write_gguf_windows(config, period=6)
    if config.logit_cap is not None:
        said[_LOGIT_CAP] = config.logit_cap
    if config.window is not None:
        said["rope.freq_base_swa"] = config.window_rope.theta if config.window_rope else config.rope_theta
    return said


GEMMA3 = Family(
    "gemma3",
    huggingface=Format(
        kinds=("gemma3_text",),
        read=_read_gemma3,
        write=_write_capped,
        defaults=_DEFAULTS_3,
        architecture="Gemma3ForCausalLM",
        names=_NAMES,
        window_rope=True,
    ),
    gguf=Format(kinds=("gemma3",), read=_read_gemma3_gguf, write=_write_gemma3_gguf),
)
