"""Two levels of scales, as in ggml's K types: codes are the nearest for the stored scales, by rounding and by GPTQ."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant import (
    QTensor,
    ggml,
    quantize_gptq,
    quantize_rtn,
    quantize_two_levels,
    with_float_scales,
    with_scales_of,
)
from quant.hessian import hessian

# ggml's type -> (scheme, scheme of the scales, group size).
FORMS = {
    "Q2_K": ("uint2", "uint4", 16),
    "Q3_K": ("int3", "int6", 16),
    "Q4_K": ("uint4", "uint6", 32),
    "Q5_K": ("uint5", "uint6", 32),
    "Q6_K": ("int6", "int8", 16),
    "IQ4_XS": ("iq4_nl", "int6", 32),
}


def weight(shape: tuple[int, ...] = (512, 24), seed: int = 0) -> np.ndarray:
    """Makes a weight with outliers, and with outputs of different magnitudes."""
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, shape) * 10 ** rng.uniform(-3, 1, (*shape[:-2], 1, shape[-1]))).astype(np.float32)


def quantized(name: str, floats: Any, **options: Any) -> QTensor:
    scheme, scale_scheme, group_size = FORMS[name]
    return quantize_two_levels(floats, scheme, scale_scheme, group_size=group_size, **options)


def values_of(scheme: quant.Scheme) -> np.ndarray:
    """Returns the value of each code, float64 [n, 1, 1]."""
    return np.asarray(scheme.codebook or np.arange(2**scheme.bits) - scheme.bias, np.float64).reshape(-1, 1, 1)


def error(made: QTensor, floats: np.ndarray, importance: Any = 1.0) -> float:
    relative = floats / np.abs(floats).max(-2, keepdims=True)
    scaled = np.asarray(quant.dequantize(made)) / np.abs(floats).max(-2, keepdims=True)
    return float((importance * (scaled - relative) ** 2).sum())


@pytest.mark.parametrize("clip", [None, "mse"])
@pytest.mark.parametrize("name", FORMS)
def test_codes_are_the_nearest(name: str, clip: Any) -> None:
    """Every code is the nearest of all codes, in float64."""
    floats = weight()
    made = quantized(name, floats, clip=clip)
    assert ggml.type_of(made).name == name and made.zero is None and made.dtype == np.float32
    codes = np.asarray(quant.unpack(made.planes, made.scheme.bits, made.group_size))
    repeat = lambda plane: np.repeat(np.asarray(quant.dequantize(plane), np.float64), made.group_size, 0)  # noqa: E731
    scale, offset = repeat(made.scale), 0 if made.offset is None else repeat(made.offset)
    values = values_of(made.scheme)
    distance = np.abs(values * scale + offset - floats)
    chosen = np.take_along_axis(distance, codes[None], 0)[0]
    assert (chosen <= distance.min(0) + 1e-6 * np.abs(scale)).all()


@pytest.mark.parametrize("name", FORMS)
def test_how_much_is_lost(name: str) -> None:
    """Searched scales lose less than scales of the range; scales in few bits cost little compared with float scales."""
    floats = weight()
    plain, searched = quantized(name, floats), quantized(name, floats, clip="mse")
    assert error(searched, floats) < error(plain, floats)
    scheme, _, group_size = FORMS[name]
    one_level = quantize_rtn(floats, scheme, group_size=group_size, scale_dtype="float32", clip="mse")
    assert error(searched, floats) < error(one_level, floats) * (1.0 if scheme.startswith("uint") else 1.05)
    assert searched.bits_per_weight == ggml.TYPES[name].bits_per_weight


@pytest.mark.parametrize(
    ("scheme", "length", "group"), [("int4", 96, 32), ("int2", 576, 32), ("int8", 40, 8), ("iq4_nl", 96, 32)]
)
def test_one_float_for_an_output(scheme: str, length: int, group: int) -> None:
    """In float64, the largest scale has code -128, no scale is 0 (no group is), and codes are the nearest."""
    floats = weight((length, 12)) * (16 if scheme == "iq4_nl" else 1)  # the largest value is 127 instead of 8
    floats[:group] *= 1e-5
    made = quantize_two_levels(floats, scheme, "int8", group_size=group, scale_group="channel", clip="mse")
    assert made.scale.scale.shape == (1, 12) and made.scale.scale.dtype == np.float16
    assert made.bits_per_weight == made.scheme.bits + 8 / group + 16 / length
    codes = np.asarray(made.scale.planes[0]).astype(int) - 128
    assert (codes.min(0) == -128).all() and (np.abs(codes[0]) == 1).all()
    plain = np.asarray(
        quantize_rtn(floats, scheme, group_size=group, scale_dtype="float32", clip="mse").scale, np.float64
    )
    unit = np.asarray(made.scale.scale, np.float64)
    np.testing.assert_allclose(unit[0], plain[np.abs(plain).argmax(0), range(12)] / -128, rtol=1e-3, atol=2.0**-25)
    wanted = np.round(plain / unit)
    np.testing.assert_allclose(codes, np.where(wanted == 0, np.sign(plain / unit), wanted.clip(-128, 127)), atol=1e-9)
    repeated = np.repeat(codes * unit, group, 0)
    values = values_of(made.scheme) * repeated
    distance = np.abs(np.asarray(quant.dequantize(made)) - floats)
    assert (distance <= np.abs(values - floats).min(0) + 1e-6 * np.abs(values).max(0)).all()
    table = quantize_two_levels(floats.T, scheme, "int8", group_size=group, scale_group="channel", clip="mse", axis=-1)
    np.testing.assert_array_equal(np.asarray(quant.dequantize(table)).T, np.asarray(quant.dequantize(made)))


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K"])
def test_importance(name: str) -> None:
    floats = weight()
    importance = 10 ** np.random.default_rng(1).uniform(-3, 1, 512).astype(np.float32)
    made = quantized(name, floats, clip="mse", importance=importance)
    assert error(made, floats, importance[:, None]) < error(
        quantized(name, floats, clip="mse"), floats, importance[:, None]
    )


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["Q3_K", "Q4_K"])
def test_both_axes_and_leading_axes(name: str) -> None:
    floats = weight((2, 512, 8))
    made = quantized(name, floats, clip="mse")
    turned = quantized(name, floats.swapaxes(-1, -2), clip="mse", axis=-1)
    for one, other, layer in zip(
        *map(jax.tree.leaves, (ggml.transposed(made), turned, quantized(name, floats[1], clip="mse"))), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        np.testing.assert_array_equal(np.asarray(one)[1], np.asarray(layer).swapaxes(-1, -2))


@pytest.mark.parametrize("name", FORMS)
def test_groups_of_zeros_and_of_one_sign(name: str) -> None:
    floats = np.zeros((256, 4), np.float32)
    floats[:128, 1], floats[::2, 2], floats[:, 3] = 3.0, -0.5, 1e-7
    made = np.asarray(quant.dequantize(quantized(name, floats, clip="mse")))
    assert np.isfinite(made).all() and not made[:, 0].any()
    np.testing.assert_allclose(made[:, 1:3], floats[:, 1:3], atol=0.2)
    assert np.abs(made[:, 3]).max() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale_scheme": "uint6"}, "int3 with scales in uint6: expected int or iq4_nl with int, or uint with uint"),
        ({"scheme": "nf4"}, "nf4 with scales in int6: expected int or iq4_nl with int"),
        ({"group_size": 48}, "in groups of 48, contraction axis of 512: expected a divisor of 256"),
        ({"group_size": "channel"}, "in groups of channel, contraction axis of 512"),
        ({"weight": np.ones((384, 2), np.float32)}, "axis of 384: expected a divisor of 256, and an axis that is a"),
        ({"group_size": 48, "scale_group": "channel"}, "groups of 48, contraction axis of 512: expected a divisor of"),
        ({"scale_group": 128}, "scale_group 128: expected 256 or 'channel'"),
        ({"weight": np.full((256, 2), np.nan, np.float32)}, "NaN or infinity"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    arguments = {"weight": weight(), "scheme": "int3", "scale_scheme": "int6", "group_size": 16} | arguments
    with pytest.raises(ValueError, match=message):
        quantize_two_levels(**arguments)


# ---- GPTQ -----------------------------------------------------------------------------------------------------------


def inputs(length: int = 256) -> np.ndarray:
    """Makes correlated inputs of different magnitudes."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2000, length)) @ (rng.normal(size=(length, length)) * np.exp(rng.normal(size=(1, length))))
    return (x / x.std()).astype(np.float32)


