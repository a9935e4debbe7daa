"""GPTQ against a plain float64 version, against round-to-nearest, and on Hessians that float32 cannot factorize."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant.gptq import SCALE_HEADROOM, _quantize, quantize_gptq
from quant.hessian import add_to_hessian, hessian, inverse_factor

LENGTH, OUTPUTS, SAMPLES = 48, 8, 256


def _inputs(seed: int = 0, samples: int = SAMPLES) -> np.ndarray:
    """Returns correlated channels of different magnitudes, as after a norm: GPTQ benefits from correlations."""
    rng = np.random.default_rng(seed)
    mixing_KK = rng.normal(size=(LENGTH, LENGTH)) * 0.6 ** (np.arange(LENGTH)[:, None] / 8)
    mixing_KK += np.diag(rng.lognormal(0, 0.7, LENGTH))
    return (rng.normal(size=(samples, LENGTH)) @ mixing_KK).astype(np.float32)


def _weight(seed: int = 1, shape: tuple[int, ...] = (LENGTH, OUTPUTS)) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_t(5, shape), jnp.float32)


def _codes(made: quant.QTensor) -> np.ndarray:
    """Returns the codes as stored, in the order of `order`."""
    return np.asarray(quant.unpack(made.planes, made.scheme.bits, made.group_size, axis=made.axis))


def _output_error(x: Any, weight: Any, made: quant.QTensor) -> float:
    return float(np.sum((np.asarray(x, np.float64) @ (np.asarray(weight) - np.asarray(quant.dequantize(made)))) ** 2))


def plain_gptq(
    weight: np.ndarray,
    hessian: np.ndarray,
    bits: int,
    signed: bool,
    group: int,
    act_order: bool,
    damping: float,
    unit: np.ndarray | None = None,
    book: tuple[float, ...] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The paper without its accelerations: eliminates channels of the inverse Hessian one by one (its step 1).

    With `unit` [M], scales are integer multiples of it, from 1 to 127 in magnitude. `book` holds the values of codes
    that are not equally spaced.
    """
    weight, hessian = np.array(weight, np.float64), np.array(hessian, np.float64)
    order = np.argsort(-np.diagonal(hessian), kind="stable") if act_order else np.arange(len(weight))
    weight, hessian = weight[order], hessian[order][:, order]
    inverse = np.linalg.inv(hessian + damping * np.mean(np.diagonal(hessian)) * np.eye(len(weight)))
    codes, scales = np.zeros(weight.shape, np.int64), []
    for k in range(len(weight)):
        if k % group == 0:
            low, high = weight[k : k + group].min(0), weight[k : k + group].max(0)
            if signed:
                first = -(2 ** (bits - 1)) if book is None else book[0]
                scale, zero = np.where(high >= -low, high, low) / first, 2 ** (bits - 1)
            else:
                scale = (np.maximum(high, 0) - np.minimum(low, 0)) / (2**bits - 1)
                zero = np.round(-np.minimum(low, 0) / scale)
            if unit is not None:
                code = np.clip(np.abs(np.round(scale / unit)), 1, 127)
                scale = np.where(scale < 0, -code, code) * unit
            scales.append(scale)
        values = np.arange(2**bits)[:, None] - zero if book is None else np.array(book)[:, None]
        codes[k] = np.abs(values - weight[k] / scale).argmin(0)
        error = (weight[k] - np.take_along_axis(values, codes[k][None], 0)[0] * scale) / inverse[k, k]
        weight[k + 1 :] -= np.outer(inverse[k + 1 :, k], error)
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes, np.stack(scales), order


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("scheme", "group", "act_order", "block"),
    [
        ("int4", 16, True, 32),
        ("int3", 8, True, 128),
        ("int3", "channel", False, 20),
        ("uint4", 4, False, 18),
        ("uint4", 24, True, 16),
        ("uint2", "channel", True, 20),
    ],
)
def test_codes_are_those_of_a_plain_float64_gptq(scheme: str, group: Any, act_order: bool, block: int) -> None:
    weight, h = _weight(), hessian(jnp.asarray(_inputs()))
    made = quantize_gptq(
        weight, h, scheme, group_size=group, act_order=act_order, block_size=block, scale_dtype="float32"
    )
    kind = made.scheme
    size = LENGTH if group == "channel" else group
    codes, scale, order = plain_gptq(weight, h, kind.bits, kind.kind == "int", size, act_order, 0.01)
    if group == "channel":
        assert made.order is None
        codes = codes[np.argsort(order)]
    elif act_order:
        np.testing.assert_array_equal(made.order, order[:, None])
    # A weight within float32's rounding of the middle between two codes may take the other one; then everything later
    # in the same output differs. This may happen in at most one of the eight outputs.
    differs_M = (_codes(made) != codes).any(0)
    assert differs_M.sum() <= 1
    np.testing.assert_allclose(np.asarray(made.scale)[:, ~differs_M], scale[:, ~differs_M], rtol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "shape", "group", "block"),
    [("int4", (48, 8), 16, 128), ("int2", (48, 8), 8, 8), ("int3", (48, 8), 8, 20), ("iq4_nl", (48, 8), 16, 128)],
)
def test_scales_in_codes_are_fitted_as_groups_are_reached(
    scheme: str, shape: tuple[int, int], group: int, block: int
) -> None:
    """Compared with a plain float64 GPTQ with the same floats; the first group's scales are below half a unit."""
    weight = np.array(_weight(shape=shape))
    weight[:group] *= 1e-4
    x = _inputs()
    h = hessian(jnp.asarray(x))
    made = quantize_gptq(
        weight, h, scheme, group_size=group, block_size=block, scale_dtype="float16", scale_scheme="int8"
    )
    second, bits = made.scale, made.scheme.bits
    assert isinstance(second, quant.QTensor) and (second.scheme.name, second.scale.shape) == ("int8", (1, shape[1]))
    assert second.scale.dtype == jnp.float16 and made.validate() is made
    groups = weight.reshape(-1, group, shape[1])
    high, low = groups.max(1), groups.min(1)
    book = made.scheme.codebook
    largest = (np.where(high >= -low, high, -low) / (-book[0] if book else 2 ** (bits - 1))).max(0)
    unit = np.asarray(second.scale, np.float64)[0]
    np.testing.assert_allclose(unit, largest * SCALE_HEADROOM / 127, rtol=2e-3)
    codes, scale, _ = plain_gptq(weight, h, bits, True, group, False, 0.01, unit, book)
    differs_M = (_codes(made) != codes).any(0)
    assert differs_M.sum() <= 1
    np.testing.assert_allclose(quant.dequantize(second)[:, ~differs_M], scale[:, ~differs_M], rtol=1e-6)
    assert (np.abs(np.round(scale / unit)) == 1).any()
    values = np.array(book or np.arange(2.0**bits) - 2 ** (bits - 1))[codes].reshape(groups.shape) * scale[:, None]
    np.testing.assert_allclose(
        quant.dequantize(made)[:, ~differs_M], values.reshape(shape)[:, ~differs_M], rtol=1e-6, atol=1e-9
    )
    assert _output_error(x, weight, made) < _output_error(
        x, weight, quant.quantize_rtn(weight, scheme, group_size=group)
    )


