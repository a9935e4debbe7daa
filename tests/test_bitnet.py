"""Ternary weights with int8 activations: packing as in transformers, files, GGUF, products on a CPU."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llamajax
import quant
from llamajax import Llama, LlamaJaxError, open_checkpoint, save_checkpoint
from llamajax.evaluation.evaluate import cross_entropy
from llamajax.families import config_from_hf
from llamajax.parameters import named_arrays
from llamajax.quantization.quantize import quantize
from quant import bitnet, ggml
from quant.kernels import cpu
from tests.kin import SUB_NORMS
from tests.programs import QUICK, forward
from tests.reference import random_model

CONFIG = dataclasses.replace(SUB_NORMS, family="bitnet", rope_theta=5e5)
TOKENS = np.random.default_rng(3).integers(0, CONFIG.vocab_size, (1, 9))


@pytest.fixture(scope="module")
def masters() -> Llama:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def ternary(masters: Llama) -> Llama:
    return quantize(masters, "bitnet")


def _theirs(packed: np.ndarray) -> np.ndarray:
    """Transformers' `unpack_weights` in NumPy: int8 [out, in]."""
    return np.concatenate([(packed >> 2 * part & 3).astype(np.int8) - 1 for part in range(4)])


def _same(ours: Llama, other: Llama) -> None:
    expected, actual = named_arrays(other), named_arrays(ours)
    assert sorted(expected) == sorted(actual)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(actual[name]), np.asarray(array), err_msg=name)


def test_preset_is_the_published_model() -> None:
    """The hub counts 2.41 billion master weights; the config is config.json of microsoft/bitnet-b1.58-2B-4T."""
    config = llamajax.preset("bitnet-2b4t")
    assert f"{config.num_parameters / 1e9:.2f}" == "2.41"
    said = {"model_type": "bitnet", "hidden_act": "relu2", "tie_word_embeddings": True, "rope_theta": 500000.0}
    said |= {"max_position_embeddings": 4096, "vocab_size": 128256}  # the rest are defaults of the class
    said["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    assert config_from_hf(said) == config


def test_perplexity_is_that_of_the_dequantized(ternary: Llama) -> None:
    """Perplexities differ only by the rounding of activations, by at most 1/127 of the largest one."""
    floats = llamajax.with_activations(ternary, "float32")
    ids = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 65)
    losses = [cross_entropy(model, ids, window=64, batch=1) for model in (ternary, floats)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


# ---- Codes ----------------------------------------------------------------------------------------------------------


def test_codes_are_those_of_transformers() -> None:
    """Codes: the example in the docstring of `unpack_weights` beside a second such block, and random codes."""
    example = np.array([[0b10100001, 0b00011000], [0b10010000, 0b00001010]], np.uint8)
    columns = [[0, -1], [-1, 1], [-1, 1], [-1, 1], [1, 0], [0, -1], [1, -1], [1, -1]]
    weight = bitnet.unpack(np.hstack([example, example]), np.array([0.5], np.float32))
    np.testing.assert_array_equal(quant.dequantize(weight), 0.5 * np.hstack([columns, columns]).T)
    rng = np.random.default_rng(0)
    packed = sum(rng.integers(0, 3, (6, 20)).astype(np.uint8) << np.uint8(2 * part) for part in range(4))
    for scale in (np.array([3], np.float16), np.array([3], np.float32)):
        weight = bitnet.unpack(packed, scale)
        np.testing.assert_array_equal(quant.dequantize(weight), 3.0 * _theirs(packed).T)
        codes, same = bitnet.pack(weight)
        np.testing.assert_array_equal(codes, packed)
        assert same == scale and same.dtype == scale.dtype
    np.testing.assert_array_equal(bitnet.unpack(packed, np.array([4.0]), divides=True).scale, [[0.25]])


def test_what_is_no_packed_weight_is_refused() -> None:
    one = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="the code 3: expected 0, 1 and 2"):
        bitnet.unpack(np.full((2, 4), 0xFF, np.uint8), one)
    for packed, scale in ((np.zeros((2, 6), np.uint8), one), (np.zeros((2, 4), np.uint8), np.ones(2, np.float32))):
        with pytest.raises(ValueError, match="with K a multiple of 4, and one scale"):
            bitnet.unpack(packed, scale)
    with pytest.raises(ValueError, match="6 inputs and 8 outputs: expected multiples of 4"):
        bitnet.abstract((6, 8), np.float32, np.float32)
    by_channel = quant.quantize_rtn(jnp.ones((8, 4)), "ternary", group_size="channel")
    with pytest.raises(ValueError, match="expected ternary codes with one scale"):
        bitnet.pack(dataclasses.replace(by_channel, activations="int8-token"))


def test_rounding_is_by_the_mean_magnitude() -> None:
    weight = np.random.default_rng(1).standard_normal((16, 8)).astype(np.float32)
    mean = np.abs(weight.astype(np.float64)).mean()
    made = bitnet.rounded(weight)
    np.testing.assert_allclose(made.scale, [[mean]], rtol=1e-6)
    np.testing.assert_allclose(quant.dequantize(made), np.clip(np.rint(weight / mean), -1, 1) * mean, rtol=1e-6)


