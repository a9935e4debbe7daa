"""Round-to-nearest: against a NumPy search over all codes, ggml's quantizers, published tables, stated properties."""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import quant
from quant.clip import clip_factors
from quant.qtensor import scale_values
from quant.scheme import E2M1, IQ4_NL, IQ4_NL_POLYNOMIAL, NF4, e4m3_codes, e4m3_values, exponent_values

G = 16
NAMES = [*quant.SCHEMES]
SOME = ["int4", "uint3", "nf4", "mxfp4", "nvfp4", "iq4_nl", "ternary"]

# QLoRA, arXiv:2305.14314, appendix E.
PUBLISHED_NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def _values(name: str) -> np.ndarray:
    """Returns the value of each code that a quantizer may write."""
    if name == "nf4":
        return np.array(PUBLISHED_NF4)
    if name == "iq4_nl":
        return np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113.0])
    if name in ("mxfp4", "nvfp4"):
        return np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    if name == "ternary":
        return np.array([-1.0, 0.0, 1.0])
    bits = int(name[-1])
    return np.arange(2.0**bits) - (0 if name.startswith("uint") else 2 ** (bits - 1))


def _expected_grid(groups: np.ndarray, name: str, factor: float = 1.0, stored: Any = None) -> tuple[np.ndarray, Any]:
    """Returns scales and zero points of groups [C, g, M] by definition; zero points follow from the stored scale."""
    low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    largest = np.where(high >= -low, high, low)
    if name.startswith("uint"):
        low, high = np.minimum(low, 0) * factor, np.maximum(high, 0) * factor
        scale = (high - low) / (2 ** int(name[-1]) - 1)
        return scale, np.clip(np.round(-low / (scale if stored is None else stored)), 0, 2 ** int(name[-1]) - 1)
    if name.startswith("int"):
        return largest * factor / -(2 ** (int(name[-1]) - 1)), 0
    if name == "ternary":
        return np.abs(groups).mean(1, keepdims=True) * factor, 0
    if name == "mxfp4":
        return 2 ** np.floor(np.log2(np.abs(largest) * factor)) / 4, 0
    if name == "nvfp4":
        return _nearest_e4m3(np.abs(largest) * factor / 6), 0
    if name == "iq4_nl":
        return largest * factor / -127, 0
    return np.abs(largest) * factor, 0


def _nearest_e4m3(values: np.ndarray) -> np.ndarray:
    """Rounds to the nearest float8_e4m3fn that is neither negative nor NaN."""
    every = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return every[np.argmin(np.abs(values[..., None] - every), axis=-1)]


def _nearest(groups: np.ndarray, scale: np.ndarray, zero: Any, name: str) -> np.ndarray:
    """Returns every weight's nearest value, found by trying all codes; float64 [C, g, M]."""
    candidates = (_values(name) - np.asarray(zero)[..., None]) * np.asarray(scale, np.float64)[..., None]
    best = np.argmin(np.abs(candidates - groups[..., None]), axis=-1)
    candidates = np.broadcast_to(candidates, (*groups.shape, candidates.shape[-1]))
    return np.take_along_axis(candidates, best[..., None], -1)[..., 0]