def test_scales_in_codes_of_stacks_tables_and_zeros() -> None:
    weight = _weight(shape=(2, LENGTH, OUTPUTS)).at[:, :16, 0].set(0).at[..., 1].set(0)
    h = jnp.stack([hessian(jnp.asarray(_inputs(seed))) for seed in range(2)])
    options: dict[str, Any] = {"group_size": 16, "scale_scheme": "int8", "scale_dtype": "float16", "clip": "mse"}
    made = jax.jit(lambda weight, h: quantize_gptq(weight, h, "int4", **options))(weight, h)
    table = quantize_gptq(weight.swapaxes(-1, -2), h, "int4", axis=-1, **options)
    assert made.validate().scale.scale.shape == (2, 1, OUTPUTS) and table.validate().scale.scale.shape == (
        2,
        OUTPUTS,
        1,
    )
    for i in range(2):
        single = quantize_gptq(weight[i], h[i], "int4", **options)
        jax.tree.map(np.testing.assert_array_equal, made[i], single)
        np.testing.assert_array_equal(quant.dequantize(table[i]).T, quant.dequantize(single))
        assert not np.asarray(quant.dequantize(single))[:, 1].any()
        assert not np.asarray(quant.dequantize(single.scale))[0, 0]
        assert np.asarray(quant.dequantize(single.scale))[:, 2:].all()