@pytest.mark.matrix
@pytest.mark.parametrize("name", FORMS)
def test_gptq_keeps_scales_and_chooses_codes(name: str) -> None:
    floats, x = weight((256, 12)), inputs()
    start = quantized(name, floats, clip="mse")
    made = quantize_gptq(floats, hessian(x), FORMS[name][0], group_size=FORMS[name][2], scales=start)
    assert ggml.type_of(made).name == name
    assert made.scale is start.scale and made.offset is start.offset

    def loss(each: QTensor) -> np.ndarray:
        return ((x @ (np.asarray(quant.dequantize(each)) - floats)) ** 2).sum(0)

    assert (loss(made) < loss(start)).all() and loss(made).sum() < 0.85 * loss(start).sum()


def test_gptq_with_the_scales_that_it_would_choose() -> None:
    """With one group per channel, GPTQ fits scales before it moves errors into weights: they are `quantize_rtn`'s."""
    floats, h = weight((64, 5)), hessian(inputs(64))
    plain = quantize_rtn(floats, "int4", group_size="channel", scale_dtype="float32")
    one = quantize_gptq(floats, h, "int4", group_size="channel", scale_dtype="float32", block_size=16)
    other = quantize_gptq(floats, h, "int4", group_size="channel", scales=plain, block_size=16)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_gptq_of_several_matrices_and_the_other_axis() -> None:
    floats, x = weight((2, 256, 6)), inputs()
    h = jnp.stack([hessian(x), hessian(x[:, ::-1])])
    start = quantized("Q4_K", floats)
    made = quantize_gptq(floats, h, "uint4", group_size=32, scales=start)
    turned = quantize_gptq(
        floats.swapaxes(-1, -2),
        h,
        "uint4",
        group_size=32,
        axis=-1,
        scales=jax.tree.map(jnp.asarray, ggml.transposed(start)),
    )
    np.testing.assert_array_equal(np.asarray(made.planes[0]), np.asarray(turned.planes[0]).swapaxes(-1, -2))
    one = quantize_gptq(floats[1], h[1], "uint4", group_size=32, scales=quantized("Q4_K", floats[1]))
    np.testing.assert_array_equal(np.asarray(made.planes[0])[1], np.asarray(one.planes[0]))


