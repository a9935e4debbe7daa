"""Config: published sizes, strict readers in both directions, and the text of every error."""

import dataclasses
import json
import math
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llamajax
from llamajax import Config, LlamaJaxError, RopeScaling, abstract_model, preset, preset_names
from llamajax.families import config_from_hf, config_to_hf

# Parameter counts as published: Meta's model cards and papers, and the weight files on the Hugging Face hub.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "yi-1.5-34b": 34_388_917_248,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    # The weight files less the vision tower's 416,866,032 and the projector's 1,152 x D + 1,152.
    "gemma3-4b": 4_300_079_472 - 416_866_032 - 1_152 * 2_561,
    "gemma3-12b": 12_187_325_040 - 416_866_032 - 1_152 * 3_841,
    "gemma3-27b": 27_432_406_640 - 416_866_032 - 1_152 * 5_377,
    "olmo2-7b": 7_298_617_344,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo3-7b": 7_298_011_136,
    "granite-3.3-2b": 2_533_539_840,
    "granite-3.3-8b": 8_170_864_640,
    "phi3-mini": 3_821_079_552,
    "phi4-mini": 3_836_021_760,
}

# context, norm_eps, theta, RoPE factor: parameter counts do not show these.
RUN_TIME = {
    "llama-7b": (2048, 1e-6, 1e4, None),
    "llama-65b": (2048, 1e-5, 1e4, None),
    "llama2-7b": (4096, 1e-5, 1e4, None),
    "llama2-70b": (4096, 1e-5, 1e4, None),
    "llama3-8b": (8192, 1e-5, 5e5, None),
    "llama3.1-8b": (131072, 1e-5, 5e5, 8.0),
    "llama3.1-405b": (131072, 1e-5, 5e5, 8.0),
    "llama3.2-1b": (131072, 1e-5, 5e5, 32.0),
    "llama3.2-3b": (131072, 1e-5, 5e5, 32.0),
    "tinyllama-1.1b": (2048, 1e-5, 1e4, None),
}

VALID = dict(
    vocab_size=32, width=8, ffn_width=12, num_layers=1, num_heads=4, num_kv_heads=2, head_size=2, context_length=16
)
HF = dict(
    model_type="llama", vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)


# ---- Presets --------------------------------------------------------------------------------------------------------


def test_every_published_model_has_a_preset() -> None:
    assert set(preset_names()) >= {*PUBLISHED, "box"}
    assert preset_names() == sorted(preset_names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_size(name: str) -> None:
    config = preset(name)
    assert config.num_parameters == PUBLISHED[name]
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config))) == PUBLISHED[name]


@pytest.mark.parametrize("name", RUN_TIME)
def test_preset_has_the_published_context_and_rope(name: str) -> None:
    config = preset(name)
    factor = config.rope_scaling.factor if config.rope_scaling else None
    assert (config.context_length, config.norm_eps, config.rope_theta, factor) == RUN_TIME[name]
    if config.rope_scaling:
        assert config.rope_scaling == RopeScaling(kind="llama3", factor=factor, original_context_length=8192)