@pytest.mark.parametrize(
    ("scheme", "group", "scale_dtype", "blocks"),
    [("int4", 16, "bfloat16", (128, 1)), ("int3", "channel", "float32", (20, 128))],
)
def test_block_size_changes_nothing(scheme: str, group: Any, scale_dtype: str, blocks: tuple[int, int]) -> None:
    weight, h = _weight(), hessian(jnp.asarray(_inputs()))
    one, other = [
        quantize_gptq(weight, h, scheme, group_size=group, block_size=block, scale_dtype=scale_dtype)
        for block in blocks
    ]
    np.testing.assert_array_equal(_codes(one), _codes(other))
    np.testing.assert_allclose(one.scale.astype(jnp.float32), other.scale.astype(jnp.float32), rtol=0.01)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("scheme", "act_order"),
    [
        *[("int4", False), ("int4", True), ("int3", False), ("uint3", True)],
        *[("int2", False), ("nf4", False), ("mxfp4", True), ("ternary", False)],
    ],
)
def test_outputs_are_closer_than_those_of_round_to_nearest(scheme: str, act_order: bool) -> None:
    x, weight = _inputs(), _weight()
    nearest = quant.quantize_rtn(weight, scheme, group_size=16)
    made = quantize_gptq(weight, hessian(jnp.asarray(x)), scheme, group_size=16, act_order=act_order)
    bound = 0.5 if scheme in ("int3", "uint3") else 1
    assert _output_error(x, weight, made) < bound * _output_error(x, weight, nearest)


def test_a_searched_scale_is_better_than_a_plain_one() -> None:
    """Over 16 seeds the geometric mean of the ratios is about 0.89, with a standard error of 0.03."""
    ratios = []
    for seed in range(16):
        x, weight = _inputs(seed), _weight(seed)
        errors = [
            _output_error(x, weight, quantize_gptq(weight, hessian(jnp.asarray(x)), "int3", group_size=16, clip=clip))
            for clip in (None, "mse")
        ]
        ratios.append(errors[1] / errors[0])
    assert np.exp(np.mean(np.log(ratios))) < 0.95


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("scheme", "group", "clip"),
    [("int4", 16, None), ("int3", 16, "mse"), ("uint3", "tensor", "mse"), ("nf4", 16, None)],
)
def test_without_correlations_it_is_round_to_nearest(scheme: str, group: Any, clip: Any) -> None:
    weight = _weight()
    made = quantize_gptq(weight, 3 * jnp.eye(LENGTH), scheme, group_size=group, clip=clip)
    jax.tree.map(np.testing.assert_array_equal, made, quant.quantize_rtn(weight, scheme, group_size=group, clip=clip))


