"""LLaMA 1, 2, 3, Code Llama, TinyLlama, SmolLM2, Yi and the R1 distillations of Llama (Touvron et al. 2023)."""

from typing import Any

from llamajax.config import Config
from llamajax.families.family import Family, Format, Keys, Names


def _read(keys: Keys) -> dict[str, Any]:
    """Transformers' `LlamaConfig`: biases of attention are on all four projections."""
    keys.only("hidden_act", "silu")
    bias = keys.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias, "ffn_bias": keys.flag("mlp_bias")}


def _write(config: Config) -> dict[str, Any]:
    return {"hidden_act": "silu", "attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}


FAMILY = Family(
    "llama",
    huggingface=Format(
        kinds=("llama",),
        read=_read,
        write=_write,
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        architecture="LlamaForCausalLM",
    ),
    gguf=Format(kinds=("llama",), names=Names(pairs=True)),
)
