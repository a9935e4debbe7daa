"""Granite: a LLaMA with multipliers on embeddings, scores and residuals, and a divisor of logits.

Reference: transformers' `modeling_granite.py`.
"""

import functools
import math
from typing import Any

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Family, Format, Keys, Names
from llamajax.families.gguf import above_zero, scale


def _read(keys: Keys) -> dict[str, Any]:
    bias, number = keys.flag("attention_bias"), functools.partial(keys.number, low=0.0, above=True)
    return {
        "qkv_bias": bias,
        "out_bias": bias,
        "ffn_bias": keys.flag("mlp_bias"),
        "embedding_scale": number("embedding_multiplier"),
        "residual_scale": number("residual_multiplier"),
        "query_scale": number("attention_multiplier"),
        "logit_scale": 1 / number("logits_scaling"),
    }


def _write(config: Config) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.ffn_bias,
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.score_scale,
        "logits_scaling": _divisor(config.logit_scale),
    }


def _divisor(scale: float) -> float:
    """The number whose rounded inverse is `scale`: 1 / scale, or a neighbouring float."""
    near = 1 / scale
    return next(
        (one for one in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)) if 1 / one == scale), near
    )


def _read_gguf(keys: Keys) -> dict[str, Any]:
    """Reads Granite's keys. For llama.cpp, "finetuned" states whether the model has RoPE at all."""
    keys.only("rope.scaling.finetuned", True)
    divisor = above_zero(keys, "logit_scale", None)
    if divisor is None:
        raise LlamaJaxError(f"{keys.source}: missing key {keys.prefix + 'logit_scale'!r}: expected a number")
    return {
        "embedding_scale": scale(keys, "embedding_scale") or 1.0,
        "residual_scale": scale(keys, "residual_scale") or 1.0,
        "query_scale": scale(keys, "attention.scale"),
        "logit_scale": 1 / divisor,
    }


def _write_gguf(config: Config) -> dict[str, Any]:
    return {
        "embedding_scale": config.embedding_scale,
        "residual_scale": config.residual_scale,
        "attention.scale": config.score_scale,
        "logit_scale": _divisor(config.logit_scale),
    }


GRANITE = Family(
    "granite",
    huggingface=Format(
        kinds=("granite",),
        read=_read,
        write=_write,
        defaults={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        architecture="GraniteForCausalLM",
    ),
    gguf=Format(kinds=("granite",), read=_read_gguf, write=_write_gguf, names=Names(pairs=True)),
)