def _weight(shape: tuple[int, ...] = (4 * G, 6), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _grouped(x: Any, groups: int = 4) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x.reshape(groups, -1, x.shape[-1])


def _scales(made: quant.QTensor) -> np.ndarray:
    return np.asarray(scale_values(made.scale, made.scheme), np.float64)[:, None]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "scale_dtype"),
    [*((name, "bfloat16") for name in NAMES), ("int4", "float32"), ("int4", "float16"), ("uint4", "float16")],
)
def test_scales_by_definition_and_the_nearest_of_all_codes(name: str, scale_dtype: str) -> None:
    weight = _weight()
    made = quant.quantize_rtn(weight, name, group_size=G, scale_dtype=scale_dtype)
    groups, scale = _grouped(weight), _scales(made)
    expected_scale, zero = _expected_grid(groups, name, stored=scale)
    precision = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[scale_dtype]
    np.testing.assert_allclose(scale, expected_scale, rtol=precision)
    if name.startswith("uint"):
        np.testing.assert_array_equal(made.zero[:, None], zero)
    expected = _nearest(groups, scale, zero, name)
    np.testing.assert_allclose(_grouped(quant.dequantize(made)), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.matrix
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("group_size", [G, "channel", "tensor"])
def test_axes_leading_axes_jit_and_vmap_agree(name: str, group_size: Any) -> None:
    weight = jnp.asarray(_weight((2, 2 * G, 6)))

    def quantize(weight: jax.Array, axis: int = -2) -> quant.QTensor:
        return quant.quantize_rtn(weight, name, group_size=group_size, axis=axis)

    made = quantize(weight)
    assert made.validate().group_size == (G if group_size == G else 2 * G)
    assert made.scale.shape == {G: (2, 2, 6), "channel": (2, 1, 6), "tensor": (2, 1, 1)}[group_size]
    expected = np.asarray(quant.dequantize(made))
    layers = [quant.dequantize(quantize(layer)) for layer in weight]
    tables = jnp.swapaxes(quant.dequantize(quantize(jnp.swapaxes(weight, -1, -2), -1)), -1, -2)
    for other in (layers, tables, quant.dequantize(jax.jit(jax.vmap(quantize))(weight))):
        # The mean of a ternary group is a sum, whose order differs between axes.
        np.testing.assert_allclose(other, expected, rtol=2**-7 if name == "ternary" else 0)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["int8", "int3", "int2", "uint8", "uint4", "uint2", "ternary"])
@pytest.mark.parametrize("clip", [None, "mse"])
def test_error_is_at_most_half_a_scale_inside_the_range(name: str, clip: Any) -> None:
    weight = _weight((8 * G, 32), seed=1)
    made = quant.quantize_rtn(weight, name, group_size=G, clip=clip)
    scale = np.abs(np.repeat(np.asarray(made.scale, np.float64), G, 0))
    zero = 0 if made.zero is None else np.repeat(np.asarray(made.zero, np.float64), G, 0)
    signed = np.repeat(np.asarray(made.scale, np.float64), G, 0)
    ends = np.sort([(_values(name)[end] - zero) * signed for end in (0, -1)], axis=0)
    inside = (weight >= ends[0] - scale / 2) & (weight <= ends[1] + scale / 2)
    assert inside.mean() > (0.3 if made.scheme.bits == 2 else 0.9)
    assert (np.abs(quant.dequantize(made) - weight) <= scale / 2 * (1 + 1e-5))[inside].all()


def test_the_largest_magnitude_is_exact_and_of_either_sign() -> None:
    weight = np.array([[0.1, -3.0, 2.9, 0.5], [0.1, 3.0, -2.9, 0.5]], np.float32).T
    made = quant.quantize_rtn(weight, "int4", group_size="channel", scale_dtype="float32")
    assert np.asarray(made.scale).tolist() == [[0.375, -0.375]]
    assert quant.unpack(made.planes, 4, 4)[:, 0].tolist() == [8, 0, 15, 9]
    np.testing.assert_array_equal(quant.dequantize(made)[1], [-3, 3])


def test_uint_ranges_are_widened_to_zero() -> None:
    """[-1, 2] stays, [5.2, 6] becomes [0, 6] and [-6, -5.2] becomes [-6, 0]."""
    weight = np.array([[-1, 2, 0, 1], [5.2, 6, 5.2, 6], [-5.2, -6, -5.2, -6]], np.float32).T
    made = quant.quantize_rtn(weight, "uint4", group_size=4, scale_dtype="float32")
    np.testing.assert_allclose(made.scale, [[3 / 15, 6 / 15, 6 / 15]], rtol=1e-6)
    assert np.asarray(made.zero).tolist() == [[5, 0, 15]]
    assert quant.unpack(made.planes, 4, 4)[:2].T.tolist() == [[0, 15], [13, 15], [2, 0]]


@pytest.mark.matrix
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("clip", [None, "mse"])
def test_zeros_stay_zeros(name: str, clip: Any) -> None:
    weight = _weight((2 * G, 3))
    weight[:G, 1], weight[::3] = 0, 0
    made = quant.quantize_rtn(weight, name, group_size=G, clip=clip)
    values = np.asarray(quant.dequantize(made))
    assert made.scale[0, 1] == 0 and made.scale[0, 0] != 0
    # The value of iq4_nl nearest to 0 is 1; a scale is the largest weight divided by 127 or 113.
    allowed = 1.01 * np.abs(weight).max() / 113 if name == "iq4_nl" else 0
    assert (
        (values[:G, 1] == 0).all()
        and (np.abs(values[weight == 0]) <= allowed).all()
        and not np.signbit(values[:G, 1]).any()
    )


