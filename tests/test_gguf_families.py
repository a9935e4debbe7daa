"""GGUF of every family: we write what llama.cpp's converter would, and llama.cpp computes the same from it."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import quant
from llamajax import Config, Llama, LlamaJaxError, Rope, RopeScaling, open_checkpoint, save_checkpoint
from llamajax.checkpoint.gguf.config import config_of
from llamajax.checkpoint.gguf.write import keys_of
from llamajax.families import FAMILIES, tensors
from llamajax.parameters import specs, weights_of
from llamajax.quantization.quantize import quantize
from llamajax.rope import rope_attention_factor
from quant import Rule
from tests.programs import forward
from tests.reference import random_model

gguf = pytest.importorskip("gguf", reason="compares with the gguf package: pip install gguf")

# Windows and original contexts are shorter than the texts that are compared.
TOKENS = 48
YARN = RopeScaling(kind="yarn", factor=4.0, original_context_length=16)
_SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "width": 64, "ffn_width": 96, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2},
    **{"head_size": 16, "context_length": 64, "norm_eps": 1e-6},
}
_GEMMA: dict[str, Any] = {
    **{"activation": "gelu_tanh", "norm_offset": 1.0, "embedding_scale": 8.0, "tied_embeddings": True},
    "head_size": 32,
}
_OLMO: dict[str, Any] = {"norms": "after", "query_key_norm": "width"}
_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": True, "out_bias": True, "ffn_bias": True},
    "mistral": {"layer_kinds": ("window",), "window": 48},
    "ministral3": {
        "head_size": 32,
        "query_temperature": {"beta": 0.25, "length": 16},
        "rope_scaling": dataclasses.replace(YARN, mscale=1.0, mscale_all_dim=1.0).to_dict(),
    },
    "qwen2": {"qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"query_key_norm": "head", "head_size": 32},
    "gemma": _GEMMA,
    "gemma2": _GEMMA
    | {"norms": "both", "score_cap": 50.0, "logit_cap": 30.0, "layer_kinds": ("window", "full"), "window": 8},
    "gemma3": _GEMMA
    | {"norms": "both", "query_key_norm": "head", "layer_kinds": ("window",) * 5 + ("full",), "window": 8}
    | {"rope_theta": 1e6, "rope_scaling": {"kind": "linear", "factor": 8.0}, "window_rope": {"theta": 1e4}}
    | {"num_layers": 7},
    "smollm3": {"layer_kinds": ("full", "full", "full", "nope"), "num_layers": 5},
    "olmo2": _OLMO,
    "olmo3": _OLMO
    | {"layer_kinds": ("window",) * 3 + ("full",), "window": 8}
    | {"rope_scaling": YARN.to_dict(), "window_rope": {"theta": 1e4}},
    "granite": {"embedding_scale": 12.0, "residual_scale": 0.25, "query_scale": 0.125, "logit_scale": 0.125},
    "phi3": {"rope_fraction": 0.75, "tied_embeddings": True},
    "bitnet-3b": {"sub_norms": True, "tied_embeddings": True},
    "bitnet": {"sub_norms": True, "tied_embeddings": True, "activation": "relu_squared"},
}
CONFIGS = {family: Config.from_dict(_SIZES | {"family": family} | fields) for family, fields in _FIELDS.items()}
# ggml takes GELU from a table of float16 numbers, GGML_GELU_FP16 in ggml-cpu/vec.h, with a relative error of 5e-4.
_CLOSE = dict.fromkeys(("gemma", "gemma2", "gemma3"), 3e-3)
# An architecture of a fork, which llama.cpp does not know.
_NOT_IN_LLAMACPP = ("bitnet",)
families = pytest.mark.parametrize("family", CONFIGS)


@functools.cache
def _model(family: str) -> Llama:
    return random_model(CONFIGS[family])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function from a family to its file, which is written once."""
    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def write(family: str) -> Path:
        path = folder / f"{family}.gguf"
        save_checkpoint(_model(family), path, form="gguf")
        return path

    return write


def test_every_family_is_here() -> None:
    assert {family.name for family in FAMILIES.values() if family.gguf is not None} == set(CONFIGS)


# ---- What is written, what is read ----------------------------------------------------------------------------------


@families
def test_what_is_written_is_read(family: str, saved: Any) -> None:
    opened, config = open_checkpoint(saved(family)), CONFIGS[family]
    if family == "ministral3":  # its attention factor is written as a number, whatever the config derived it from
        config = dataclasses.replace(config, rope_scaling=opened.config.rope_scaling)
        assert rope_attention_factor(opened.config.rope("full")) == pytest.approx(1, rel=1e-6)
    assert opened.config == config
    assert opened.notes == ()
    expected = weights_of(_model(family))
    for place, weight in weights_of(opened.read("float32", shardings="host")).items():
        # The writer adds 1 to a norm and the reader subtracts it, in float32.
        np.testing.assert_allclose(weight, expected[place], atol=1e-7, err_msg=str(place))