@pytest.mark.parametrize("options", [{"act_order": True}, {"group_size": 16}, {"scheme": "uint5"}, {"axis": -1}])
def test_gptq_refuses_scales_of_something_else(options: dict[str, Any]) -> None:
    floats = weight((256, 256))
    options = {"scheme": "uint4", "group_size": 32} | options
    with pytest.raises(ValueError, match=r"scales of a weight \(256, 256\), uint4 in groups of 32: expected"):
        quantize_gptq(floats, jnp.eye(256), scales=quantized("Q4_K", floats), **options)


@pytest.mark.extras
@pytest.mark.parametrize("draw", ["normal", "standard_t"])
@pytest.mark.parametrize("name", FORMS)
def test_less_is_lost_than_by_ggml(name: str, draw: str) -> None:
    """Our mean squared error is below that of `ggml_quantize_chunk` without an importance matrix."""
    pytest.importorskip("xllamacpp", reason="compares with llama.cpp: install the extra: pip install -e '.[parity]'")
    import gguf

    from tests import llamacpp

    rng = np.random.default_rng(0)
    floats = (rng.normal(size=(256, 1024)) if draw == "normal" else rng.standard_t(4, (256, 1024))).astype(np.float32)
    theirs = gguf.quants.dequantize(llamacpp.quantize_chunk(name, floats), gguf.GGMLQuantizationType[name])
    ours = np.asarray(quant.dequantize(quantized(name, floats, axis=-1, clip="mse")))
    print(name, draw, ((ours - floats) ** 2).mean() / ((theirs - floats) ** 2).mean())
    assert ((ours - floats) ** 2).mean() < ((theirs - floats) ** 2).mean()


def test_scales_in_codes_are_floats_for_a_while() -> None:
    """Float scales give the same weight; after moving, they are rounded to the nearest whole unit again."""
    weight = jnp.asarray(np.random.default_rng(5).standard_t(5, (64, 12)), jnp.float32)
    made = quantize_two_levels(weight, "int4", "int8", group_size=16, scale_group="channel")
    floats = with_float_scales(made)
    assert floats.scale.dtype == jnp.float32 and floats.scale.shape == (4, 12)
    np.testing.assert_array_equal(quant.dequantize(floats), quant.dequantize(made))
    unit_M = np.asarray(made.scale.scale, np.float32)
    moved = floats.scale + np.where(np.abs(floats.scale) < 100 * np.abs(unit_M), 2, 0) * unit_M
    again = with_scales_of(made, dataclasses.replace(floats, scale=moved + 0.3 * unit_M))
    np.testing.assert_allclose(quant.dequantize(again.scale), moved, rtol=1e-6)
    np.testing.assert_array_equal(again.scale.scale, made.scale.scale)
    plain = quant.quantize_rtn(weight, "int4", group_size=16)
    assert with_float_scales(plain) is plain and with_scales_of(plain, plain) is plain