def test_groups_take_their_scale_from_the_weights_that_they_have_become() -> None:
    """The second group repeats the first group's inputs, so that its weights, 0, take over the first one's errors."""
    weight = jnp.asarray([1.3, 0.3, 0.3, 0.3, 0, 0, 0, 0], jnp.float32)[:, None]
    h = jnp.kron(jnp.ones((2, 2)), jnp.eye(4))
    made = quantize_gptq(weight, h, "int2", group_size=4, damping=1e-4, scale_dtype="float32")
    # In steps of 0.65, 1.3 is exact and 0.3 is 0. The 0s become 0, 0.3, 0.3, 0.3: two steps of 0.15.
    np.testing.assert_allclose(np.asarray(made.scale)[:, 0], [-0.65, -0.15], rtol=1e-3)
    np.testing.assert_allclose(quant.dequantize(made)[:, 0], [1.3, 0, 0, 0, 0, 0.3, 0.3, 0.3], rtol=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_fewer_samples_than_channels(act_order: bool) -> None:
    x, weight = _inputs(samples=10), _weight()
    h = hessian(jnp.asarray(x))
    made = {d: quantize_gptq(weight, h, "int4", group_size=16, damping=d, act_order=act_order) for d in (0, 1e-3, 0.01)}
    nearest = _output_error(x, weight, quant.quantize_rtn(weight, "int4", group_size=16))
    assert all(_output_error(x, weight, one) < 0.5 * nearest for one in made.values())
    # The undamped Hessian cannot be factorized; damping grows to 0.001.
    jax.tree.map(np.testing.assert_array_equal, made[0], made[1e-3])


def test_a_pivot_lost_in_rounding_is_damped_away() -> None:
    """float32 can factorize this Hessian, but the inverse, 8 million, is all rounding."""
    h = jnp.asarray([[1, 1 - 2**-24], [1 - 2**-24, 1]], jnp.float32)
    undamped, damped = (np.asarray(inverse_factor(h, damping)) for damping in (0.0, 1e-3))
    np.testing.assert_array_equal(undamped, damped)
    expected = np.linalg.inv(np.asarray(h, np.float64) + 1e-3 * np.eye(2))
    np.testing.assert_allclose(damped.T @ damped, expected, rtol=1e-3)


def test_dead_channels_get_weight_zero_and_change_nothing_else() -> None:
    x, weight, dead = _inputs() * 1e-3, _weight(), np.array([0, 7, 30, 47])
    live = np.setdiff1d(np.arange(LENGTH), dead)
    x[:, dead] = 0
    h = hessian(jnp.asarray(x))
    made = quantize_gptq(weight, h, "int4", group_size="channel", act_order=True)
    assert not np.asarray(quant.dequantize(made))[dead].any()
    alone = quantize_gptq(weight[live], h[live][:, live], "int4", group_size="channel", act_order=True)
    np.testing.assert_array_equal(_codes(made)[live], _codes(alone))
    all_dead = quantize_gptq(weight, jnp.zeros((LENGTH, LENGTH)), "int4", group_size="channel", act_order=True)
    assert not np.asarray(quant.dequantize(all_dead)).any()


def test_the_scale_of_the_inputs_does_not_matter() -> None:
    weight, h = _weight(), hessian(jnp.asarray(_inputs()))
    made = [quantize_gptq(weight, h * factor, "int4", group_size=16) for factor in (1, 2.0**-40, 2.0**40)]
    for other in made[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, made[0])


def test_layers_and_tables_are_matrices_one_by_one() -> None:
    x = jnp.asarray(np.stack([_inputs(seed) for seed in range(2)]))
    weight = _weight(shape=(2, LENGTH, OUTPUTS))
    h = jnp.stack([hessian(one) for one in x])
    options: dict[str, Any] = {"group_size": 16, "act_order": True}
    single = [quantize_gptq(weight[i], h[i], "int4", **options) for i in range(2)]
    mapped = jax.vmap(lambda weight, h: quantize_gptq(weight, h, "int4", **options))(weight, h)
    for i in range(2):
        jax.tree.map(np.testing.assert_array_equal, mapped[i], single[i])
    table = quantize_gptq(weight.swapaxes(-1, -2), h, "int4", axis=-1, **options)
    assert table.shape == (2, OUTPUTS, LENGTH)
    for i in range(2):
        np.testing.assert_array_equal(quant.dequantize(table[i]).T, quant.dequantize(single[i]))


def test_the_result_replaces_the_weight() -> None:
    made = jax.eval_shape(
        lambda weight, h: quantize_gptq(weight, h, "int4", group_size=16, scale_dtype="float16"),
        jax.ShapeDtypeStruct((LENGTH, OUTPUTS), jnp.bfloat16),
        jax.ShapeDtypeStruct((LENGTH, LENGTH), jnp.float32),
    )
    assert (made.shape, made.dtype, made.scale.dtype) == ((LENGTH, OUTPUTS), jnp.bfloat16, jnp.float16)


def test_hessian_is_the_mean_outer_product_in_batches_of_any_size() -> None:
    x = _inputs(samples=90)
    expected = x.astype(np.float64).T @ x.astype(np.float64) / 90
    np.testing.assert_allclose(hessian(jnp.asarray(x.reshape(9, 10, LENGTH))), expected, rtol=1e-4, atol=1e-5)
    h, count = jnp.zeros((LENGTH, LENGTH)), 0
    for batch in np.split(x, [1, 20, 77]):
        h, count = add_to_hessian(h, count, jnp.asarray(batch))
    assert count == 90
    np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-5)
    h, count = jax.jit(add_to_hessian)(jnp.zeros((2, 2)), jnp.int32(0), jnp.full((3, 2), 1e4, jnp.bfloat16))
    assert (h.dtype, int(count)) == (jnp.float32, 3)
    np.testing.assert_allclose(h, np.full((2, 2), 1e8), rtol=0.01)


