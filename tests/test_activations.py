"""Activations in int8 against NumPy: rounding by its formula, products by integer arithmetic."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quant
from quant import QTensor
from tests.fuzz import fuzz

_thorough = fuzz(15)
KINDS = ("int8-token", "int8-group")


def _plain(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns codes in int64 [..., C, g] and scales in float32 [..., C, 1], by FORMAT.md."""
    groups = x.astype(np.float32).reshape(*x.shape[:-1], -1, size)
    scale = np.abs(groups).max(-1, keepdims=True) * np.float32(1 / 127)
    return np.round(groups / np.where(scale == 0, np.float32(1), scale)).astype(np.int64), scale


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.matrix
@pytest.mark.parametrize("size", [1, 8, 16, 48, "token"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_and_scales_by_definition(size: Any, dtype: str) -> None:
    x = jnp.asarray(_normal(2, 3, 48) * 10.0 ** np.arange(-3, 3).repeat(8), dtype)
    codes, scale = quant.quantize_activations(x, size)
    expected, expected_scale = _plain(np.asarray(x, np.float32), 48 if size == "token" else size)
    assert codes.dtype == jnp.int8 and scale.dtype == jnp.float32 and scale.shape == expected_scale.shape[:-1]
    np.testing.assert_array_equal(codes, expected.reshape(x.shape))
    np.testing.assert_array_equal(scale, expected_scale[..., 0])
    rounded = quant.round_activations(x, size)
    assert rounded.dtype == jnp.float32
    np.testing.assert_array_equal(rounded, (expected.astype(np.float32) * expected_scale).reshape(x.shape))
    bound = np.repeat(np.asarray(scale), 48 // scale.shape[-1], -1) / 2
    assert (np.abs(np.asarray(rounded) - np.asarray(x, np.float32)) <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("jit", [False, True])
def test_bfloat16_is_rounded_to_by_every_program(jit: bool) -> None:
    """XLA allows a compiler to drop two conversions in a row; the result must still be NumPy's with rounding."""
    rng = np.random.default_rng(0)
    weight = quant.quantize_rtn(jnp.asarray(rng.normal(size=(64, 8)), jnp.float32), "int4", group_size=32)
    weight = dataclasses.replace(weight, activations="bfloat16").validate()
    x = rng.normal(size=(3, 64)).astype(np.float32)
    product = lambda x: quant.product(x, weight)  # noqa: E731
    rounded = x.astype(jnp.bfloat16).astype(np.float64)
    expected = rounded @ np.asarray(quant.dequantize(weight), np.float64)
    made = np.asarray((jax.jit(product) if jit else product)(jnp.asarray(x)))
    np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5)
    assert np.abs(x @ np.asarray(quant.dequantize(weight)) - expected).max() > 1e-3  # the rounding matters here


def test_halves_go_to_even_codes_and_both_ends_are_127() -> None:
    codes, scale = quant.quantize_activations(jnp.array([0.5, 1.5, 2.5, -0.5, -1.5, 127, -127]), "token")
    assert codes.tolist() == [0, 2, 2, 0, -2, 127, -127] and scale.tolist() == [1]


def test_zeros_small_numbers_and_what_is_not_finite() -> None:
    x = np.stack([np.zeros(8), np.full(8, 1e-41), np.r_[[190e-45], np.zeros(7)], np.ones(8), np.ones(8)])
    x[3, 2], x[4, 5] = np.nan, -np.inf
    rounded = np.asarray(quant.round_activations(jnp.asarray(x, jnp.float32), "token"))
    assert not rounded[0].any() and (np.abs(rounded[1:3]) <= 1e-40).all()
    assert not np.isfinite(rounded[3:]).any()


@st.composite
def _products(draw: st.DrawFn) -> tuple[np.ndarray, QTensor]:
    """Draws activations, and a weight that is integers times scales."""
    scheme = quant.SCHEMES[draw(st.sampled_from(["int8", "int4", "uint4", "ternary"]))]
    group, axis = draw(st.sampled_from([8, 16, 40])), draw(st.sampled_from([-2, -1]))
    K, M, B, T = draw(st.integers(1, 4)) * group, *(draw(st.integers(1, 5)) for _ in range(3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    turn = (lambda x: x) if axis == -2 else np.transpose
    scale = turn(rng.uniform(0.5, 2, (K // group, M)).astype(np.float32))
    zero = jnp.asarray(rng.integers(0, 16, scale.shape, np.uint8)) if scheme.kind == "uint" else None
    codes = jnp.asarray(rng.integers(0, scheme.max_code + 1, turn(np.empty((K, M))).shape, np.uint8))
    kind = draw(st.sampled_from(KINDS))
    made = QTensor.from_codes(codes, jnp.asarray(scale), scheme, zero=zero, axis=axis, activations=kind)
    x = rng.normal(size=(B, T, K)) * 10.0 ** rng.integers(-2, 3, (B, 1, 1))
    return x[(0,) * draw(st.integers(0, 2))].astype(np.float32), made


@_thorough
@given(_products())
def test_product_is_integer_arithmetic(case: tuple[np.ndarray, QTensor]) -> None:
    """The expected value sums integer products in int64 per group of the weight, then multiplies by the scales."""
    x, made = case
    size = made.group_size if made.activations == "int8-group" else made.shape[made.axis]
    turn = (lambda plane: np.asarray(plane)) if made.axis == -2 else (lambda plane: np.asarray(plane).T)
    codes, scale = _plain(x, size)
    codes = codes.reshape(*codes.shape[:-2], -1, made.group_size)
    whole = turn(quant.unpack(made.planes, made.scheme.bits, made.group_size, axis=made.axis)).astype(np.int64)
    whole = whole.reshape(-1, made.group_size, whole.shape[-1])
    whole = whole - (made.scheme.bias if made.zero is None else turn(made.zero).astype(np.int64)[:, None])
    sums = np.einsum("...cg,cgm->...cm", codes, whole)
    expected = (sums * scale.astype(np.float64) * turn(made.scale).astype(np.float64)).sum(-2)
    got = jax.jit(lambda x, made: quant.product(x, made, axis=made.axis))(jnp.asarray(x), made)
    reach = np.abs(x).max() * np.abs(np.asarray(quant.dequantize(made))).max() * x.shape[-1]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6 * reach)


@pytest.mark.parametrize("kind", KINDS)
def test_under_scan_vmap_and_by_number(kind: str) -> None:
    made = quant.quantize_rtn(jnp.asarray(_normal(3, 32, 32)), "int8", group_size=16)
    made = dataclasses.replace(made, activations=kind).validate()
    x, dense = jnp.asarray(_normal(2, 32)), np.asarray(quant.dequantize(made))
    rounded = np.multiply(*_plain(np.asarray(x), 16 if kind == "int8-group" else 32)).reshape(2, 32)
    by_number = jnp.stack([quant.product(x, made, number) for number in range(3)])
    np.testing.assert_allclose(by_number, rounded @ dense, rtol=1e-5, atol=1e-5)
    each = jax.vmap(lambda layer: quant.product(x, layer))(made)
    np.testing.assert_allclose(each, rounded @ dense, rtol=1e-5, atol=1e-5)
    scanned = jax.lax.scan(lambda x, layer: (x, quant.product(x, layer)), x, made)[1]
    np.testing.assert_allclose(scanned, rounded @ dense, rtol=1e-5, atol=1e-5)
    assert jax.eval_shape(lambda made: made[1], made).activations == kind


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_the_rounding(kind: str) -> None:
    """Gradients of activations are as without rounding; gradients of scales use the rounded activations."""
    made = quant.quantize_rtn(jnp.asarray(_normal(32, 4)), "int8", group_size=16, scale_dtype="float32")
    made = dataclasses.replace(made, activations=kind)
    x, out = jnp.asarray(_normal(2, 32, seed=1), jnp.bfloat16), jnp.asarray(_normal(2, 4, seed=2))

    def loss(x: jax.Array, scale: jax.Array) -> jax.Array:
        replaced = dataclasses.replace(made, scale=scale)
        return jnp.sum(quant.product(x, replaced, dtype=jnp.float32) * out)

    by_x, by_scale = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, made.scale)
    assert by_x.dtype == jnp.bfloat16
    exact = np.asarray(out) @ np.asarray(quant.dequantize(made)).T
    np.testing.assert_allclose(np.asarray(by_x, np.float32), exact, rtol=2**-8, atol=1e-5)
    rounded = np.multiply(*_plain(np.asarray(x, np.float32), 16 if kind == "int8-group" else 32)).reshape(2, 32)
    whole = np.asarray(quant.unpack(made.planes, 8, 16), np.float64) - 128
    expected = (whole * (rounded.T @ np.asarray(out))).reshape(2, 16, 4).sum(1)
    np.testing.assert_allclose(by_scale, expected, rtol=1e-4, atol=1e-3)
    tangent = jax.jvp(lambda x: quant.round_activations(x, "token"), (jnp.ones(4),), (jnp.arange(4.0),))[1]
    assert tangent.tolist() == [0, 1, 2, 3]


def test_tables_are_looked_up_as_they_are_and_multiplied_with_rounded_activations() -> None:
    table = quant.quantize_rtn(jnp.asarray(_normal(10, 32)), "int8", group_size=16, axis=-1)
    eight = dataclasses.replace(table, activations="int8-token")
    np.testing.assert_array_equal(quant.rows(eight, jnp.arange(3)), quant.dequantize(table)[:3])
    x = jnp.asarray(_normal(2, 32))
    rounded = np.multiply(*_plain(np.asarray(x), 32)).reshape(2, 32)
    head = quant.product(x, eight, axis=-1)
    np.testing.assert_allclose(head, rounded @ np.asarray(quant.dequantize(table)).T, rtol=1e-5, atol=1e-5)


def test_groups_lose_less_than_tokens_where_channels_differ() -> None:
    made = quant.quantize_rtn(jnp.asarray(_normal(128, 16)), "int8", group_size=16)
    x = _normal(8, 128, seed=1)
    x[:, 5] *= 50
    exact = x @ np.asarray(quant.dequantize(made))
    errors = []
    for kind in ("int8-group", "int8-token"):
        got = quant.product(jnp.asarray(x), dataclasses.replace(made, activations=kind))
        errors.append(np.linalg.norm(got - exact))
    assert errors[0] < errors[1] / 2


def _int8(**changes: Any) -> QTensor:
    made = quant.quantize_rtn(jnp.asarray(_normal(32, 4)), "int8", group_size=16)
    return dataclasses.replace(made, **{"activations": "int8-token"} | changes)


def _product(*shape: int, axis: int = -2, **changes: Any) -> jax.Array:
    return quant.product(jnp.ones(shape), _int8(**changes), axis=axis)


ORDER = jnp.arange(32, dtype=jnp.int32)[:, None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _int8(activations="int4").validate(), "activations 'int4': expected None or 'bfloat16' or 'int8-tok"),
        (
            lambda: _int8(activations="int8-group", order=ORDER).validate(),
            "'int8-group' beside an order: .* 'int8-token'",
        ),
        (lambda: _product(2, 32, activations="int8-group", order=ORDER), "'int8-group' beside an order"),
        (lambda: _product(2, 4, axis=-1), "a product along axis -1: expected -2, the weight's contraction axis"),
        (
            lambda: _product(2, 4),
            r"activations of shape \(2, 4\) .* weight of shape \(32, 4\): expected \[\.\.\., 32\]",
        ),
        (
            lambda: quant.quantize_activations(jnp.ones((2, 8), int), "token"),
            r"dtype int32 and shape \(2, 8\): expected",
        ),
        (lambda: quant.quantize_activations(jnp.ones((2, 8)), 3), "groups of 3 for activations of 8 channels"),
        (lambda: quant.quantize_activations(jnp.ones((2, 8)), 0), "groups of 0 for activations of 8 channels"),
        (lambda: quant.round_activations(jnp.ones((2, 8)), "group"), "groups of 'group' for .* divisor or 'token'"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_order_goes_with_tokens() -> None:
    order = jnp.asarray(np.random.default_rng(0).permutation(32)[:, None], jnp.int32)
    made, x = _int8(order=order).validate(), _normal(2, 32)
    rounded = np.multiply(*_plain(x, 32)).reshape(2, 32)
    expected = rounded @ np.asarray(quant.dequantize(made))
    np.testing.assert_allclose(quant.product(jnp.asarray(x), made), expected, rtol=1e-5, atol=1e-5)