# context, norm_eps, theta; for windows: length, number of window layers, per number of layers, theta.
WINDOWS = {
    "mistral-7b-v0.1": (32768, 1e-5, 1e4, 4096, 1, 1, 1e4),
    "gemma2-27b": (8192, 1e-6, 1e4, 4096, 1, 2, 1e4),
    "gemma3-270m": (32768, 1e-6, 1e6, 512, 5, 6, 1e4),
    "gemma3-27b": (131072, 1e-6, 1e6, 1024, 5, 6, 1e4),
    "olmo3-7b": (65536, 1e-6, 5e5, 4096, 3, 4, 5e5),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_preset_has_the_published_windows(name: str) -> None:
    config = preset(name)
    kinds, rope = config.layer_kinds, config.rope("window")
    of_windows = (config.window, kinds.count("window"), len(kinds), rope and rope.theta)
    assert (config.context_length, config.norm_eps, config.rope_theta, *of_windows) == WINDOWS[name]


def test_unknown_preset() -> None:
    with pytest.raises(LlamaJaxError, match="no preset is called 'llama9-1b': expected one of .*llama2-7b"):
        preset("llama9-1b")


# ---- Round trips ----------------------------------------------------------------------------------------------------

_positive = st.integers(1, 1 << 20)
_factors = st.floats(1.0, 1e6)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Draws valid configs."""
    kv_heads = draw(st.integers(1, 64))
    scaling = None
    if kind := draw(st.sampled_from([None, "linear", "llama3"])):
        low = draw(st.floats(0, 8))
        scaling = RopeScaling(kind=kind, factor=draw(_factors))
        if kind == "llama3":
            scaling = dataclasses.replace(
                scaling,
                low_freq_factor=low,
                high_freq_factor=low + draw(st.floats(0.5, 8)),
                original_context_length=draw(_positive),
            )
    return Config(
        vocab_size=draw(_positive),
        width=draw(_positive),
        ffn_width=draw(_positive),
        num_layers=draw(st.integers(1, 4096)),
        num_heads=kv_heads * draw(st.integers(1, 64)),
        num_kv_heads=kv_heads,
        head_size=2 * draw(st.integers(1, 256)),
        context_length=draw(_positive),
        norm_eps=draw(st.floats(0, 1)),
        rope_theta=draw(st.floats(1, 1e9)),
        rope_scaling=scaling,
        tied_embeddings=draw(st.booleans()),
    )


@settings(deadline=None, derandomize=True, database=None)
@given(configs())
def test_round_trips(config: Config) -> None:
    """Configs survive JSON text, with our names and with Hugging Face's."""
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config_from_hf(json.loads(json.dumps(config_to_hf(config)))) == config


@settings(deadline=None, derandomize=True, database=None, max_examples=4)
@given(configs())
def test_num_parameters_counts_the_leaves(config: Config) -> None:
    assert config.num_parameters == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_model(config)))


def test_configs_are_values() -> None:
    """Equal configs are one key of a compilation cache, and no config can be changed."""
    assert hash(Config(**VALID)) == hash(Config(**VALID))
    assert len({Config(**VALID), Config(**VALID), Config(**VALID | {"width": 10})}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(**VALID).width = 16  # type: ignore[misc]
    assert jax.jit(lambda config: np.float32(config.width), static_argnums=0)(Config(**VALID)) == 8


def test_defaults_of_hugging_face() -> None:
    """Defaults are those of transformers' LlamaConfig."""
    expected = Config(**VALID | {"num_kv_heads": 4, "context_length": 2048}, norm_eps=1e-6)
    assert config_from_hf(HF) == expected
    assert config_from_hf(HF | {"head_dim": None, "num_key_value_heads": None, "rope_scaling": None}) == expected
    assert config_from_hf(HF | {"torch_dtype": "float16", "use_cache": True, "pretraining_tp": 1}) == expected


def test_both_spellings_of_rope() -> None:
    default = config_from_hf(HF | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert default == config_from_hf(HF | {"rope_theta": 5e5}) and default.rope_theta == 5e5
    new = config_from_hf(HF | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}})
    assert new == config_from_hf(HF | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    assert new.rope_scaling == RopeScaling(kind="llama3", factor=8.0, original_context_length=64)
    linear = RopeScaling(kind="linear", factor=4.0)
    for name in ("type", "rope_type"):
        assert config_from_hf(HF | {"rope_scaling": {name: "linear", "factor": 4.0}}).rope_scaling == linear


_LLAMA3_SCALING = RopeScaling(kind="llama3", factor=8.0, original_context_length=64)
_LINEAR_SCALING = RopeScaling(kind="linear", factor=2.0)


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e5}, "rope_theta": 5e5}, 2e5, None),
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": {}, "rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": None, "rope_theta": 5e5}}, 5e5, None),
        ({"rope_parameters": None, "rope_theta": 5e5}, 5e5, None),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "factor": 2.0}}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}}, 5e5, None),
        ({"rope_parameters": LLAMA3, "rope_theta": 5e5}, 5e5, _LLAMA3_SCALING),
        ({"rope_parameters": LLAMA3 | {"type": "llama3"}}, 1e4, _LLAMA3_SCALING),
        ({"rope_parameters": LLAMA3, "original_max_position_embeddings": 128}, 1e4, 128),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": None}}, 1e4, 2048),
        ({"rope_parameters": {"type": "linear", "factor": 2.0}}, 1e4, _LINEAR_SCALING),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "original_max_position_embeddings": 64}},
            1e4,
            _LINEAR_SCALING,
        ),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": None}}, 1e4, _LINEAR_SCALING),
        ({"rope_parameters": LLAMA3, "rope_scaling": LLAMA3, "rope_theta": 5e5}, 5e5, _LLAMA3_SCALING),
    ],
)
def test_forms_of_rope_that_transformers_loads(fields: dict[str, Any], theta: float, scaling: Any) -> None:
    """test_parity_transformers.py checks transformers itself on the same forms."""
    config = config_from_hf(HF | fields)
    if isinstance(scaling, int):  # the original length, where it differs from LLAMA3's
        scaling = dataclasses.replace(_LLAMA3_SCALING, original_context_length=scaling)
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