# ---- The product ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "group", "groups", "axis"),
    [(1, 36, 1, -2), (1, 64, 3, -1), (3, 64, 3, -2), (cpu.MAX_INTEGER_ROWS + 1, 36, 1, -1)],
)
def test_product_is_of_whole_numbers(rows: int, group: int, groups: int, axis: int) -> None:
    """NumPy multiplies the codes in float64: only scales and sums over groups are rounded otherwise."""
    rng, K, M = np.random.default_rng(0), group * groups, 21
    codes = rng.integers(0, 3, (2, K, M)).astype(np.uint8)
    scale = rng.random((2, groups, M), np.float32) + 0.5
    x_RK = rng.standard_normal((rows, K)).astype(np.float32)
    whole = np.rint(x_RK / (np.abs(x_RK).max(-1, keepdims=True) * np.float32(1 / 127)))
    step = np.abs(x_RK).max(-1, keepdims=True).astype(np.float64) / 127
    values = (codes.astype(np.float64) - 1) * np.repeat(scale.astype(np.float64), group, -2)
    if axis == -1:
        codes, scale = codes.swapaxes(-1, -2), scale.swapaxes(-1, -2)
    weight = quant.QTensor.from_codes(
        jnp.asarray(codes), jnp.asarray(scale), quant.SCHEMES["ternary"], axis=axis, activations="int8-token"
    )
    tiled = cpu.layout(weight)
    multiply = jax.jit(lambda layer: quant.product(jnp.asarray(x_RK), tiled, layer, axis=axis), compiler_options=QUICK)
    for layer in range(2):
        y_RM = multiply(jnp.int32(layer))
        expected = step * (whole @ values[layer])
        np.testing.assert_allclose(y_RM, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_gradients_pass_through_whole_numbers() -> None:
    """Gradients are those of the product of floats: rounding counts as the identity."""
    weight = bitnet.rounded(np.random.default_rng(1).standard_normal((32, 16)))
    x_K = jnp.asarray(np.random.default_rng(2).standard_normal(32), jnp.float32)
    tiled = cpu.layout(jax.tree.map(jnp.asarray, weight))
    differentiate = jax.jit(jax.grad(lambda x: quant.product(x[None], tiled).sum()), compiler_options=QUICK)
    gradient = differentiate(x_K)
    np.testing.assert_allclose(gradient, quant.dequantize(weight).sum(-1), rtol=1e-5)


def test_prepared_model_is_the_reference(ternary: Llama) -> None:
    """The prepared model multiplies integers to decode; the model with QTensors multiplies floats."""
    prepared = llamajax.prepare(ternary, "cpu")
    np.testing.assert_allclose(forward(prepared, TOKENS), forward(ternary, TOKENS), atol=2e-5)


# ---- Hugging Face's files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(ternary: Llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bitnet") / "hf"
    save_checkpoint(ternary, path, form="huggingface")
    return path


def test_folder_is_packed_and_read_again(ternary: Llama, masters: Llama, folder: Path, tmp_path: Path) -> None:
    said = json.loads((folder / "config.json").read_text())
    assert said["model_type"] == "bitnet" and said["hidden_act"] == "relu2"
    assert said["quantization_config"]["linear_class"] == "autobitlinear"
    held = load_file(folder / "model.safetensors")
    assert held["model.layers.0.mlp.up_proj.weight"].shape == (CONFIG.ffn_width // 4, CONFIG.width)
    up_DF = np.asarray(named_arrays(ternary)["layers.*.ffn.up_DF.scale"])[0, 0, 0]
    assert held["model.layers.0.mlp.up_proj.weight_scale"] == up_DF
    expected = quant.dequantize(ternary.stacks[0][0].ffn.up_DF.get_value()[0])
    np.testing.assert_array_equal(_theirs(held["model.layers.0.mlp.up_proj.weight"]).T * up_DF, expected)
    read, _ = llamajax.load(folder)
    assert read.config == ternary.config
    _same(read, ternary)
    save_checkpoint(masters, tmp_path / "masters", form="huggingface")
    said = json.loads((tmp_path / "masters" / "config.json").read_text())
    said["quantization_config"] = {"quant_method": "bitnet", "linear_class": "autobitlinear"} | {
        "quantization_mode": "online"
    }
    (tmp_path / "masters" / "config.json").write_text(json.dumps(said))
    _same(llamajax.load(tmp_path / "masters")[0], ternary)


def test_own_form_keeps_it(ternary: Llama, tmp_path: Path) -> None:
    save_checkpoint(ternary, tmp_path / "own")
    read, _ = llamajax.load(tmp_path / "own")
    _same(read, ternary)
    assert [weight.activations for weight in quant.quantized(read)] == ["int8-token"] * 7


def test_other_ternary_weights_are_not_bitnets(masters: Llama, tmp_path: Path) -> None:
    with pytest.raises(LlamaJaxError, match="embed_VD is not in BitNet's form, the only quantized form"):
        save_checkpoint(quantize(masters, "ternary"), tmp_path / "hf", form="huggingface")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config is 'gptq', which is not supported: expected null or quant_m"),
        ({"linear_class": "other"}, "quantization_config: linear_class is 'other', .* one of bitlinear, autobitlinear"),
        ({"quantization_mode": 3}, "quantization_mode is 3, which is not supported: expected one of online, offline"),
        ({"use_rms_norm": True}, "use_rms_norm is True, which is not supported: expected False"),
        (
            {"modules_to_not_convert": ["model.layers.0"]},
            r"modules_to_not_convert is \['model.layers.0'\], which is not",
        ),
        ({"linear_klass": "bitlinear"}, r"unknown key 'linear_klass' \(did you mean 'linear_class'"),
        ({"quantization_mode": "online"}, "_proj.weight_scale' does not belong to the model .14 such"),
    ],
)
def test_keys_of_the_quantization_are_read_or_refused(folder: Path, tmp_path: Path, change, message: str) -> None:
    said = json.loads((folder / "config.json").read_text())
    said["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(LlamaJaxError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("up_proj.weight", np.zeros((16, 30), np.uint8), r"has shape \(16, 30\): expected \(16, 32\) by config.json"),
        ("up_proj.weight", np.zeros((16, 32), np.int8), "has dtype I8: expected one of U8"),
        ("up_proj.weight", np.full((16, 32), 255, np.uint8), "up_proj.weight: holds the code 3"),
        ("up_proj.weight_scale", np.ones(2, np.float32), r"weight_scale has shape \(2,\): expected \(1,\)"),
        ("up_proj.weight_scale", np.full(1, np.nan, np.float32), "holds NaN or infinity"),
        ("up_proj.weight_scale", None, "'model.layers.1.mlp.up_proj.weight_scale' is missing"),
    ],
)
def test_damaged_files_are_refused(folder: Path, tmp_path: Path, name: str, array, message: str) -> None:
    held = load_file(folder / "model.safetensors")
    held[f"model.layers.1.mlp.{name}"] = array
    save_file({name: each for name, each in held.items() if each is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").symlink_to(folder / "config.json")
    with pytest.raises(LlamaJaxError, match=message):
        llamajax.load(tmp_path)


# ---- GGUF -----------------------------------------------------------------------------------------------------------

WIDE = dataclasses.replace(CONFIG, width=256, head_size=64, ffn_width=256, num_layers=1)


def test_gguf_holds_every_code(tmp_path: Path) -> None:
    """A scale that float16 can hold becomes the scale of each TQ2_0 block; the values are the same."""
    model = quantize(random_model(WIDE), "bitnet")
    halves = jax.tree.map(lambda a: a.astype(jnp.float16).astype(a.dtype) if a.shape[-2:] == (1, 1) else a, model)
    save_checkpoint(halves, tmp_path / "m.gguf", form="gguf")
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert opened.config == WIDE and "7 TQ2_0" in opened.description
    read = opened.read()
    assert [weight.activations for weight in quant.quantized(read)] == ["int8-token"] * 7
    for theirs, ours in zip(quant.quantized(read), quant.quantized(halves), strict=True):
        np.testing.assert_array_equal(quant.dequantize(theirs), quant.dequantize(ours))
    with pytest.raises(LlamaJaxError, match="no ggml type holds it, the nearest is TQ2_0"):
        save_checkpoint(model, tmp_path / "other.gguf", form="gguf")


def test_silu_is_another_architecture(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, family="bitnet-3b", activation="silu")
    save_checkpoint(random_model(config), tmp_path / "m.gguf", form="gguf")
    assert open_checkpoint(tmp_path / "m.gguf").config == config
    untied = dataclasses.replace(config, tied_embeddings=False)
    with pytest.raises(LlamaJaxError, match="a GGUF of architecture 'bitnet' cannot hold a separate head"):
        save_checkpoint(random_model(untied), tmp_path / "untied.gguf", form="gguf")
    with pytest.raises(LlamaJaxError, match="activation is 'relu_squared'"):
        save_checkpoint(
            random_model(dataclasses.replace(config, activation="relu_squared")), tmp_path / "relu.gguf", form="gguf"
        )


def test_types_of_forks_are_named() -> None:
    with pytest.raises(ValueError, match="type 36: I2_S in microsoft/BitNet's fork .* take the model's Hugging Face"):
        ggml.named(36)


@pytest.mark.extras
def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    """The model has float weights, so that neither side rounds activations."""
    pytest.importorskip("xllamacpp", reason="compares with llama.cpp: install the extra: pip install -e '.[parity]'")
    from tests import llamacpp

    config = dataclasses.replace(WIDE, family="bitnet-3b", activation="silu", num_layers=2)
    model = random_model(config)
    save_checkpoint(model, tmp_path / "m.gguf", form="gguf")
    with llamacpp.Model(tmp_path / "m.gguf") as theirs:
        np.testing.assert_allclose(forward(model, TOKENS)[0], theirs.logits(TOKENS[0].tolist()), atol=1e-3)
