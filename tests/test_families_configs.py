"""config.json of published models, as found; and the errors for each misspelt or damaged key."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llamajax import Config, LlamaJaxError, load, open_checkpoint, save_checkpoint
from llamajax.config import Temperature
from llamajax.families import FAMILIES, config_from_hf, config_to_hf
from llamajax.rope import Rope, RopeScaling
from tests.reference import random_model

# Files from the Hugging Face hub, without keys that have no effect in any model (ids, dropout, versions).
PUBLISHED: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "mistralai/Mistral-7B-Instruct-v0.3": {
        "model_type": "mistral",
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32768,
    },
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "Qwen/Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    # The text config of mistralai/Devstral-Small-2-24B-Instruct-2512, as transformers 5 writes it.
    "mistralai/Devstral-Small-2 (text)": {
        "model_type": "ministral3",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 393216,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 48.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 100000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "vocab_size": 131072,
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2",
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "google/gemma-3-270m": {
        "model_type": "gemma3_text",
        "_sliding_window_pattern": 6,
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "use_bidirectional_attention": False,
        "vocab_size": 262144,
    },
    # The file says little; the rest are defaults of the class.
    "google/gemma-3-4b-it (text)": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "HuggingFaceTB/SmolLM3-3B": {
        "model_type": "smollm3",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "allenai/OLMo-2-1124-7B": {
        "model_type": "olmo2",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
    "allenai/Olmo-3-1025-7B": {
        "model_type": "olmo3",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 8,
        "max_position_embeddings": 65536,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 100278,
    },
    "ibm-granite/granite-3.1-2b-base": {
        "model_type": "granite",
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49152,
    },
    "microsoft/Phi-3-mini-4k-instruct": {
        "model_type": "phi3",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32064,
    },
    # The 48 factors of each kind are invented.
    "microsoft/Phi-4-mini-instruct": {
        "model_type": "phi3",
        "attention_bias": False,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "LGAI-EXAONE/EXAONE-4.0-32B": {
        "model_type": "exaone4",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 27392,
        "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16,
        "max_position_embeddings": 131072,
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000,
        "sliding_window": 4096,
        "sliding_window_pattern": "LLLG",
        "tie_word_embeddings": False,
        "vocab_size": 102400,
    },
    "ByteDance-Seed/Seed-OSS-36B-Instruct": {
        "model_type": "seed_oss",
        "attention_bias": True,
        "attention_out_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_position_embeddings": 524288,
        "mlp_bias": False,
        "num_attention_heads": 80,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "residual_dropout": 0.1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"rope_type": "default"},
        "rope_theta": 10000000.0,
        "tie_word_embeddings": False,
        "vocab_size": 155136,
    },
    "internlm/internlm3-8b-instruct": {
        "model_type": "internlm3",
        "bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 10240,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "qkv_bias": False,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
        "rope_theta": 50000000,
        "tie_word_embeddings": False,
        "vocab_size": 128512,
    },
}

# Parameter counts by the hub's index of the weights, a tied head counted once.
PARAMETERS = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": 7_615_616_512,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-3-270m": 268_098_176,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "microsoft/Phi-3-mini-4k-instruct": 3_821_079_552,
    "microsoft/Phi-4-mini-instruct": 3_836_021_760,
}
# Fields of `Config` that distinguish the family, by the model's card or report.
SWITCHES: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": {"layer_kinds": ("window",), "window": 4096},
    "mistralai/Mistral-7B-Instruct-v0.3": {"layer_kinds": ("full",), "window": None},
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": {"qkv_bias": True, "out_bias": False, "layer_kinds": ("full",)},
    "Qwen/Qwen3-0.6B": {"head_size": 128, "query_key_norm": "head", "qkv_bias": False},
    "mistralai/Devstral-Small-2 (text)": {
        "query_temperature": Temperature(beta=0.1, length=8192),
        "rope_theta": 1e8,
        "tied_embeddings": False,
    },
    "google/gemma-2-2b": {
        "layer_kinds": ("window", "full"),
        "score_cap": 50.0,
        "logit_cap": 30.0,
        "norms": "both",
        "embedding_scale": 48.0,
        "activation": "gelu_tanh",
        "tied_embeddings": True,
    },
    "google/gemma-3-270m": {
        "layer_kinds": ("window",) * 5 + ("full",),
        "window": 512,
        "window_rope": Rope(theta=1e4),
        "score_cap": None,
        "query_key_norm": "head",
    },
    "google/gemma-3-4b-it (text)": {
        "vocab_size": 262208,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_size": 256,
        "rope_theta": 1e6,
        "rope_scaling": RopeScaling(kind="linear", factor=8.0),
        "window_rope": Rope(theta=1e4),
        "layer_kinds": ("window",) * 5 + ("full",),
        "context_length": 131072,
    },
    "HuggingFaceTB/SmolLM3-3B": {"layer_kinds": ("full", "full", "full", "nope"), "tied_embeddings": True},
    "allenai/OLMo-2-1124-7B": {"norms": "after", "query_key_norm": "width"},
    "allenai/Olmo-3-1025-7B": {
        "layer_kinds": ("window", "window", "window", "full"),
        "window": 4096,
        "window_rope": Rope(theta=5e5),
    },
    "ibm-granite/granite-3.1-2b-base": {
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "query_scale": 1 / 64,
        "logit_scale": 1 / 8,
    },
    "microsoft/Phi-3-mini-4k-instruct": {"window": 2047, "rope_scaling": None},
    "microsoft/Phi-4-mini-instruct": {"rope_fraction": 0.75, "layer_kinds": ("full",), "num_kv_heads": 8},
    "LGAI-EXAONE/EXAONE-4.0-32B": {
        "layer_kinds": ("window", "window", "window", "nope"),
        "norms": "after",
        "query_key_norm": "head",
    },
    "ByteDance-Seed/Seed-OSS-36B-Instruct": {"qkv_bias": True, "out_bias": False, "head_size": 128},
    "internlm/internlm3-8b-instruct": {"family": "llama", "num_kv_heads": 2},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str) -> None:
    """Fields are as expected, and the config survives writing and reading."""
    config = config_from_hf(PUBLISHED[name])
    if name in PARAMETERS:
        assert config.num_parameters == PARAMETERS[name]
    for field, value in SWITCHES.get(name, {}).items():
        assert getattr(config, field) == value, field
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_family_has_a_published_config() -> None:
    read = {config_from_hf(fields).family for fields in PUBLISHED.values()}
    # Families without one resemble others: Gemma is like Gemma 2, Ministral like Mistral; BitNet has tests of its own.
    assert {name for name, family in FAMILIES.items() if family.huggingface} - read <= {"gemma", "ministral", "bitnet"}


# ---- Damaged keys ---------------------------------------------------------------------------------------------------

# Keys without effect in these files: no version of transformers reads them, or they are about training, or another key
# disables them.
WITHOUT_EFFECT = {
    "ByteDance-Seed/Seed-OSS-36B-Instruct": {"residual_dropout"},
    "HuggingFaceTB/SmolLM3-3B": {"max_window_layers", "pretraining_tp", "sliding_window"},
    "microsoft/Phi-3-mini-4k-instruct": {"original_max_position_embeddings"},
}
NONSENSE = ("nonsense", [], {"a": 1}, -1, 10**400, float("nan"), ["nonsense"] * 64)


@pytest.mark.parametrize("name", PUBLISHED)
def test_damaged_keys(name: str) -> None:
    """A misspelt key, or a value of a wrong type or range, is an error that names the key."""
    fields, without = PUBLISHED[name], WITHOUT_EFFECT.get(name, set())
    for key in fields:
        misspelt = f"{key[:-1]}{'x' if key[-1] != 'x' else 'y'}"
        with pytest.raises(LlamaJaxError, match=f"^config.json: .*{re.escape(misspelt)}"):
            config_from_hf(fields | {misspelt: fields[key]})
        for value in NONSENSE if key not in without else ():
            with pytest.raises(LlamaJaxError, match=f"^config.json: .*{re.escape(key)}"):
                config_from_hf(fields | {key: value})
    for key in without:
        assert config_from_hf(fields | {key: "nonsense"}) == config_from_hf(fields)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mistralai/Mistral-7B-v0.1", {"layer_types": ["full_attention"] * 32}, "unknown key 'layer_types'"),
        ("mistralai/Mistral-7B-v0.1", {"sliding_windw": 3}, "'sliding_windw' .did you mean 'sliding_window'"),
        ("Qwen/Qwen3-0.6B", {"layer_types": ["full_attention"]}, "layer_types is .*: expected a list of 28 kinds"),
        ("Qwen/Qwen3-0.6B", {"layer_types": ["linear_attention"] * 28}, "layer_types has 'linear_attention'"),
        ("Qwen/Qwen3-0.6B", {"layer_types": ["sliding_attention"] * 28}, "layer_types has sliding_attention: expected"),
        ("Qwen/Qwen2.5-0.5B", {"use_mrope": True}, "use_mrope is True, which is not supported: expected False"),
        ("Qwen/Qwen2.5-0.5B", {"attention_bias": True}, "attention_bias is True, which is not supported"),
        ("google/gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, which is"),
        ("google/gemma-2-2b", {"hidden_activation": "silu"}, "hidden_activation is 'silu', which is not supported"),
        ("google/gemma-2-2b", {"sliding_window_size": 5}, "sliding_window_size is 5, .*: expected 4096"),
        ("google/gemma-3-270m", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0: expected null"),
        ("HuggingFaceTB/SmolLM3-3B", {"use_sliding_window": True}, "use_sliding_window is True, which is not"),
        ("HuggingFaceTB/SmolLM3-3B", {"no_rope_layers": [1, 1]}, "no_rope_layers is .*: expected a list of 36"),
        ("allenai/OLMo-2-1124-7B", {"clip_qkv": 8.0}, "clip_qkv is 8.0, which is not supported: expected null"),
        (
            "ibm-granite/granite-3.1-2b-base",
            {"logits_scaling": 0},
            "logits_scaling is 0: expected a finite number, above 0",
        ),
        ("microsoft/Phi-4-mini-instruct", {"lm_head_bias": True}, "lm_head_bias is True, which is not supported"),
        ("internlm/internlm3-8b-instruct", {"qkv_bias": True}, "qkv_bias is True, which is not supported"),
        ("LGAI-EXAONE/EXAONE-4.0-32B", {"sliding_window_pattern": "LG"}, "sliding_window_pattern is 'LG', which is"),
    ],
)
def test_what_is_not_supported(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaJaxError, match=f"^config.json: .*{message}"):
        config_from_hf(PUBLISHED[name] | change)


def test_null_is_what_it_says() -> None:
    """null means no window or no cap; a missing key means the family's default."""
    fields = dict(PUBLISHED["mistralai/Mistral-7B-v0.1"])
    del fields["sliding_window"]
    assert config_from_hf(fields).window == 4096
    assert config_from_hf(fields | {"sliding_window": None}).layer_kinds == ("full",)
    gemma = {key: value for key, value in PUBLISHED["google/gemma-2-2b"].items() if "softcapping" not in key}
    assert (config_from_hf(gemma).score_cap, config_from_hf(gemma).logit_cap) == (50.0, 30.0)
    assert config_from_hf(gemma | {"attn_logit_softcapping": None}).score_cap is None


