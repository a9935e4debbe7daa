"""Calibration: statistics of each weight's inputs, and scales folded into what produces the inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import Config, LlamaJaxError
from llamajax.layer_weights import LAYER
from llamajax.parameters import inputs, named_weights
from llamajax.quantization.calibrate import (
    advance,
    block_of,
    calibration_windows,
    fold,
    forward,
    observe,
    observe_array,
)
from tests.reference import forward as reference_forward
from tests.reference import random_model, weights_of

CONFIG = Config(
    vocab_size=96,
    width=32,
    ffn_width=48,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_size=8,
    context_length=64,
)
WINDOWS = np.random.default_rng(0).integers(0, 96, (6, 16)).astype(np.int32)
INPUTS = inputs(CONFIG, 0)
FIRST = {group: names[0] for group, names in INPUTS.items()}
NUMBERS = CONFIG.numbers(0)
THEIRS = {"attention": "self_attn.k_proj", "out": "self_attn.o_proj", "ffn": "mlp.up_proj", "down": "mlp.down_proj"}


class Spied:
    """A matrix of the NumPy reference that records what it is multiplied with."""

    __array_ufunc__ = None

    def __init__(self, array: np.ndarray, seen: list[np.ndarray]):
        self.array, self.seen = array, seen

    @property
    def T(self) -> "Spied":
        """Returns the object itself: the reference multiplies by `weights[name].T`."""
        return self

    def __rmatmul__(self, x: np.ndarray) -> np.ndarray:
        """Returns x @ weight.T."""
        self.seen.append(x)
        return x @ self.array.T


def layers_of(model) -> list[dict[str, jax.Array]]:
    stacks = named_weights(model)
    return [{name: stacks[f"layers.*.{name}"][layer] for name in LAYER} for layer in range(CONFIG.num_layers)]


def reference_inputs(model, layer: int) -> dict[str, np.ndarray]:
    """Returns all inputs of a layer's weights over WINDOWS, [tokens, K] in float64, by the independent model."""
    weights, seen = weights_of(model), {}
    for group, name in THEIRS.items():
        key, seen[group] = f"model.layers.{layer}.{name}.weight", []
        weights[key] = Spied(weights[key], seen[group])
    for row in WINDOWS:
        reference_forward(CONFIG, weights, row)
    return {group: np.concatenate(rows) for group, rows in seen.items()}


@pytest.mark.parametrize("layer", [0, 2])
def test_statistics_are_those_of_the_reference(layer: int) -> None:
    model = random_model(CONFIG)
    layers = layers_of(model)
    x_WTD = np.array(model.embed_VD.get_value()[WINDOWS])
    for before in layers[:layer]:
        x_WTD = advance(block_of(before, CONFIG, 0), x_WTD, NUMBERS)
    seen = observe(block_of(layers[layer], CONFIG, layer), x_WTD, FIRST, True, NUMBERS)
    for group, x_TK in reference_inputs(model, layer).items():
        statistics = seen[group]
        np.testing.assert_allclose(statistics.mean_square_K, np.mean(x_TK**2, 0), rtol=2e-4)
        np.testing.assert_allclose(statistics.mean_abs_K, np.mean(abs(x_TK), 0), rtol=2e-4)
        np.testing.assert_allclose(statistics.max_abs_K, abs(x_TK).max(0), rtol=2e-4)
        expected = x_TK.T @ x_TK / len(x_TK)
        np.testing.assert_allclose(statistics.hessian_KK, expected, atol=2e-4 * abs(expected).max())
        assert statistics.sample_TK.shape[1] == x_TK.shape[1] and len(statistics.sample_TK) > 0
        # Each sample is the input of some token.
        distance = np.abs(np.asarray(statistics.sample_TK)[:, None] - x_TK[None]).max(-1).min(-1)
        assert distance.max() < 1e-3


def test_hessians_are_made_only_where_asked_for() -> None:
    model = random_model(CONFIG)
    x_WTD = np.array(model.embed_VD.get_value()[WINDOWS])
    seen = observe(block_of(layers_of(model)[0], CONFIG, 0), x_WTD, {"ffn": "ffn.up_DF"}, False, NUMBERS)
    assert set(seen) == {"ffn"} and seen["ffn"].hessian_KK is None


