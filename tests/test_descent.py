"""Coordinate descent after GPTQ: errors fall, and at the end no single code could be better, by brute force."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant.hessian import hessian
from tests.test_gptq import LENGTH, OUTPUTS
from tests.test_gptq import _inputs as inputs
from tests.test_gptq import _weight as weight

SECOND: dict[str, Any] = {"group_size": 16, "scale_scheme": "int8", "scale_dtype": "float16", "clip": "mse"}


def squared_error(x: np.ndarray, floats: Any, values_KM: np.ndarray) -> float:
    return float(np.sum((np.asarray(x, np.float64) @ (np.asarray(floats, np.float64) - values_KM)) ** 2))


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("int3", SECOND),
        ("int2", SECOND),
        ("uint4", {"group_size": 8, "clip": "mse"}),
        ("nf4", {"group_size": 16, "scale_dtype": "float16"}),
        ("int4", {"group_size": 16, "act_order": True}),
        ("int4", {"group_size": "channel"}),
    ],
)
def test_sweeps_take_errors_down(scheme: str, options: dict[str, Any]) -> None:
    x, floats = inputs(samples=512), weight()
    seen = hessian(jnp.asarray(x))
    errors = []
    for sweeps in (0, 1, 3):
        made = quant.quantize_gptq(floats, seen, scheme, descent=sweeps, damping=0.0, **options)
        errors.append(squared_error(x, floats, np.asarray(quant.dequantize(made), np.float64)))
    assert errors[2] <= errors[1] * 1.0001 and errors[1] < errors[0]
    assert errors[2] < 0.95 * errors[0], errors


@pytest.mark.parametrize("axis", [-2, -1])
def test_in_the_end_no_single_code_could_be_better(axis: int) -> None:
    """Tries all codes of all weights in float64, with fixed scales."""
    x, floats = inputs(samples=512), weight()
    turned = floats if axis == -2 else floats.T
    scales = quant.quantize_rtn(turned, "int3", group_size=16, axis=axis, clip="mse")
    made = quant.quantize_gptq(
        turned, hessian(jnp.asarray(x)), "int3", group_size=16, axis=axis, scales=scales, damping=0.0, descent=40
    )
    np.testing.assert_array_equal(made.scale, scales.scale)
    values = np.asarray(quant.dequantize(made), np.float64)
    scale = np.repeat(np.asarray(made.scale, np.float64), 16, axis)
    values, scale = (values, scale) if axis == -2 else (values.T, scale.T)
    codes = np.round(values / scale)
    assert codes.min() >= -4 and codes.max() <= 3
    h = np.asarray(x, np.float64).T @ x
    error = values - np.asarray(floats, np.float64)
    slope = h @ error
    for code in range(-4, 4):
        change = code * scale - values
        cost = 2 * change * slope + change**2 * np.diagonal(h)[:, None]
        assert cost.min() > -1e-3 * np.abs(slope * scale).max()


def test_channels_without_inputs_and_scales_in_codes() -> None:
    x = inputs(samples=512)
    x[:, 5] = 0
    floats, seen = weight(), hessian(jnp.asarray(x))
    plain, made = (quant.quantize_gptq(floats, seen, "int3", descent=sweeps, **SECOND) for sweeps in (0, 3))
    for each in (plain, made):
        assert isinstance(each.scale, quant.QTensor) and each.shape == (LENGTH, OUTPUTS)
        codes = np.asarray(quant.unpack(each.scale.planes, 8, each.scale.group_size, axis=-2), int) - 128
        assert (codes != 0).all() and np.abs(codes).max() <= 127
    np.testing.assert_array_equal(np.asarray(made.scale.scale), np.asarray(plain.scale.scale))
    assert (np.asarray(quant.dequantize(made))[5] == 0).all()


@pytest.mark.parametrize(
    ("scheme", "group_size", "sweeps"), [("mxfp4", 32, 1), ("int4", "tensor", 1), ("int4", 16, -1)]
)
def test_what_cannot_be_descended_is_refused(scheme: str, group_size: Any, sweeps: int) -> None:
    floats = weight(shape=(64, 8))
    with pytest.raises(ValueError, match=f"descent {sweeps} for {scheme}"):
        quant.quantize_gptq(floats, jnp.eye(64), scheme, group_size=group_size, descent=sweeps)