def test_a_weight_of_zeros_stays_zero() -> None:
    h = hessian(jnp.asarray(_inputs()))
    made = quantize_gptq(jnp.zeros((LENGTH, OUTPUTS)), h, "uint3", group_size=16, act_order=True)
    assert not np.asarray(quant.dequantize(made)).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": jnp.ones((16, 2), jnp.int32)}, "weight of dtype int32 and shape .16, 2.: expected floats"),
        ({"weight": jnp.full((16, 2), jnp.nan)}, "weight of shape .16, 2. holds NaN or infinity"),
        ({"weight": jnp.full((16, 2), 1e9), "scale_dtype": "float16"}, "a scale is above the range of float16: use"),
        ({"hessian": jnp.eye(8)}, r"hessian of dtype float32 and shape .8, 8.: expected floats, \(16, 16\)"),
        ({"hessian": jnp.eye(16, dtype=jnp.int32)}, "hessian of dtype int32 and shape"),
        ({"hessian": jnp.eye(16).at[3, 4].set(jnp.inf)}, "hessian holds NaN or infinity: expected the mean of x x'"),
        ({"hessian": -jnp.eye(16)}, "hessian has a negative diagonal entry: expected the mean"),
        ({"scheme": "int9"}, "no scheme 'int9': expected one of"),
        ({"group_size": 12}, "groups of 12 do not divide an axis of 16: choose"),
        ({"group_size": "row"}, "group_size 'row': expected a number, 'channel' or 'tensor'"),
        ({"axis": 0}, "axis 0: expected -2"),
        ({"scale_dtype": "float64"}, "scale_dtype float64: expected float32 or bfloat16 or float16"),
        ({"clip": "max"}, "clip 'max': expected None or 'mse'"),
        ({"damping": -0.1}, "damping -0.1: expected a fraction of the mean diagonal, 0 or more"),
        ({"damping": float("nan")}, "damping nan: expected"),
        ({"block_size": 0}, "block_size 0: expected at least 1"),
        ({"scale_scheme": "int9"}, "no scheme 'int9'"),
        ({"scale_scheme": "uint8"}, "int4 with scales in uint8: expected int or iq4_nl with int"),
        ({"scale_scheme": "int8", "group_size": "channel"}, "scale_scheme int8 beside group_size 'channel': expected"),
        ({"scale_scheme": "int6"}, "a group of 2 codes of 6 bits does not fill whole bytes"),
        ({"weight": jnp.full((16, 2), 1e9), "scale_dtype": "float16", "scale_scheme": "int8"}, "above the range of"),
    ],
)
def test_errors(changes: dict[str, Any], message: str) -> None:
    arguments = {"weight": jnp.ones((16, 2)), "hessian": jnp.eye(16), "scheme": "int4", "group_size": 8} | changes
    with pytest.raises(ValueError, match=message):
        quantize_gptq(**arguments)


def test_hessian_errors() -> None:
    with pytest.raises(
        ValueError, match=r"inputs of shape \(5, 3\) for a Hessian of shape \(4, 4\): expected one width"
    ):
        add_to_hessian(jnp.zeros((4, 4)), 0, jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"inputs of dtype float32 and shape \(0, 4\): expected floats, at least one"):
        hessian(jnp.ones((0, 4)))
    with pytest.raises(ValueError, match="inputs of dtype int32"):
        hessian(jnp.ones((2, 4), jnp.int32))


@pytest.mark.parametrize("kind", ["int", "uint"])
def test_one_program_serves_all_numbers_of_bits(kind: str) -> None:
    weight, seen = _weight(shape=(LENGTH, 24)), hessian(_inputs())
    before = _quantize._cache_size()
    for bits in (2, 3, 4, 5, 6, 7, 8):
        made = quantize_gptq(weight, seen, f"{kind}{bits}", group_size=16, clip="mse")
        assert made.scheme.bits == bits
    assert _quantize._cache_size() == before + 1
