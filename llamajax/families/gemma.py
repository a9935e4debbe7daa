"""Gemma, Gemma 2 and the text of Gemma 3: norms of 1 + w, embeddings times sqrt(D), GELU; windows from 2 on.

Gemma Team 2024, arXiv:2403.08295 and arXiv:2408.00118; 2025, arXiv:2503.19786. Reference: transformers'
`modeling_gemma.py`, `modeling_gemma2.py` and `modeling_gemma3.py`.
"""

from typing import Any

from llamajax.config import MOST_LAYERS, Config, LayerKind
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Family, Format, Keys, Names
from llamajax.families.huggingface import read_windows, write_layer_types
from llamajax.fields import check_whole

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
# Where both halves of a layer have a norm before and one behind.
_NAMES = Names(renamed={"ffn_norm.weight_D": "model.layers.{}.pre_feedforward_layernorm.weight"})


def _read(keys: Keys) -> dict[str, Any]:
    """Transformers' `GemmaConfig`; its early configs say "gelu" and mean that by tanh, as its code does."""
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


GEMMA = Family(
    "gemma",
    huggingface=Format(kinds=("gemma",), read=_read, write=_write, defaults=_DEFAULTS, architecture="GemmaForCausalLM"),
)


def _read_capped(keys: Keys, pattern: tuple[LayerKind, ...]) -> dict[str, Any]:
    """What Gemma 2 and 3 add, by `Gemma2Config`; null is no cap."""
    keys.only("cache_implementation", "hybrid")
    keys.only("sliding_window_size", keys.or_null("sliding_window"))
    scalar, head_size = keys.number("query_pre_attn_scalar"), keys.or_null("head_dim")
    if scalar <= 0:
        raise LlamaJaxError(f"{keys.source}: query_pre_attn_scalar is {scalar}: expected a number above 0")
    return _read(keys) | {
        "norms": "both",
        "query_scale": None if scalar == head_size else scalar**-0.5,
        "score_cap": keys.or_null("attn_logit_softcapping"),
        "logit_cap": keys.or_null("final_logit_softcapping"),
        **read_windows(keys, pattern, keys.or_null("sliding_window")),
    }


def _write_capped(config: Config) -> dict[str, Any]:
    return _write(config) | {
        "query_pre_attn_scalar": config.head_size if config.query_scale is None else round(config.query_scale**-2),
        "attn_logit_softcapping": config.score_cap,
        "final_logit_softcapping": config.logit_cap,
        "sliding_window": config.window,
        "layer_types": write_layer_types(config),
    }


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
)


def _read_gemma3(keys: Keys) -> dict[str, Any]:
    """`Gemma3TextConfig`: layers with a window have a RoPE of their own; the pattern was a number before a list."""
    size = keys.take("sliding_window_pattern", keys.take("_sliding_window_pattern", 6))
    check_whole(f"{keys.source}: sliding_window_pattern", size, MOST_LAYERS)
    read = _read_capped(keys, ("window",) * (size - 1) + ("full",))
    if read["score_cap"] is not None:
        # transformers keeps the key and does without it: nobody can have trained with it.
        raise LlamaJaxError(f"{keys.source}: attn_logit_softcapping is {read['score_cap']}: expected null of a Gemma 3")
    return read | {"query_key_norm": "head"}


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
)
