"""Outlier channels: chosen and split off as in LLM.int8(), decoded from bytes by hand, and lower errors."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant import QTensor

LOUD = np.array([3, 20, 50, 51], np.int32)


def _layer(shape: tuple[int, ...] = (64, 12), loud: float = 60) -> tuple[np.ndarray, np.ndarray]:
    """Makes a weight [..., K, M] and inputs [T, K] with four loud channels."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(128, shape[-2])).astype(np.float32)
    x[:, LOUD] *= loud
    return rng.normal(size=shape).astype(np.float32), x


def _int8(weight: jax.Array) -> QTensor:
    return quant.quantize_rtn(weight, "int8", group_size=16)


def _decode(arrays: dict[str, bytes], K: int, M: int, g: int) -> np.ndarray:
    """Decodes int4 with float16 scales and outliers along axis -2, element by element, as FORMAT.md describes it."""
    packed = np.frombuffer(arrays["planes.0"], "u1").reshape(K // 2, M)
    scale = np.frombuffer(arrays["scale"], "<f2").reshape(K // g, M)
    weight = np.empty((K, M), np.float32)
    for k in range(K):
        c, element = divmod(k, g)
        nibble = packed[c * (g // 2) + element % (g // 2)] >> (4 * (element // (g // 2))) & 15
        weight[k] = (nibble.astype(np.float32) - 8) * scale[c]
    index = np.frombuffer(arrays["outlier_index"], "<i4")
    weight[index] = np.frombuffer(arrays["outlier"], "<f2").reshape(len(index), M)
    return weight


def test_golden_bytes() -> None:
    """The bytes are those of FORMAT.md's worked example, including its outlier."""
    scale = jnp.array([[1, 0.5], [2, -0.25]], jnp.float16)
    made = QTensor.from_codes(
        jnp.arange(16, dtype=jnp.uint8).reshape(2, 8).T,
        scale,
        quant.SCHEMES["int4"],
        outlier=jnp.array([[100, -0.5]], jnp.float16),
        outlier_index=jnp.array([[2]], jnp.int32),
    )
    golden = {"planes.0": "20a8 31b9 64ec 75fd", "scale": "003c 0038 0040 00b4"}
    golden |= {"outlier": "4056 00b8", "outlier_index": "02000000"}
    arrays = {name: np.asarray(getattr(made, name, made.planes[0])).tobytes() for name in golden}
    assert arrays == {name: bytes.fromhex(text) for name, text in golden.items()}
    rows = [[-8, 0], [-7, 0.5], [100, -0.5], [-5, 1.5], [-8, -1], [-6, -1.25], [-4, -1.5], [-2, -1.75]]
    assert _decode(arrays, 8, 2, 4).tolist() == rows == quant.dequantize(made).tolist()
    assert made.nbytes == 8 + 8 + 4 + 4


def test_the_decoder_agrees_on_random_bytes() -> None:
    rng = np.random.default_rng(1)
    made = QTensor.from_codes(
        jnp.asarray(rng.integers(0, 16, (64, 5), np.uint8)),
        jnp.asarray(rng.normal(size=(4, 5)), jnp.float16),
        quant.SCHEMES["int4"],
        outlier=jnp.asarray(rng.normal(size=(7, 5)), jnp.float16),
        outlier_index=jnp.asarray(rng.permutation(64)[:7, None], jnp.int32),
    )
    names = ("planes.0", "scale", "outlier", "outlier_index")
    arrays = {name: np.asarray(getattr(made, name, made.planes[0])).tobytes() for name in names}
    np.testing.assert_array_equal(quant.dequantize(made), _decode(arrays, 64, 5, 16))


@pytest.mark.parametrize("shape", [(40,), (3, 40)])
def test_channels_are_the_largest_ascending_and_the_first_of_equals(shape: tuple[int, ...]) -> None:
    largest = np.random.default_rng(2).integers(0, 12, shape).astype(np.float32)
    for count in (1, 5, 40):
        found = quant.outlier_channels(largest, count)
        expected = np.sort(np.argsort(-largest, axis=-1, kind="stable")[..., :count], axis=-1)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(jax.jit(quant.outlier_channels, static_argnums=1)(largest, count), expected)


def test_channels_above_a_threshold() -> None:
    largest = np.array([1, 7, 6, 9, 2], np.float32)
    assert quant.outlier_channels(largest, threshold=6).tolist() == [1, 3]
    assert quant.outlier_channels(np.stack([largest, np.arange(5)]), threshold=6.0).tolist() == [[1, 3], [3, 4]]
    assert quant.outlier_channels(largest, threshold=9).shape == (0,)


@pytest.mark.matrix
@pytest.mark.parametrize("scheme", ["int8", "uint4", "nf4"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_split_keeps_channels_and_quantizes_the_rest_as_if_they_were_zero(scheme: str, axis: int) -> None:
    weight = _layer((2, 64, 12))[0]
    weight[:, LOUD] *= 1000
    index = np.stack([LOUD, LOUD[::-1] + 1])
    turn = (lambda x: x) if axis == -2 else (lambda x: np.swapaxes(x, -1, -2))

    def quantize(weight: jax.Array) -> QTensor:
        return quant.quantize_rtn(weight, scheme, group_size=16, axis=axis)

    made = quant.split_outliers(turn(weight), index, quantize, axis=axis)
    assert made.outlier.dtype == jnp.float16 and made.outlier_index.dtype == jnp.int32
    plain, expected = weight.copy(), np.empty_like(weight)
    for layer, channels in enumerate(index):
        plain[layer, channels] = 0
        expected[layer] = turn(np.asarray(quant.dequantize(quantize(turn(plain))))[layer])
        expected[layer, channels] = weight[layer, channels].astype(np.float16)
    np.testing.assert_array_equal(quant.dequantize(made), turn(expected))
    np.testing.assert_array_equal(quant.dequantize(made[1].validate()), turn(expected)[1])
    traced = jax.jit(lambda w, i: quant.split_outliers(w, i, quantize, axis=axis))(turn(weight), index)
    np.testing.assert_array_equal(quant.dequantize(traced), turn(expected))


def test_what_codes_of_outliers_stand_for_does_not_matter() -> None:
    """Outliers replace whatever their codes stand for. HQQ's zero points are fractions: no code stands for 0."""
    weight, _ = _layer()
    made = quant.split_outliers(weight, LOUD, lambda w: quant.quantize_hqq(w, "uint4", group_size=16), dtype="float32")
    assert jnp.abs(quant.dequantize(dataclasses.replace(made, outlier=None, outlier_index=None))[LOUD]).max() > 1e-3
    np.testing.assert_array_equal(quant.dequantize(made)[LOUD], weight[LOUD])


def test_no_outliers_is_the_plain_weight() -> None:
    weight, _ = _layer()
    made = quant.split_outliers(weight, quant.outlier_channels(np.ones(64), threshold=6), _int8)
    assert made.outlier is None and made.outlier_index is None
    np.testing.assert_array_equal(quant.dequantize(made), quant.dequantize(_int8(jnp.asarray(weight))))


def test_gptq_without_these_channels_in_its_hessian() -> None:
    """Outliers replace the codes' values, so errors that GPTQ moves into outlier channels would not be compensated."""
    weight, x = _layer()
    x = x @ (np.eye(64) + np.random.default_rng(5).normal(size=(64, 64)) / 8).astype(np.float32)
    x[:, LOUD] *= 30
    hessian = np.asarray(quant.hessian.hessian(x))
    keep = np.ones(64, np.float32)
    keep[LOUD] = 0

    def error(hessian: np.ndarray) -> float:
        made = quant.split_outliers(weight, LOUD, lambda w: quant.quantize_gptq(w, hessian, "int3", group_size=16))
        return float(np.linalg.norm(x @ (np.asarray(quant.dequantize(made)) - weight)))

    # Measured: the error is 3.2 times smaller.
    assert error(hessian * keep * keep[:, None]) < error(hessian) / 2


def test_a_program_has_no_scatter() -> None:
    made = dataclasses.replace(quant.split_outliers(_layer()[0], LOUD, _int8), activations="int8-token")
    for call in (quant.dequantize, lambda made: quant.product(jnp.ones((2, 64)), made)):
        text = jax.jit(call).lower(made).as_text()
        assert "stablehlo" in text and "scatter" not in text and "custom_call" not in text


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["int8-token", "int8-group"])
@pytest.mark.parametrize("axis", [-2, -1])
def test_product_leaves_activations_of_outliers_alone(kind: str, axis: int) -> None:
    """As in LLM.int8(), there are two products: of integers without the outliers, and of floats for the outliers."""
    weight, x = _layer()
    made = quant.split_outliers(
        weight if axis == -2 else weight.T,
        LOUD,
        lambda w: quant.quantize_rtn(w, "int8", group_size=16, axis=axis),
        axis=axis,
    )
    made = dataclasses.replace(made, activations=kind)
    dense = np.asarray(quant.dequantize(made), np.float64)
    dense = dense if axis == -2 else dense.T
    quiet = x.copy()
    quiet[:, LOUD] = 0
    groups = quiet.reshape(len(x), -1, 16 if kind == "int8-group" else 64)
    scale = np.abs(groups).max(-1, keepdims=True) * np.float32(1 / 127)
    rounded = (np.round(groups / scale).astype(np.int64) * scale.astype(np.float64)).reshape(x.shape)
    expected = rounded @ dense + x[:, LOUD] @ dense[LOUD]
    np.testing.assert_allclose(quant.product(jnp.asarray(x), made, axis=axis), expected, rtol=1e-5, atol=2e-3)
    gradient = jax.grad(lambda x: quant.product(x, made, axis=axis).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.broadcast_to(dense.sum(1), x.shape), rtol=1e-4, atol=1e-4)


def test_outlier_channels_save_int8_activations() -> None:
    """As the paper argues: if loud channels are not split off, they set every token's scale, and others round away."""
    weight, x = _layer((256, 32))
    exact = x.astype(np.float64) @ weight
    plain = dataclasses.replace(_int8(jnp.asarray(weight)), activations="int8-token")
    index = quant.outlier_channels(np.abs(x).max(0), 4)
    assert index.tolist() == LOUD.tolist()
    split = dataclasses.replace(quant.split_outliers(weight, index, _int8), activations="int8-token")
    errors = [np.linalg.norm(quant.product(jnp.asarray(x), made) - exact) for made in (plain, split)]
    # Measured: the error is 25 times smaller.
    assert errors[1] < errors[0] / 10


def test_gradients_with_respect_to_outliers() -> None:
    made = quant.split_outliers(_layer()[0], LOUD, _int8, dtype="float32")
    out = jnp.asarray(np.random.default_rng(4).normal(size=(64, 12)), jnp.float32)

    def loss(outlier: jax.Array) -> jax.Array:
        return jnp.sum(quant.dequantize(dataclasses.replace(made, outlier=outlier)) * out)

    np.testing.assert_allclose(jax.grad(loss)(made.outlier), out[LOUD], rtol=1e-6)


def _split(weight: Any = None, index: Any = LOUD, quantize: Any = _int8, **others: Any) -> QTensor:
    return quant.split_outliers(_layer()[0] if weight is None else weight, index, quantize, **others)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quant.outlier_channels(np.ones(8)), "count None and threshold None: expected one of the two"),
        (lambda: quant.outlier_channels(np.ones(8), 2, threshold=6), "count 2 and threshold 6: expected one"),
        (lambda: quant.outlier_channels(np.ones(8), 9), "count 9: expected 1 to 8"),
        (lambda: quant.outlier_channels(np.ones(8), 0), "count 0: expected 1 to 8"),
        (lambda: quant.outlier_channels(-np.ones(8), 1), "max_abs_activation holds a value that is negative"),
        (lambda: quant.outlier_channels(np.array([1, np.nan]), 1), "negative or not finite"),
        (lambda: quant.outlier_channels(np.ones(8, int), 1), "max_abs_activation of dtype int32"),
        (lambda: _split(np.ones((64, 4), int)), "weight of dtype int32 and shape .*: expected floats, at least 2 axes"),
        (lambda: _split(index=LOUD * 1.0), "index of dtype float32 and shape .*: expected integers, \\('r',\\)"),
        (lambda: _split(np.ones((2, 64, 4))), r"index of dtype int32 and shape \(4,\): expected integers, \(2, 'r'\)"),
        (lambda: _split(index=np.array([3, 3])), r"repeated channel or one not in 0 \.\.\. 63: expected distinct"),
        (lambda: _split(index=np.array([64])), "a repeated channel or one not in"),
        (lambda: _split(index=np.array([-1])), "a repeated channel or one not in"),
        (lambda: _split(dtype="int8"), "dtype int8: expected float32 or bfloat16 or float16"),
        (lambda: _split(_layer()[0] * 1e6), "an outlier is not finite in float16: expected"),
        (lambda: _split(np.full((64, 4), np.nan, np.float32), dtype="float32"), "an outlier is not finite in float32"),
        (lambda: _split(axis=0), "axis 0: expected -2"),
        (lambda: _split(np.ones((64, 64)), axis=-1), r"contraction axis -2: expected \(64, 64\) and -1"),
        (
            lambda: quant.product(
                jnp.ones((2, 64)),
                dataclasses.replace(_split(np.ones((2, 64, 4)), np.stack([LOUD, LOUD])), activations="int8-token"),
            ),
            r"a weight of shape \(2, 64, 4\) without an index: expected one number",
        ),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
