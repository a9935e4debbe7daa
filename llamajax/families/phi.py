"""Phi-3, Phi-3.5 mini and Phi-4 mini: query, key and value in one matrix, gate and up in another; longrope.

Abdin et al. 2024, arXiv:2404.14219. Reference: transformers' `modeling_phi3.py`.
"""

from typing import Any

from llamajax.config import Config
from llamajax.families.family import Family, Format, Keys, Names
from llamajax.families.gguf import read_window, write_window
from llamajax.families.huggingface import read_window_of_all
from llamajax.fields import check_whole


def _read(keys: Keys) -> dict[str, Any]:
    """Reads `Phi3Config`: a window applies to all layers."""
    keys.only("lm_head_bias", False)
    keys.only("full_attn_mod", 1)
    keys.only("interpolate_factor", 1)
    return read_window_of_all(keys)


def _write(config: Config) -> dict[str, Any]:
    return {"sliding_window": config.window}


def _read_gguf(keys: Keys) -> dict[str, Any]:
    """Reads Phi-3's keys: a window applies to all layers. llama.cpp ignores it, and warns that results may suffer."""
    head_size = keys.take("attention.key_length", keys.take("embedding_length") // keys.take("attention.head_count"))
    rotated = keys.take("rope.dimension_count", head_size)
    check_whole(f"{keys.source}: {keys.prefix}rope.dimension_count", rotated, head_size)
    return read_window(keys) | {"rope_fraction": rotated / head_size}


_QKV = ("attention.query_DQ", "attention.key_DM", "attention.value_DM")
_GATE_UP = ("ffn.gate_DF", "ffn.up_DF")

PHI3 = Family(
    "phi3",
    huggingface=Format(
        kinds=("phi3",),
        read=_read,
        write=_write,
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu"},
        architecture="Phi3ForCausalLM",
        partial_rope=True,
        names=Names(
            fused={
                "model.layers.{}.self_attn.qkv_proj.weight": _QKV,
                "model.layers.{}.mlp.gate_up_proj.weight": _GATE_UP,
            }
        ),
    ),
    gguf=Format(
        kinds=("phi3",),
        read=_read_gguf,
        write=write_window,
        partial_rope=True,
        names=Names(fused={"blk.{}.attn_qkv.weight": _QKV, "blk.{}.ffn_up.weight": _GATE_UP}),
    ),
)
