"""SmoothQuant's scale against the paper's formula in float64, and what it does to int8 activations."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import quant
from quant import smoothing_scale

LENGTH = 256


def _layer(loud: float = 60) -> tuple[list[np.ndarray], np.ndarray]:
    """Makes two weights [K, M_i] and their inputs [T, K] with three loud channels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, LENGTH)).astype(np.float32)
    x[:, [3, 20, 50]] *= loud
    return [rng.normal(size=(LENGTH, M)).astype(np.float32) for M in (12, 5)], x


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 0.8, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_the_papers_formula(alpha: float, dtype: str) -> None:
    weights, x = _layer()
    weights = [jnp.asarray(w, dtype) for w in weights]
    largest = np.abs(x).max(0)
    scale = smoothing_scale(largest, weights, alpha)
    of_weights = np.abs(np.concatenate([np.asarray(w, np.float64) for w in weights], axis=1)).max(1)
    expected = largest.astype(np.float64) ** alpha / of_weights ** (1 - alpha)
    assert scale.dtype == jnp.float32
    np.testing.assert_allclose(scale, expected, rtol=1e-5)
    one = smoothing_scale(largest, jnp.concatenate(weights, axis=1), alpha)
    np.testing.assert_array_equal(one, scale)


def test_half_way_both_have_the_same_range() -> None:
    weights, x = _layer()
    scale = np.asarray(smoothing_scale(np.abs(x).max(0), weights[0]))
    np.testing.assert_allclose(np.abs(x / scale).max(0), np.abs(weights[0] * scale[:, None]).max(1), rtol=1e-5)


def test_the_product_stays() -> None:
    weights, x = _layer()
    scale = np.asarray(smoothing_scale(np.abs(x).max(0), weights), np.float64)
    for weight in weights:
        np.testing.assert_allclose((x / scale) @ (weight * scale[:, None]), x.astype(np.float64) @ weight, rtol=1e-9)


def test_a_maximum_of_zero_counts_as_the_smallest_other() -> None:
    largest = np.array([0, 4, 0.25, 0, 100], np.float32)
    weight = np.array([[2, 0, 8, 0, 0.5]], np.float32).T
    # As if activations were .25 4 .25 .25 100 and weights 2 .5 8 .5 .5.
    expected = np.sqrt([0.25 / 2, 4 / 0.5, 0.25 / 8, 0.25 / 0.5, 100 / 0.5])
    np.testing.assert_allclose(smoothing_scale(largest, weight), expected, rtol=1e-6)
    assert smoothing_scale(np.zeros(3), np.zeros((3, 2))).tolist() == [1, 1, 1]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    hnp.arrays(np.float32, 6, elements=st.floats(0, float(np.finfo(np.float32).max), width=32)),
    hnp.arrays(np.float32, (6, 2), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)),
    st.floats(0, 1),
)
def test_is_positive_and_finite_for_any_numbers(largest: np.ndarray, weight: np.ndarray, alpha: float) -> None:
    scale = np.asarray(smoothing_scale(largest, weight, alpha))
    assert (scale > 0).all() and np.isfinite(scale).all()


def test_works_under_jit_and_vmap() -> None:
    weights, x = _layer()
    largest = jnp.stack([jnp.abs(x).max(0), jnp.abs(x).mean(0)])
    stacked = jnp.stack([weights[0], 2 * weights[0]])
    together = jax.jit(jax.vmap(smoothing_scale))(largest, stacked)
    for layer in range(2):
        np.testing.assert_allclose(together[layer], smoothing_scale(largest[layer], stacked[layer]), rtol=1e-6)


def test_smoothing_saves_int8_activations() -> None:
    """As the paper argues: with loud channels, W8A8 per token is several times better after smoothing."""
    (weight, _), x = _layer(loud=200)
    exact = x.astype(np.float64) @ weight

    def error(x: np.ndarray, weight: np.ndarray) -> float:
        made = quant.quantize_rtn(jnp.asarray(weight), "int8", group_size="channel")
        made = dataclasses.replace(made, activations="int8-token")
        return float(np.linalg.norm(quant.product(jnp.asarray(x), made) - exact))

    scale = np.asarray(smoothing_scale(np.abs(x).max(0), weight))
    smoothed = error(x / scale, weight * scale[:, None])
    # Measured: the error is 6 times smaller.
    assert smoothed < error(x, weight) / 3


ONES = np.ones((8, 2), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: smoothing_scale(np.ones(8), []), "no weights: expected one, or several"),
        (lambda: smoothing_scale(np.ones((2, 8)), ONES), r"max_abs_activation of shape \(2, 8\): expected .* \(K,\)"),
        (lambda: smoothing_scale(np.ones(7), ONES), r"weight of dtype float32 and shape \(8, 2\): .* \(7, M\)"),
        (lambda: smoothing_scale(np.ones(8), [ONES, ONES[:, 0]]), r"weight of dtype float32 and shape \(8,\)"),
        (lambda: smoothing_scale(np.ones(8), ONES.astype(int)), "weight of dtype int32"),
        (lambda: smoothing_scale(-np.ones(8), ONES), "max_abs_activation holds a value that is negative or not finite"),
        (lambda: smoothing_scale(np.full(8, np.inf), ONES), "max_abs_activation holds a value"),
        (lambda: smoothing_scale(np.ones(8), ONES * np.nan), "a weight holds a value that is negative or not finite"),
        (lambda: smoothing_scale(np.ones(8), ONES, 1.5), "alpha 1.5: expected 0 to 1"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
