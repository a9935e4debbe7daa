"""Phi-3, Phi-3.5 mini and Phi-4 mini: query, key and value in one matrix, gate and up in another; longrope.

Abdin et al. 2024, arXiv:2404.14219. Reference: transformers' `modeling_phi3.py`.
"""

from typing import Any

from llamajax.config import Config
from llamajax.families.family import Family, Format, Keys, Names


def _read(keys: Keys) -> dict[str, Any]:
    """`Phi3Config`: a window is that of all layers."""
    window = keys.or_null("sliding_window")
    keys.only("lm_head_bias", False)
    return {"layer_kinds": ("full" if window is None else "window",), "window": window}


def _write(config: Config) -> dict[str, Any]:
    return {"sliding_window": config.window}


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
                "model.layers.{}.self_attn.qkv_proj.weight": (
                    "attention.query_DQ",
                    "attention.key_DM",
                    "attention.value_DM",
                ),
                "model.layers.{}.mlp.gate_up_proj.weight": ("ffn.gate_DF", "ffn.up_DF"),
            }
        ),
    ),
)