# Keys that configs of public LLaMAs on the Hugging Face hub carry beside the architecture.
PROVENANCE = {
    "_name_or_path": "meta-llama/Llama-2-13b-hf",
    "auto_map": {"AutoModelForCausalLM": "modeling_x.X"},
    "axolotl_version": "0.5",
    "begin_suppress_tokens": None,
    "do_sample": True,
    "hidden_dropout_prob": 0.1,
    "is_llama_config": True,
    "max_length": 4096,
    "pretraining_tp": 2,
    "resid_pdrop": 0.0,
    "rope_interleaved": False,
    "temperature": 0.6,
    "tokenizer_class": "LlamaTokenizer",
    "top_p": 0.9,
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
    "unsloth_fixed": True,
    "unsloth_version": "2024.9",
    "use_sliding_window": False,
}


def test_keys_that_change_no_forward_pass() -> None:
    assert config_from_hf(HF | PROVENANCE) == config_from_hf(HF)


def test_keys_to_ignore() -> None:
    assert config_from_hf(
        HF | {"colour": "red", "mlp_bias": True}, "x", ["colour", "mlp_bias", "other"]
    ) == config_from_hf(HF)
    with pytest.raises(LlamaJaxError, match="unknown key 'taste': .*--ignore_key=taste"):
        config_from_hf(HF | {"colour": "red", "taste": "sweet"}, "x", ["colour"])
    for key in ("model_type", "hidden_size", "rope_theta", "rope_scaling"):
        with pytest.raises(LlamaJaxError, match=f"'{key}' cannot be ignored: the architecture depends on it"):
            config_from_hf(HF, "x", [key])


# ---- Refusals -------------------------------------------------------------------------------------------------------

_SCALING = {"kind": "llama3", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "width is 0: expected a whole number from 1 to 134217728"),
        ({"vocab_size": 2**27 + 1}, "vocab_size is 134217729: expected a whole number"),
        ({"num_layers": 2.0}, "num_layers is 2.0: expected a whole number"),
        ({"num_layers": True}, "num_layers is True: expected a whole number"),
        ({"ffn_width": "12"}, "ffn_width is '12': expected a whole number"),
        ({"norm_eps": -1e-9}, "norm_eps is -1e-09: expected a finite number, at least 0.0"),
        ({"norm_eps": math.nan}, "norm_eps is nan: expected a finite number"),
        ({"norm_eps": 10**400}, "norm_eps is .*: expected a finite number"),
        ({"rope_theta": math.inf}, "rope_theta is inf: expected a finite number, at least 1.0"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5: expected a finite number, at least 1.0"),
        ({"rope_theta": "10000"}, "rope_theta is '10000': expected a finite number"),
        ({"tied_embeddings": 1}, "tied_embeddings is 1: expected true or false"),
        ({"num_heads": 3}, "num_heads is 3: expected a multiple of num_kv_heads, 2"),
        ({"head_size": 3}, "head_size is 3: expected an even number, RoPE rotates pairs"),
        ({"colour": "red"}, "unknown key 'colour': Config has vocab_size, width"),
        ({"rope_scaling": 3}, "RopeScaling is 3: expected a table of fields"),
        ({"rope_scaling": {"kind": "linear"}}, "missing key 'factor': RopeScaling needs kind, factor"),
        ({"rope_scaling": _SCALING | {"x": 1}}, "unknown key 'x': RopeScaling has kind, factor"),
        (
            {"rope_scaling": {"kind": "ntk", "factor": 2.0}},
            "rope scaling kind is 'ntk': expected one of linear, dynamic",
        ),
        ({"rope_scaling": {"kind": [], "factor": 2.0}}, r"rope scaling kind is \[\]: expected one of linear, dynamic"),
        ({"rope_scaling": _SCALING | {"factor": 0.5}}, "factor is 0.5: expected a finite number, at least 1.0"),
        ({"rope_scaling": _SCALING | {"low_freq_factor": -1}}, "low_freq_factor is -1: expected a finite number"),
        ({"rope_scaling": _SCALING | {"low_freq_factor": 4.0}}, "high_freq_factor is 4.0: expected more than low_freq"),
        ({"rope_scaling": _SCALING | {"original_context_length": 0}}, "original_context_length is 0: expected a whole"),
    ],
)
def test_refused_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaJaxError, match=f"^somewhere: .*{message}"):
        Config.from_dict(VALID | change, "somewhere")


