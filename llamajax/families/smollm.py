"""SmolLM3: a LLaMA without RoPE in every fourth layer (Yang et al. 2025, arXiv:2501.18795).

Reference: transformers' `modeling_smollm3.py`.
"""

from typing import Any

from llamajax.config import MOST_LAYERS, Config
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Family, Format, Keys, Names
from llamajax.families.gguf import kinds_of
from llamajax.families.huggingface import pattern_of, read_layer_types
from llamajax.files import shortened


def _read(keys: Keys) -> dict[str, Any]:
    """Reads `SmolLM3Config`; windows, which no published model uses, are refused."""
    keys.only("use_sliding_window", False)
    keys.read |= {"sliding_window", "max_window_layers"}  # without effect if use_sliding_window is off
    if "window" in read_layer_types(keys, ("full",)):
        raise LlamaJaxError(
            f"{keys.source}: layer_types has sliding_attention: expected full_attention, as use_sliding_window is off"
        )
    bias = keys.flag("attention_bias")
    return {
        "layer_kinds": pattern_of(["full" if turned else "nope" for turned in _turned(keys)]),
        "qkv_bias": bias,
        "out_bias": bias,
        "ffn_bias": keys.flag("mlp_bias"),
    }


def _turned(keys: Keys) -> list[int]:
    """For each layer, whether it has RoPE."""
    layers, every = keys.take("num_hidden_layers"), keys.whole("no_rope_layer_interval", MOST_LAYERS)
    said = keys.take("no_rope_layers", None)
    if said is None:
        return [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(said, list) or len(said) < layers or not all(type(one) is int and one in (0, 1) for one in said):
        raise LlamaJaxError(
            f"{keys.source}: no_rope_layers is {shortened(said)}: expected a list of {layers} numbers, 1 for layers "
            "with RoPE and 0 for those without"
        )
    return said[:layers]


def _write(config: Config) -> dict[str, Any]:
    return {
        "no_rope_layers": [int(config.kind(layer) != "nope") for layer in range(config.num_layers)],
        "layer_types": ["full_attention"] * config.num_layers,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.ffn_bias,
    }


def _read_gguf(keys: Keys) -> dict[str, Any]:
    """Reads SmolLM3's keys. No key says which layers have no RoPE; in llama.cpp it is every fourth layer."""
    return {"layer_kinds": kinds_of(keys.take("block_count"), ("full", "full", "full", "nope"))}


SMOLLM3 = Family(
    "smollm3",
    huggingface=Format(
        kinds=("smollm3",),
        read=_read,
        write=_write,
        defaults={
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        architecture="SmolLM3ForCausalLM",
    ),
    gguf=Format(kinds=("smollm3",), read=_read_gguf, names=Names(pairs=True)),
)
