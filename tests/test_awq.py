"""AWQ's search against brute force in NumPy, and the folding of its scales into the model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
import quant
from llamajax.parameters import named_weights
from quant.awq import activation_scale, search_scale

LENGTH, OUTPUTS = 64, 12


def _layer(seed: int = 0, loud: float = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight [K, M], inputs [T, K] with three loud channels, and their mean magnitudes [K]."""
    rng = np.random.default_rng(seed)
    x_TK = rng.normal(size=(128, LENGTH)).astype(np.float32) * rng.uniform(0.5, 2, LENGTH).astype(np.float32)
    x_TK[:, [3, 20, 50]] *= loud
    return rng.normal(size=(LENGTH, OUTPUTS)).astype(np.float32), x_TK, np.abs(x_TK).mean(0)


def _int3(weight: jax.Array) -> quant.QTensor:
    return quant.quantize_rtn(weight, "int3", group_size=32)


def _plain_int3(weight_KM: np.ndarray) -> np.ndarray:
    """Rounds to nearest in groups of 32, in float64 except for the scale, which is stored in bfloat16."""
    groups_CgM = weight_KM.astype(np.float64).reshape(-1, 32, weight_KM.shape[-1])
    low, high = groups_CgM.min(1, keepdims=True), groups_CgM.max(1, keepdims=True)
    scale = (np.where(high >= -low, high, low) / -4).astype(jnp.bfloat16).astype(np.float64)
    return (np.clip(np.round(groups_CgM / scale), -4, 3) * scale).reshape(weight_KM.shape)


