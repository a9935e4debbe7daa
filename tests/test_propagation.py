"""Weights that compensate the errors of their inputs, against NumPy's least squares."""

import numpy as np

from quant import missing_by_inputs, propagated


def _inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x_TK = rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    return x_TK, x_TK + 0.3 * rng.normal(size=x_TK.shape), rng.normal(size=(12, 5))


def test_the_whole_way_is_least_squares() -> None:
    x_TK, z_TK, weight_KM = _inputs()
    hessian, cross = z_TK.T @ z_TK / 200, z_TK.T @ (x_TK - z_TK) / 200
    args = [np.float32(array) for array in (weight_KM, hessian, cross)]
    made = propagated(args[0], args[1], missing_by_inputs(args[2], args[0]), 1.0, damping=0.0)
    expected = np.linalg.lstsq(z_TK, x_TK @ weight_KM, rcond=None)[0]
    np.testing.assert_allclose(made, expected, rtol=1e-3, atol=1e-4)


def test_half_of_the_way_is_half_of_it_and_what_the_sum_misses_is_made_up_for() -> None:
    x_TK, z_TK, weight_KM = _inputs()
    stream_TM = np.random.default_rng(1).normal(size=(200, 5))
    missing_TM = stream_TM + (x_TK - z_TK) @ weight_KM
    hessian, missing = np.float32(z_TK.T @ z_TK / 200), np.float32(z_TK.T @ missing_TM / 200)
    whole, half = (propagated(np.float32(weight_KM), hessian, missing, part, damping=0.0) for part in (1.0, 0.5))
    expected = np.linalg.lstsq(z_TK, stream_TM + x_TK @ weight_KM, rcond=None)[0]
    np.testing.assert_allclose(whole, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(half, (weight_KM + expected) / 2, rtol=1e-3, atol=1e-4)


def test_channels_without_input_and_no_input_at_all_move_nothing() -> None:
    x_TK, z_TK, weight_KM = _inputs()
    z_TK[:, 3] = 0
    hessian, cross = np.float32(z_TK.T @ z_TK / 200), np.float32(z_TK.T @ (x_TK - z_TK) / 200)
    weight_KM = np.float32(weight_KM)
    made = propagated(weight_KM, hessian, missing_by_inputs(cross, weight_KM), 0.5)
    np.testing.assert_array_equal(made[3], weight_KM[3])
    zeros = np.zeros((12, 12), np.float32)
    np.testing.assert_array_equal(propagated(weight_KM, zeros, zeros @ weight_KM, 0.5), weight_KM)