def _converted(family: str) -> dict[str, np.ndarray]:
    """Returns what llama.cpp's converter makes of the model's Hugging Face tensors, by gguf-py's names."""
    config, weights = CONFIGS[family], weights_of(_model(family))
    architecture = FAMILIES[family].gguf.kinds[0]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_layers)
    made = {}
    for theirs, places in tensors(config, "huggingface").items():
        parts = [weights[place].T if specs(config)[place].transposed else weights[place] for place in places]
        value, part = np.concatenate([np.asarray(each) for each in parts]), theirs.split(".")[-2]
        if architecture in ("llama", "mistral3", "smollm3", "granite") and part in ("q_proj", "k_proj"):
            heads = config.num_heads if part == "q_proj" else config.num_kv_heads
            value = value.reshape(heads, 2, config.head_size // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if architecture.startswith("gemma") and theirs.endswith("norm.weight"):
            value = value + np.float32(1)
        made[names.get_name(theirs, (".weight", ".bias"))] = value
    return made


@pytest.mark.parametrize(
    "family", [family for family in CONFIGS if FAMILIES[family].huggingface and family != "bitnet"]
)
def test_tensors_are_those_of_llamacpps_converter(family: str, saved: Any) -> None:
    expected = _converted(family)
    reader = gguf.GGUFReader(saved(family))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].data.reshape(value.shape), value, err_msg=name)
    known = {value for group in ("LLM", "Attention", "Rope") for value in vars(getattr(gguf.Keys, group)).values()}
    prefix = f"{FAMILIES[family].gguf.kinds[0]}."
    keys = [key.replace(prefix, "{arch}.", 1) for key in reader.fields if key.startswith(prefix)]
    assert set(keys) <= known


# ---- llama.cpp -------------------------------------------------------------------------------------------------------

_XLLAMACPP = "compares with llama.cpp: install the extra: pip install -e '.[parity]'"
in_llamacpp = pytest.mark.parametrize("family", [family for family in CONFIGS if family not in _NOT_IN_LLAMACPP])


def _differ(path: Path, model: Any) -> float:
    pytest.importorskip("xllamacpp", reason=_XLLAMACPP)
    from tests import llamacpp

    ids = np.random.default_rng(0).integers(0, 64, TOKENS)
    return float(np.abs(np.asarray(forward(model, ids[None]))[0] - llamacpp.logits(path, ids.tolist())).max())


@pytest.mark.extras
@in_llamacpp
def test_llamacpp_computes_the_same(family: str, saved: Any) -> None:
    assert _differ(saved(family), _model(family)) < _CLOSE.get(family, 1e-4)


@pytest.mark.extras
@pytest.mark.matrix
@in_llamacpp
def test_llamacpp_computes_the_same_of_packed_weights(family: str, tmp_path: Path) -> None:
    """Q4_0, dequantized by the gguf package for llama.cpp, which rounds activations where weights are packed."""
    pytest.importorskip("xllamacpp", reason=_XLLAMACPP)
    from tests import llamacpp

    vectors = ["*norm*", *(["*bias*"] if CONFIGS[family].qkv_bias else [])]
    rules = (*(Rule(weights=name, keep=True) for name in vectors), Rule(weights="*", scheme="int4"))
    path = tmp_path / "packed.gguf"
    save_checkpoint(quantize(_model(family), rules, types="ggml"), path, form="gguf")
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2}
    assert types == {"Q4_0"}
    llamacpp.dequantize(path, tmp_path / "floats.gguf")
    packed = open_checkpoint(path).read("float32")
    assert _differ(tmp_path / "floats.gguf", jax.tree.map(quant.values, packed, is_leaf=quant.is_weight)) < _CLOSE.get(
        family, 1e-4
    )


# ---- Errors ----------------------------------------------------------------------------------------------------------


def _read(family: str, changes: dict[str, Any]) -> Config:
    """Reads a config from a family's own keys with changes; None removes a key."""
    config = CONFIGS[family]
    prefix = f"{FAMILIES[family].gguf.kinds[0]}."
    said = keys_of(config) | {prefix + key: value for key, value in changes.items()}
    said = {key: value for key, value in said.items() if value is not None}
    return config_of("m.gguf", prefix[:-1], said, config.vocab_size, tensors(config, "gguf"))[0]


