"""EXAONE 4: norms behind each half of a layer, norms of queries and keys; windows, and no RoPE in the layers without.

LG AI Research 2025, arXiv:2507.11407. Reference: transformers' `modeling_exaone4.py`.
"""

from typing import Any

from llamajax.config import MOST_LAYERS, Config, LayerKind
from llamajax.families.family import Family, Format, Keys
from llamajax.families.huggingface import read_windows, write_layer_types
from llamajax.fields import check_whole


def _read(keys: Keys) -> dict[str, Any]:
    """`Exaone4Config`: without a window, as in 1.2B, all layers see all and have RoPE."""
    window, pattern = keys.whole_or_null("sliding_window"), keys.take("sliding_window_pattern")
    switches = {"norms": "after", "query_key_norm": "head"}
    if window is None:
        return switches | read_windows(keys, ("full",), None)
    if isinstance(pattern, str):  # three local layers, one global, as published
        pattern = keys.choice("sliding_window_pattern", {"LLLG": 4})
    check_whole(f"{keys.source}: sliding_window_pattern", pattern, MOST_LAYERS)
    default: tuple[LayerKind, ...] = ("window",) * (pattern - 1) + ("full",)
    kinds = read_windows(keys, default, window)
    hybrid = tuple("nope" if kind == "full" else kind for kind in kinds["layer_kinds"])
    return switches | kinds | {"layer_kinds": hybrid}


def _write(config: Config) -> dict[str, Any]:
    return {"sliding_window": config.window, "layer_types": write_layer_types(config)}


EXAONE4 = Family(
    "exaone4",
    huggingface=Format(
        kinds=("exaone4",),
        read=_read,
        write=_write,
        defaults={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "num_key_value_heads": 32,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        architecture="Exaone4ForCausalLM",
    ),
)
