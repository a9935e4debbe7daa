"""LLaMA 1, 2, 3, Code Llama, TinyLlama, SmolLM2, Yi, the R1 distillations of Llama, and copies under other names.

Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783.
"""

from typing import Any

from llamajax.config import Config
from llamajax.families.family import Family, Format, Keys, Names

_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
# Transformers' classes that differ from `LlamaConfig` in these defaults only. InternLM3 names the biases `qkv_bias` and
# `bias`; these are refused if they are true, as in no published model.
_COPIES = {
    "internlm3": {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "num_key_value_heads": 2, "head_dim": 128},
    "iquestcoder": {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128},
}


def _read(keys: Keys) -> dict[str, Any]:
    """Reads transformers' `LlamaConfig`: `attention_bias` applies to all four projections of attention."""
    bias = keys.flag("attention_bias")
    return {"qkv_bias": bias, "out_bias": bias, "ffn_bias": keys.flag("mlp_bias")}


def _write(config: Config) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.ffn_bias}


FAMILY = Family(
    "llama",
    huggingface=Format(
        kinds=("llama",),
        read=_read,
        write=_write,
        defaults=_DEFAULTS,
        architecture="LlamaForCausalLM",
        copies=_COPIES,
    ),
    gguf=Format(kinds=("llama",), names=Names(pairs=True)),
)


def _read_seed(keys: Keys) -> dict[str, Any]:
    """Reads transformers' `SeedOssConfig`, which has a separate key for the bias of attention's output."""
    return {
        "qkv_bias": keys.flag("attention_bias"),
        "out_bias": keys.flag("attention_out_bias"),
        "ffn_bias": keys.flag("mlp_bias"),
    }


def _write_seed(config: Config) -> dict[str, Any]:
    return _write(config) | {"attention_out_bias": config.out_bias}


# Seed-OSS of ByteDance.
SEED_OSS = Family(
    "seed_oss",
    huggingface=Format(
        kinds=("seed_oss",),
        read=_read_seed,
        write=_write_seed,
        defaults=_DEFAULTS
        | {
            "max_position_embeddings": 524288,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
        },
        architecture="SeedOssForCausalLM",
    ),
)