@families
def test_every_key_is_read_or_refused(family: str) -> None:
    """Misspelt keys and invalid values are errors that name the key."""
    prefix = f"{FAMILIES[family].gguf.kinds[0]}."
    for key in keys_of(CONFIGS[family]):
        name = key.removeprefix(prefix)
        with pytest.raises(LlamaJaxError, match=rf"(unknown|missing) key '{prefix}{name}"):
            _read(family, {name: None, f"{name}_": keys_of(CONFIGS[family])[key]})
        with pytest.raises(LlamaJaxError, match=name.rsplit(".", 1)[-1]):
            _read(family, {name: "soup"})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"embedding_scale": 2.0}, "llama.embedding_scale is 2.0, which is not supported"),
        ("llama", {"attention.sliding_window": "8"}, "llama.attention.sliding_window is '8'"),
        ("mistral", {"attention.sliding_window": -8}, "llama.attention.sliding_window is -8"),
        ("ministral3", {"attention.temperature_scale": -1.0}, "temperature_scale is -1.0: expected 0 or more"),
        ("qwen2", {"attention.sliding_window": 8}, "qwen2.attention.sliding_window is 8, which is not supported"),
        ("qwen3", {"attention.scale": 0.5}, "qwen3.attention.scale is 0.5, which is not supported"),
        ("gemma", {"final_logit_softcapping": 30.0}, "gemma.final_logit_softcapping is 30.0, which is not supported"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0: expected a number above 0"),
        ("gemma3", {"attn_logit_softcapping": 5.0}, "gemma3.attn_logit_softcapping is 5.0, which is not supported"),
        (
            "gemma3",
            {"attention.sliding_window_pattern": [True]},
            r"sliding_window_pattern is \[True\]: expected 7 flags",
        ),
        ("gemma3", {"attention.sliding_window_pattern": -1}, "sliding_window_pattern is -1: expected the pattern's"),
        ("smollm3", {"logit_scale": 2.0}, "smollm3.logit_scale is 2.0, which is not supported"),
        ("olmo2", {"attention.clamp_kqv": 8.0}, "olmo2.attention.clamp_kqv is 8.0, which is not supported"),
        ("olmo3", {"rope.freq_base_swa": 5.0}, "olmo2.rope.freq_base_swa is 5.0, which is not supported"),
        ("granite", {"logit_scale": None}, "missing key 'granite.logit_scale'"),
        ("granite", {"rope.scaling.finetuned": False}, "granite.rope.scaling.finetuned is False"),
        ("phi3", {"rope.dimension_count": 64}, "phi3.rope.dimension_count is 64: expected a whole number from 1 to 16"),
        ("bitnet-3b", {"hidden_activation": "relu2"}, "bitnet.hidden_activation is 'relu2', which is not supported"),
    ],
)
def test_what_llamacpps_architecture_does_not_do(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        _read(family, changes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"tied_embeddings": False}, "tied_embeddings is False: a GGUF of architecture 'gemma2' cannot"),
        ("gemma3", {"query_scale": 0.5}, "query_scale is 0.5: a GGUF of architecture 'gemma3' can only express None"),
        ("qwen3", {"layer_kinds": ("window",), "window": 8}, "architecture 'qwen3' can only .*: expected a config of"),
        ("smollm3", {"layer_kinds": ("full", "nope")}, "layer_kinds is .*: a GGUF of architecture 'smollm3' can"),
        ("olmo3", {"window_rope": Rope(theta=5.0)}, "window_rope is .*: a GGUF of architecture 'olmo2' can"),
        ("granite", {"activation": "gelu_tanh"}, "activation is 'gelu_tanh': a GGUF of architecture 'granite' can"),
        ("ministral", {}, "a model of family 'ministral' has no gguf form: expected one of llama"),
    ],
)
def test_what_no_key_says_is_not_written(family: str, changes: dict[str, Any], message: str) -> None:
    config = CONFIGS.get(family) or dataclasses.replace(CONFIGS["mistral"], family=family)
    with pytest.raises(LlamaJaxError, match=message):
        keys_of(dataclasses.replace(config, **changes))


def test_one_tensor_of_two_types(tmp_path: Path) -> None:
    rules = (
        Rule(weights="*.up_DF", scheme="int8"),
        Rule(weights="*.gate_DF", scheme="int4"),
        Rule(weights="*", keep=True),
    )
    model = quantize(_model("phi3"), rules, types="ggml")
    message = r"blk.0.ffn_up.weight holds 2 weights in one type, but layers.0.ffn.gate_DF is Q4_0, .* is Q8_0: quantize"
    with pytest.raises(LlamaJaxError, match=message):
        save_checkpoint(model, tmp_path / "m.gguf", form="gguf")
    assert not list(tmp_path.iterdir())


def test_gemmas_of_27b_are_known_by_their_layers() -> None:
    """As in llama.cpp: no key holds query_pre_attn_scalar, which is D / N in these models."""
    for family, layers in (("gemma2", 46), ("gemma3", 62)):
        config = dataclasses.replace(CONFIGS[family], num_layers=layers, query_scale=16**-0.5)
        assert keys_of(config)[f"{family}.block_count"] == layers


def test_another_period_of_windows() -> None:
    config = dataclasses.replace(CONFIGS["gemma3"], layer_kinds=("window", "full"))
    assert keys_of(config)["gemma3.attention.sliding_window_pattern"] == 2
    flags = np.asarray([True, False, True, False, True, False, True])
    assert _read("gemma3", {"attention.sliding_window_pattern": flags}).layer_kinds == ("window", "full")