def _plain_error(weights: list[np.ndarray], x_TK: np.ndarray, scale_K: np.ndarray) -> float:
    """Returns ||x w - (x / s) q(w s)||^2."""
    return sum(
        np.sum((x_TK.astype(np.float64) @ w - (x_TK / scale_K) @ _plain_int3(w * scale_K[:, None])) ** 2)
        for w in weights
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("loud", [1, 20])
def test_finds_what_trying_all_finds(seed: int, loud: float) -> None:
    weight_KM, x_TK, mean_K = _layer(seed, loud)
    weights = [weight_KM, 3 * weight_KM[:, :4] ** 2]
    found_K = search_scale([jnp.asarray(w) for w in weights], mean_K, x_TK, _int3)
    errors = []
    for alpha in np.arange(20) / 20:
        powers_K = np.maximum(mean_K.astype(np.float64) ** alpha, 1e-4)
        scale_K = powers_K / np.sqrt(powers_K.max() * powers_K.min())
        errors.append((_plain_error(weights, x_TK, scale_K), scale_K))
    np.testing.assert_allclose(found_K, min(errors, key=lambda pair: pair[0])[1], rtol=1e-5)


@pytest.mark.parametrize("loud", [0, 1, 3, 100])
def test_never_worse_on_the_sample_than_without_scales(loud: float) -> None:
    weight_KM, x_TK, mean_K = _layer(5, loud)
    scale_K = np.asarray(search_scale(jnp.asarray(weight_KM), mean_K, x_TK, _int3))
    assert np.isfinite(scale_K).all() and (scale_K > 0).all()
    plain = _plain_error([weight_KM], x_TK, np.ones(LENGTH))
    assert _plain_error([weight_KM], x_TK, scale_K) <= plain * (1 + 1e-6)


def test_clearly_better_where_few_channels_are_loud() -> None:
    weight_KM, x_TK, mean_K = _layer()
    sample, rest = x_TK[:64], x_TK[64:]
    scale_K = np.asarray(search_scale(jnp.asarray(weight_KM), mean_K, sample, _int3))
    assert _plain_error([weight_KM], rest, scale_K) < 0.5 * _plain_error([weight_KM], rest, np.ones(LENGTH))


def test_a_quantizer_without_error_is_left_alone() -> None:
    weight_KM, x_TK, mean_K = _layer()
    np.testing.assert_array_equal(search_scale(jnp.asarray(weight_KM), mean_K, x_TK, lambda w: w), 1)
    # Arrays are taken as dequantized weights; samples may have any leading axes.
    as_array = search_scale(jnp.asarray(weight_KM), mean_K, x_TK, lambda w: quant.dequantize(_int3(w)))
    np.testing.assert_array_equal(as_array, search_scale([weight_KM], mean_K, x_TK.reshape(2, 64, LENGTH), _int3))


def test_scales_are_positive_and_balanced() -> None:
    mean_K = jnp.asarray([0.0, 1e-30, 0.5, 1e30])
    for alpha in (0, 0.5, 0.95):
        scale_K = np.asarray(activation_scale(mean_K, alpha), np.float64)
        assert np.isfinite(scale_K).all() and (scale_K > 0).all()
        np.testing.assert_allclose(scale_K.max() * scale_K.min(), 1, rtol=1e-5)
    np.testing.assert_array_equal(activation_scale(mean_K, 0), 1)


def test_folded_as_documented_the_model_is_the_same(tiny_model: llamajax.Llama) -> None:
    rng = np.random.default_rng(0)
    width, ffn_width = tiny_model.config.width, tiny_model.config.ffn_width
    attention_LD, ffn_LD = (jnp.asarray(rng.uniform(0.3, 3, (2, width)), jnp.float32) for _ in range(2))
    down_LF = jnp.asarray(rng.uniform(0.3, 3, (2, ffn_width)), jnp.float32)
    factors = {
        "layers.*.attention_norm.weight_D": 1 / attention_LD,
        **{f"layers.*.attention.{name}": attention_LD[..., None] for name in ("query_DQ", "key_DM", "value_DM")},
        "layers.*.ffn_norm.weight_D": 1 / ffn_LD,
        "layers.*.ffn.gate_DF": ffn_LD[..., None],
        "layers.*.ffn.up_DF": ffn_LD[..., None] / down_LF[:, None],
        "layers.*.ffn.down_FD": down_LF[..., None],
    }
    weights = named_weights(tiny_model)
    assert weights["layers.*.ffn.down_FD"].shape == (2, ffn_width, width) and set(factors) < set(weights)
    factor_of = {id(weight): factors[name] for name, weight in weights.items() if name in factors}
    folded = jax.tree.map(lambda leaf: leaf * factor_of[id(leaf)] if id(leaf) in factor_of else leaf, tiny_model)
    tokens_BT = jnp.asarray(rng.integers(0, tiny_model.config.vocab_size, (2, 9)))
    expected = jax.jit(lambda model: model(tokens_BT)[0])(tiny_model)
    np.testing.assert_allclose(jax.jit(lambda model: model(tokens_BT)[0])(folded), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": []}, "no weights: expected one, or several that share their input"),
        ({"weights": jnp.ones((3, 2))}, r"weight of dtype float32 and shape \(3, 2\): expected floats, \(4, M\)"),
        ({"weights": jnp.ones((4, 2), jnp.int32)}, "weight of dtype int32"),
        ({"weights": jnp.full((4, 2), jnp.nan)}, "output error nan without scaling: expected finite weights"),
        ({"mean_abs_activation": jnp.ones((4, 1))}, r"mean_abs_activation of shape \(4, 1\): expected one per input"),
        ({"mean_abs_activation": -jnp.ones(4)}, "mean_abs_activation holds a value that is negative or not finite"),
        ({"x": jnp.ones((5, 3))}, r"inputs of dtype float32 and shape \(5, 3\): expected floats, samples of \(4,\)"),
        ({"x": jnp.ones((0, 4))}, "inputs of dtype float32 and shape"),
        ({"grid": 0}, "grid 0: expected at least 1 exponent"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    arguments = {"weights": jnp.ones((4, 2)), "mean_abs_activation": jnp.ones(4), "x": jnp.ones((5, 4))} | changes
    with pytest.raises(ValueError, match=message):
        search_scale(**({"quantize": lambda weight: weight} | arguments))