def test_statistics_of_an_array_do_not_depend_on_batches() -> None:
    x_WTK = np.random.default_rng(1).standard_normal((7, 1500, 5)).astype(np.float32)
    seen = observe_array(x_WTK, hessian=True)
    flat = x_WTK.reshape(-1, 5).astype(np.float64)
    np.testing.assert_allclose(seen.mean_square_K, np.mean(flat**2, 0), rtol=1e-4)
    np.testing.assert_allclose(seen.hessian_KK, flat.T @ flat / len(flat), atol=1e-4)
    assert 1000 <= len(seen.sample_TK) < 2000


@pytest.mark.parametrize("group", list(INPUTS))
def test_folded_scales_change_nothing(group: str) -> None:
    """A layer with folded scales is the same function; query heads that share a value head share their scales."""
    model = random_model(CONFIG)
    before = layers_of(model)[1]
    x_WTD = np.array(model.embed_VD.get_value()[WINDOWS]) * 20
    expected = forward(block_of(before, CONFIG, 1), jnp.asarray(x_WTD), NUMBERS)
    width = before[INPUTS[group][0]].shape[0]
    scale_K = np.random.default_rng(2).uniform(0.3, 3, width).astype(np.float32)
    if group == "out":
        scale_K = np.broadcast_to(scale_K.reshape(2, 3, 8)[:, :1], (2, 3, 8)).reshape(-1)
    after = dict(before)
    fold(after, LAYER, group, jnp.asarray(scale_K), CONFIG, jnp.float32)
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert set(INPUTS[group]) < set(changed) and len(changed) == len(INPUTS[group]) + 1
    np.testing.assert_allclose(forward(block_of(after, CONFIG, 1), jnp.asarray(x_WTD), NUMBERS), expected, atol=2e-4)


def test_a_norm_in_16_bits_is_folded_without_an_error() -> None:
    """The weights get the scale that the rounded norm leaves."""
    before = layers_of(random_model(CONFIG))[0]
    before["ffn_norm.weight_D"] = before["ffn_norm.weight_D"].astype(jnp.bfloat16).astype(jnp.float32)
    before["ffn_norm.weight_D"] = before["ffn_norm.weight_D"].at[3].set(0)
    after = dict(before)
    fold(after, LAYER, "ffn", jnp.linspace(0.5, 2.1, 32), CONFIG, jnp.bfloat16)
    norm = after["ffn_norm.weight_D"]
    np.testing.assert_array_equal(norm, norm.astype(jnp.bfloat16).astype(jnp.float32))
    for name in INPUTS["ffn"]:
        products = after[name] * norm[:, None], before[name] * before["ffn_norm.weight_D"][:, None]
        np.testing.assert_allclose(*products, rtol=1e-5)
        assert np.isfinite(np.asarray(after[name])).all()


@pytest.mark.parametrize(
    ("tokens", "window", "message"),
    [
        (np.arange(15), 16, "15 tokens: expected at least 16"),
        (np.arange(32), 65, "window of 65 tokens: expected 1 to 64"),
        (np.arange(90, 106), 16, "outside of the model's 96"),
        (np.array([-1] * 16), 16, "outside of the model's 96"),
        (np.zeros((2, 2, 16)), 16, r"shape \(2, 2, 16\): expected ids \[n\], or windows of ids \[W, T\]"),
    ],
)
def test_what_is_no_calibration_text_is_named(tokens: np.ndarray, window: int, message: str) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        calibration_windows(tokens, CONFIG, window)


def test_windows_do_not_overlap() -> None:
    np.testing.assert_array_equal(calibration_windows(np.arange(40), CONFIG, 16), np.arange(32).reshape(2, 16))


def test_windows_begin_with_bos() -> None:
    """With a document's own, if what is left of the one before is shorter than a window; else in place of a token."""
    long, short = [1, *range(2, 42)], [1, *range(50, 60)]
    tokens = np.array(long + short + short + short)
    windows_WT = calibration_windows(tokens, CONFIG, 16, bos_id=1)
    np.testing.assert_array_equal(windows_WT, [long[:16], [1, *long[17:32]], (short + short)[:16]])
    np.testing.assert_array_equal(tokens, long + short * 3, "the caller's ids must not change")
    with pytest.raises(LlamaJaxError, match="outside of the model's 96"):
        calibration_windows(tokens, CONFIG, 16, bos_id=96)


def test_windows_that_are_given_stay() -> None:
    windows_WT = np.arange(32).reshape(2, 16)
    np.testing.assert_array_equal(calibration_windows(windows_WT, CONFIG, 99, bos_id=7), windows_WT)
    with pytest.raises(LlamaJaxError, match="window of 65 tokens: expected 1 to 64"):
        calibration_windows(np.zeros((2, 65)), CONFIG, 16)