def test_a_switch_that_the_family_cannot_say() -> None:
    config = config_from_hf(PUBLISHED["Qwen/Qwen3-0.6B"])
    fields = config.to_dict() | {"score_cap": 30.0}
    with pytest.raises(
        LlamaJaxError, match="score_cap is 30.0: a config.json of family 'qwen3' can only express None: expected"
    ):
        config_to_hf(Config.from_dict(fields))


def test_the_page_shows_the_family_as_it_is() -> None:
    """docs/extending/family.diff equals the file and has at most 60 lines; tests/test_extending.py applies it."""
    root = Path(__file__).parents[1]
    diff = (root / "docs" / "extending" / "family.diff").read_text()
    added = re.findall(r"^\+(?!\+\+)(.*)$", diff, re.MULTILINE)
    file = (root / "llamajax" / "families" / "exaone.py").read_text().splitlines()
    assert added[-len(file) :] == file
    assert len(added) <= 60
    families = (root / "llamajax" / "families" / "__init__.py").read_text()
    assert all(line.strip() in families for line in added[: -len(file)] if not line.startswith("from"))


# ---- Text of models that see images ---------------------------------------------------------------------------------


def test_text_of_models_that_see_images() -> None:
    """The config contains the text's config. For keys in both, the text's value counts, except for the tied head."""
    text = PUBLISHED["google/gemma-3-4b-it (text)"]
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"image_size": 896}}
    assert config_from_hf(whole | {"mm_tokens_per_image": 256, "eos_token_id": [1, 106]}) == config_from_hf(text)
    untyped = {key: value for key, value in text.items() if key != "model_type"}
    assert config_from_hf(whole | {"text_config": untyped}) == config_from_hf(text)
    untied = whole | {"tie_word_embeddings": False, "text_config": text | {"tie_word_embeddings": True}}
    assert not config_from_hf(untied).tied_embeddings
    for change, message in (
        ({"text_config": None}, "text_config is None: expected an object, as in models of type 'gemma3'"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"text_config": text | {"hiden_size": 5}}, "unknown key 'hiden_size' .did you mean 'hidden_size'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ):
        with pytest.raises(LlamaJaxError, match=f"^config.json: .*{message}"):
            config_from_hf(whole | change)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."], ids=["version4", "version5"])
def test_weights_of_the_text_alone(prefix: str, tmp_path: Path) -> None:
    """Tensors have the names of models with images; a note counts the tensors of images, which are not read."""
    fields = PUBLISHED["google/gemma-3-4b-it (text)"] | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32}
    fields |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = random_model(config_from_hf(fields))
    save_checkpoint(model, tmp_path / "text", form="huggingface")
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    beside = dict.fromkeys(("vision_tower.a.weight", "multi_modal_projector.b"), np.ones(3, np.float32))
    (tmp_path / "whole").mkdir()
    save_file(renamed | beside, tmp_path / "whole" / "model.safetensors")
    (tmp_path / "whole" / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": fields}))
    with pytest.warns(UserWarning, match="2 tensors are for images only, not read"):
        loaded, _ = load(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, loaded, model)
    twice = renamed | {"model.norm.weight": tensors["model.norm.weight"]}
    save_file(twice, tmp_path / "whole" / "model.safetensors")
    with pytest.raises(LlamaJaxError, match="norm.weight' and .*norm.weight' are one weight: expected one"):
        open_checkpoint(tmp_path / "whole")
