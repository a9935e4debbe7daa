"""Nearly-zero rows, as of Llama 3's untrained reserved tokens: no method fails, or is further off than zeros are."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from llamajax import Config, LlamaJaxError
from llamajax.quantization.quantize import quantize
from quant.recipe import Recipe, Rule
from tests.reference import random_model

# Magnitudes from what float16 scales resolve down to a 16th of the smallest scale, 2**-24; and one far below.
_MAGNITUDES = (1e-5, 1e-6, 3e-7, 1e-7, 2e-8, 4e-9, 1e-30)


CONFIG = Config(
    vocab_size=96,
    width=64,
    ffn_width=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_size=32,
    context_length=64,
)


def _weight() -> np.ndarray:
    """Makes a weight [64, 8]: an ordinary output, and one of each magnitude."""
    weight = np.random.default_rng(0).standard_normal((64, 1 + len(_MAGNITUDES))).astype(np.float32)
    return weight * np.array([1, *_MAGNITUDES], np.float32)


def _quantized(weight: np.ndarray, scheme: str, method: str) -> np.ndarray:
    """Returns the quantized weight's values, float64."""
    options: dict[str, Any] = {"group_size": 32, "scale_dtype": "float16"}
    if "clip" in method or method == "importance":
        options["clip"] = "mse"
    importance = np.random.default_rng(1).random(64) ** 8
    if method == "importance":
        options["importance"] = importance
    if method.startswith("gptq"):
        hessian = jnp.asarray(np.diag(importance + 0.1), jnp.float32)
        made = quant.quantize_gptq(weight, hessian, scheme, **options, act_order="clip" in method)
    else:
        made = (quant.quantize_hqq if method == "hqq" else quant.quantize_rtn)(weight, scheme, **options)
    return np.asarray(quant.dequantize(made), np.float64)


METHODS = ("plain", "clip", "importance", "gptq", "gptq, clip")
CASES = [(scheme, method) for scheme in ("int4", "uint4", "nf4", "ternary", "mxfp4") for method in METHODS]


@pytest.mark.matrix
@pytest.mark.parametrize(("scheme", "method"), [*CASES, ("uint4", "hqq"), ("uint2", "hqq"), ("int8", "clip")])
def test_no_weight_is_further_off_than_a_zero(scheme: str, method: str) -> None:
    weight = _weight()
    made = _quantized(weight, scheme, method)
    error, zeros = np.square(made - weight).sum(0), np.square(weight, dtype=np.float64).sum(0)
    assert (error <= zeros * (1 + 1e-6)).all(), error / zeros


@pytest.mark.parametrize("scheme", ["int4", "uint4"])
def test_what_the_least_scale_resolves_stays(scheme: str) -> None:
    weight = _weight()
    column = _MAGNITUDES.index(1e-7) + 1
    made = _quantized(weight, scheme, "plain")
    assert np.isfinite(made).all() and made[:, column].any()
    assert np.abs(made - weight)[:, column].max() <= 2.0**-25 * 1.01  # half the smallest scale


def test_compiled_and_per_tensor_it_is_the_same() -> None:
    weight = jnp.asarray(_weight())[:, 4:]
    for group_size in (32, "channel", "tensor"):
        eager = quant.quantize_rtn(weight, "int4", group_size=group_size, scale_dtype="float16")
        options = {"group_size": group_size, "scale_dtype": "float16"}
        compiled = jax.jit(lambda w, options=options: quant.quantize_rtn(w, "int4", **options))(weight)
        jax.tree.map(np.testing.assert_array_equal, eager, compiled)
        assert np.asarray(eager.scale).any()


def test_it_is_no_worse_than_ggml() -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package: pip install gguf")
    rows = _weight().T.copy()
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind)
    made = quant.quantize_rtn(rows, "int4", group_size=32, axis=-1, scale_dtype="float16")
    ours = np.asarray(quant.dequantize(made))
    assert not theirs[_MAGNITUDES.index(2e-8) + 1].any(), "ggml writes zeros at this magnitude"
    errors = [np.square(values - rows, dtype=np.float64).sum(1) for values in (ours, theirs)]
    assert (errors[0] <= errors[1] * 1.01).all()


def test_above_the_range_is_an_error_that_names_the_weight() -> None:
    model = random_model(CONFIG)
    rules = (Rule(weights="*norm*", keep=True), Rule(weights="*", scheme="int4", group_size=32, scale_dtype="float16"))
    up = model.stacks[0][0].ffn.up_DF
    up.set_value(up.get_value().at[1, 3, 5].set(1e9))
    message = r"layers.1.ffn.up_DF of shape \(64, 64\): a scale is above the range of float16"
    with pytest.raises(LlamaJaxError, match=message):
        quantize(model, rules)
    with pytest.raises(LlamaJaxError, match=r"layers.1.ffn.up_DF as int2: .* is not finite: expected weights and "):
        quantize(model, Recipe(rules, 4.6), calibration=np.arange(64), window=32)


def test_what_is_kept_must_be_finite() -> None:
    model = random_model(CONFIG)
    model.norm.weight_D.set_value(model.norm.weight_D.get_value().at[3].set(jnp.nan))
    with pytest.raises(LlamaJaxError, match=r"norm.weight_D of shape \(64,\) holds NaN or infinity"):
        quantize(model, (Rule(weights="*", keep=True),))


def test_a_norm_that_scaling_takes_out_of_its_dtype_is_named() -> None:
    """SmoothQuant enlarges small activations of large weights: a norm of 6e4 would overflow float16."""
    model = random_model(CONFIG, dtype=jnp.float16)
    block = model.stacks[0][0]
    for weight, where, value in (
        (model.embed_VD, np.s_[:, 3], 1e-3),
        (block.attention.out_QD, np.s_[0, :, 3], 0),
        (block.ffn_norm.weight_D, np.s_[0, 3], 6e4),
        (block.ffn.up_DF, np.s_[0, 3], 6e4),
    ):
        weight.set_value(weight.get_value().at[where].set(value))
    rules = (
        Rule(weights="*norm*", keep=True),
        Rule(weights="layers.ffn.[gu]*", scheme="int8", scaling="smoothquant"),
        Rule(weights="*", keep=True),
    )
    with pytest.raises(LlamaJaxError, match="layers.0.ffn_norm.weight_D.*smoothquant.*range of float16"):
        quantize(model, rules, calibration=np.arange(64), window=32)