@pytest.mark.parametrize("field", VALID)
def test_missing_fields(field: str) -> None:
    fields = {key: value for key, value in VALID.items() if key != field}
    with pytest.raises(LlamaJaxError, match=f"missing key '{field}': Config needs vocab_size, width"):
        Config.from_dict(fields)


@pytest.mark.parametrize("fields", [5, [1, 2], "width", None])
def test_fields_that_are_no_table(fields: Any) -> None:
    with pytest.raises(LlamaJaxError, match="^somewhere: .*expected a table of fields"):
        Config.from_dict(fields, "somewhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral': expected one of .*, llama, .*; the nearest is 'mistral'"),
        ({"model_type": "rwkv"}, "model_type is 'rwkv': expected one of .*, qwen3, [^;]*$"),
        ({"model_type": None}, "model_type is None: expected one of .*, llama, "),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which is not supported: expected one of silu, "),
        ({"attention_bias": "no"}, "attention_bias is 'no': expected true or false"),
        ({"mlp_bias": 1}, "mlp_bias is 1: expected true or false"),
        ({"sliding_window": 4096}, "sliding_window is 4096, which is not supported: expected null"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, which is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported: expected 1.0"),
        (
            {"num_experts": 8},
            "unknown key 'num_experts': if it does not .*, give --ignore_key=num_experts .*, or remove it .read: add_",
        ),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear': expected an object"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: missing key 'factor': rope_type 'linear' needs"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 1}},
            "rope_scaling: 'mscale' is not supported for rope_type 'linear': expected factor",
        ),
        (
            {"rope_scaling": {"factor": 2.0}},
            "rope_scaling: missing key 'rope_type' beside 'factor': expected one of def",
        ),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
            "rope_type and type differ .{'rope_type': 'llama3', 'type': 'linear'}.: expected one of them",
        ),
        ({"rope_scaling": {"rope_type": [], "factor": 2.0}}, r"rope_type is \[\], which is not supported: expected"),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters differ",
        ),
        (
            {"rope_parameters": {"full_attention": LLAMA3}},
            "rope_parameters differs by kind of layer .*'full_attention'",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope_parameters: 'partial_rotary_factor' is not supported for rope_type 'default'",
        ),
        ({"use_sliding_window": True}, "use_sliding_window is True, which is not supported: expected False"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0: expected a whole number"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 2},
            "num_heads is 3: expected a multiple of num_kv_heads, 2",
        ),
        ({"hidden_size": 10**30}, "is 1000.*: expected a whole number"),
        ({"rms_norm_eps": 10**400}, "norm_eps is .*: expected a finite number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes': expected true or false"),
    ],
)
def test_refused_hugging_face_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaJaxError, match=f"^a/config.json: .*{message}"):
        config_from_hf(HF | change, "a/config.json")


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_missing_hugging_face_keys_go_by_the_names_in_the_file(key: str) -> None:
    """The reader of the message is looking at config.json, which has no `width`."""
    with pytest.raises(LlamaJaxError, match=f"missing key '?{key}"):
        config_from_hf({name: value for name, value in HF.items() if name != key})


def test_hugging_face_config_that_is_no_object() -> None:
    with pytest.raises(LlamaJaxError, match="config.json: expected a JSON object, got list"):
        config_from_hf([])  # type: ignore[arg-type]


def test_the_error_is_a_value_error() -> None:
    """Callers that do not import our error class can catch it."""
    assert issubclass(llamajax.LlamaJaxError, ValueError)