def _importance(length: int) -> np.ndarray:
    return np.random.default_rng(3).uniform(0, 2, length).astype(np.float32) ** 4


def _group_errors(values: Any, groups: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Returns the squared error of each group [C, M]."""
    weights = 1 if importance is None else importance.reshape(len(groups), -1, 1)
    return np.sum((values - groups) ** 2 * weights, axis=1)


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_clip_is_no_worse_than_any_of_its_factors(name: str, weighted: bool) -> None:
    """No group's error exceeds that of plain rounding, or of any factor with all codes tried in NumPy.

    Fitted scales are mostly better.
    """
    weight = _weight(seed=2)
    weight[5] *= 6
    importance = _importance(len(weight)) if weighted else None
    arguments = {"group_size": G, "scale_dtype": "float32"}
    plain = quant.quantize_rtn(weight, name, **arguments)
    clipped = quant.quantize_rtn(weight, name, clip="mse", importance=importance, **arguments)
    groups = _grouped(weight)
    of_plain, of_clipped = (
        _group_errors(_grouped(quant.dequantize(made)), groups, importance) for made in (plain, clipped)
    )
    assert (of_clipped <= of_plain * (1 + 1e-6)).all()
    tried = []
    for factor in clip_factors(quant.SCHEMES[name], G, weighted=weighted):
        scale, zero = _expected_grid(groups, name, factor)
        tried.append(_group_errors(_nearest(groups, scale, zero, name), groups, importance))
    # At 8 bits, errors are float32 differences of squares that are 100,000 times as large.
    assert (of_clipped <= np.min(tried, axis=0) * (1 + (1e-2 if "8" in name else 1e-5))).all()
    if name in ("mxfp4", "nvfp4"):
        np.testing.assert_allclose(of_clipped, np.min(tried, axis=0), rtol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["int4", "int3", "int2", "uint4", "uint2", "nf4", "ternary"])
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_clip_is_close_to_the_best_scale_there_is(name: str, weighted: bool) -> None:
    """The total error is within 3% (nf4: 6%) of the best of 800 scales per group, with all codes tried in NumPy.

    Scales of both signs are tried where the sign matters.
    """
    weight = np.random.default_rng(6).standard_t(5, size=(8 * G, 8)).astype(np.float32)
    importance = _importance(len(weight)) if weighted else None
    made = quant.quantize_rtn(weight, name, group_size=G, scale_dtype="float32", clip="mse", importance=importance)
    groups = _grouped(weight, 8)
    best = np.full((8, 8), np.inf)
    for factor in np.linspace(0.2, 2.6 if name in ("ternary", "int2") else 1.4, 800):
        for sign in (1, -1) if name.startswith("int") else (1,):
            scale, zero = _expected_grid(groups, name, sign * factor)
            best = np.minimum(best, _group_errors(_nearest(groups, scale, zero, name), groups, importance))
    error = _group_errors(_grouped(quant.dequantize(made), 8), groups, importance)
    assert error.sum() < (1.06 if name == "nf4" else 1.03) * best.sum()


@pytest.mark.matrix
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("clip", [None, "mse"])
def test_blocks_change_nothing(axis: int, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks have three of seven groups or rows, so that the last block overlaps the one before it."""
    weight = _weight((2, 7 * G, 5) if axis == -2 else (2, 7, 5 * G))
    importance = None if clip is None else _importance(2 * weight.shape[axis]).reshape(2, -1)

    def quantize() -> quant.QTensor:
        quant.rtn._quantize.clear_cache()
        return quant.quantize_rtn(weight, "uint3", group_size=G, axis=axis, clip=clip, importance=importance)

    whole = quantize()
    monkeypatch.setattr(quant.clip, "_BLOCK_WEIGHTS", 3 * weight[0].size // 7)
    jax.tree.map(np.testing.assert_array_equal, quantize(), whole)
    quant.rtn._quantize.clear_cache()


@pytest.mark.parametrize("clip", [None, "mse"])
def test_groups_of_many_rows_are_summed_in_parts(clip: Any) -> None:
    """A group of four copies of 20 rows has the scale of one copy (if not clipped) and, within 3%, its error."""
    weight = _weight((20, 6))
    one, four = (quant.quantize_rtn(np.tile(weight, (n, 1)), "int4", group_size="channel", clip=clip) for n in (1, 4))
    if clip is None:
        np.testing.assert_array_equal(one.scale, four.scale)
    errors = [np.mean((np.asarray(quant.dequantize(made))[:20] - weight) ** 2, axis=0) for made in (one, four)]
    np.testing.assert_allclose(*errors, rtol=0.03)


def test_mse_clip_gains_where_it_should() -> None:
    """Normal weights gain more at fewer bits. The best ternary scale is 1.224 standard deviations (Lloyd-Max)."""
    weight = _weight((1024, 8))

    def error(name: str, clip: Any) -> float:
        made = quant.quantize_rtn(weight, name, group_size=128, clip=clip)
        return float(jnp.mean((quant.dequantize(made) - weight) ** 2))

    gains = [error(name, "mse") / error(name, None) for name in ("uint6", "uint4", "uint2")]
    assert gains == sorted(gains, reverse=True) and gains[1] < 0.9 and gains[2] < 0.6
    ternary = quant.quantize_rtn(weight, "ternary", group_size="tensor", clip="mse")
    assert abs(float(ternary.scale[0, 0]) - 1.224) < 0.05
    # Max 1960, table 1: the least squared error of three levels of a normal variable is 0.1902.
    assert abs(error("ternary", "mse") - 0.19) < 0.01


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("clip", [None, "mse"])
def test_temporaries_are_small(axis: int, clip: Any) -> None:
    """Quantizing holds neither the weight for each factor, nor a copy in float32, nor its transpose."""
    weight = jax.ShapeDtypeStruct((4096, 2048), jnp.float32)

    def quantize(weight: jax.Array) -> quant.QTensor:
        return quant.quantize_rtn(weight, "int4", group_size=32, axis=axis, clip=clip)

    memory = jax.jit(quantize).lower(weight).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * weight.size / 3


def test_nf4_is_the_published_table() -> None:
    assert list(NF4) == PUBLISHED_NF4
    # The table is also derived as in bitsandbytes' create_normal_map: quantiles on both sides, a zero, scaled to 1.
    quantile, offset = statistics.NormalDist().inv_cdf, 0.9677083
    positive = [quantile(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    made = np.array(sorted([*positive, 0.0, *negative]))
    np.testing.assert_allclose(NF4, made / made.max(), atol=1e-6)


def test_microscaling_tables() -> None:
    np.testing.assert_array_equal(E2M1, np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(float))
    exponents = np.arange(1, 256, dtype=np.uint8)
    expected = exponents.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(exponent_values(jnp.asarray(exponents)), expected)
    assert exponent_values(jnp.zeros(1, jnp.uint8))[0] in (0, np.float32(2.0**-127))


def test_iq4_nl_is_a_rounded_polynomial() -> None:
    """The formula gives the published values, and stays far enough from half-integers for any float32 arithmetic."""
    codes = jnp.arange(16, dtype=jnp.uint8)
    published = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    assert list(IQ4_NL) == published
    np.testing.assert_array_equal(quant.SCHEMES["iq4_nl"].decode(codes), published)
    exact = np.polynomial.Polynomial(np.array(IQ4_NL_POLYNOMIAL, np.float64))(np.arange(16.0))
    assert 0.4 < np.abs(exact - published).max() < 0.44


def test_scales_of_nvfp4_are_floats_of_8_bits() -> None:
    codes = np.arange(127, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(e4m3_values(jnp.asarray(codes)), expected)
    np.testing.assert_array_equal(e4m3_values(jnp.asarray(codes[1:] | 128)), expected[1:])
    assert e4m3_values(jnp.asarray([127], jnp.uint8))[0] == 0 and jnp.isnan(e4m3_values(jnp.asarray([255], jnp.uint8)))
    np.testing.assert_array_equal(e4m3_codes(jnp.asarray(expected)), codes)
    values = np.abs(np.random.default_rng(0).normal(size=4000) * 10 ** np.random.default_rng(1).uniform(-4, 3, 4000))
    values = values.astype(np.float32)
    nearest = np.minimum(values, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(e4m3_codes(jnp.asarray(values)), np.maximum(nearest, 1))
    np.testing.assert_array_equal(e4m3_codes(jnp.asarray([0, 1e-9, 1e9, np.inf, np.nan])), [0, 1, 126, 255, 255])


@pytest.mark.parametrize("name", ["Q4_0", "MXFP4"])
def test_codes_and_scales_are_those_of_ggml(name: str) -> None:
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package: pip install gguf")
    weight = _weight((64, 96), seed=4)
    blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[name]).reshape(64, 3, -1)
    scheme, start = ("int4", 2) if name == "Q4_0" else ("mxfp4", 1)
    made = quant.quantize_rtn(weight, scheme, group_size=32, axis=-1, scale_dtype="float32")
    np.testing.assert_array_equal(made.planes[0], blocks[..., start:].reshape(64, -1))
    scale = made.scale.astype(jnp.float16) if name == "Q4_0" else made.scale
    np.testing.assert_array_equal(np.asarray(scale)[..., None].view(np.uint8), blocks[..., :start])


def test_finer_groups_are_better_where_there_are_outliers() -> None:
    weight = _weight((128, 16), seed=5)
    weight[7, ::5] *= 30
    errors = []
    for group_size in (16, 32, "channel", "tensor"):
        made = quant.quantize_rtn(weight, "int4", group_size=group_size)
        errors.append(float(jnp.mean((quant.dequantize(made) - weight) ** 2)))
    assert errors == sorted(errors) and errors[1] < errors[2] / 2


def test_a_bfloat16_weight_is_its_float32_values() -> None:
    weight = jnp.asarray(_weight(), jnp.bfloat16)
    made = quant.quantize_rtn(weight, "int3", group_size=G)
    wide = quant.quantize_rtn(weight.astype(jnp.float32), "int3", group_size=G)
    assert made.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    np.testing.assert_array_equal(quant.dequantize(made), quant.dequantize(wide))


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["int4", "uint4", "nf4", "mxfp4", "nvfp4", "iq4_nl", "ternary"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_under_jit_what_is_not_finite_shows(name: str, bad: float) -> None:
    weight = _weight()
    weight[3, 2] = bad
    with pytest.raises(ValueError, match=r"weight of shape \(64, 6\) holds NaN or infinity"):
        quant.quantize_rtn(weight, name, group_size=G)
    made = jax.jit(lambda weight: quant.quantize_rtn(weight, name, group_size=G))(weight)
    shown = ~np.isfinite(np.asarray(quant.dequantize(made)))
    assert shown[:G, 2].all() and shown.sum() == G


def _quantize(weight: Any = None, scheme: str = "int4", group_size: Any = G, **others: Any) -> quant.QTensor:
    return quant.quantize_rtn(_weight() if weight is None else weight, scheme, group_size=group_size, **others)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _quantize(scheme="int9"), "no scheme 'int9': expected one of int8"),
        (lambda: _quantize(np.ones((64, 6), int)), "weight of dtype int32 .*: expected floats"),
        (lambda: _quantize(np.ones(64, np.float32)), r"shape \(64,\): expected floats, at least 2 axes"),
        (lambda: _quantize(group_size=48), "groups of 48 do not divide an axis of 64"),
        (lambda: _quantize(group_size="row"), "group_size 'row': expected a number, 'channel' or 'tensor'"),
        (lambda: _quantize(np.ones((6, 2), np.float32), "int3", "channel"), "6 codes of 3 bits does not fill whole"),
        (lambda: _quantize(axis=0), "axis 0: expected -2"),
        (lambda: _quantize(scale_dtype="float64"), "scale_dtype float64: expected float32 or bfloat16 or float16"),
        (lambda: _quantize(clip="max"), "clip 'max': expected None or 'mse'"),
        (lambda: _quantize(importance=np.ones(64)), "importance without clip: .* set clip='mse'"),
        (lambda: _quantize(importance=np.ones(6), clip="mse"), r"importance of shape \(6,\): expected .* \(64,\)"),
        (lambda: _quantize(importance=-np.ones(64), clip="mse"), "importance holds a value that is negative"),
        (lambda: _quantize(_weight() * 1e9, scale_dtype="float16"), "a scale is above the range of float16: use"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
