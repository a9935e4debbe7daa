"""The CPU lowering of GGUF's types, with two levels of scales and codebooks, against NumPy in float64."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quant
from quant import QTensor
from quant.kernels import cpu, cpu_rows, gpu, tpu
from tests.fuzz import fuzz
from tests.test_packing import arrays_of, decode

# ggml's type: codes, group, codes of scales (and their group), whether offsets have the same, bits per weight in a
# file.
FORMS: dict[str, tuple[str, int, tuple[str, int] | None, bool, float]] = {
    "Q4_0": ("int4", 32, None, False, 4.5),
    "Q4_1": ("uint4", 32, None, True, 5.0),
    "Q5_1": ("uint5", 32, None, True, 6.0),
    "Q8_0": ("int8", 32, None, False, 8.5),
    "Q2_K": ("uint2", 16, ("uint4", 16), True, 2.625),
    "Q3_K": ("int3", 16, ("int6", 16), False, 3.4375),
    "Q4_K": ("uint4", 32, ("uint6", 8), True, 4.5),
    "Q5_K": ("uint5", 32, ("uint6", 8), True, 5.5),
    "Q6_K": ("int6", 16, ("int8", 16), False, 6.5625),
    "IQ4_NL": ("iq4_nl", 32, None, False, 4.5),
    "IQ4_XS": ("iq4_nl", 32, ("int6", 8), False, 4.25),
    "TQ2_0": ("ternary", 256, None, False, 2.0625),
    "MXFP4": ("mxfp4", 32, None, False, 4.25),
    "NVFP4": ("nvfp4", 16, None, False, 4.5),
    "NF4": ("nf4", 64, None, False, 4.25),
}
EITHER_AXIS = [(name, -1 - number % 2) for number, name in enumerate(FORMS)]


def made(name: str, blocks: int, outputs: int, axis: int, lead: tuple[int, ...] = (), seed: int = 0, **changes: Any):
    """Returns a random weight of 256 * blocks inputs in a type's form, and its arrays with one level of scales."""
    rng, (scheme, group, levels, has_offset, _) = np.random.default_rng(seed), FORMS[name]
    levels, K = changes.get("levels", levels), 256 * blocks
    turn = (lambda x: jnp.asarray(x)) if axis == -2 else (lambda x: jnp.asarray(np.swapaxes(x, -1, -2)))

    def codes(kind: quant.Scheme, rows: int) -> jax.Array:
        return turn(rng.integers(0, kind.max_code + 1, (*lead, rows, outputs), np.uint8))

    def halves(rows: int) -> jax.Array:
        return turn(rng.normal(size=(*lead, rows, outputs)).astype(np.float16))

    def scales() -> Any:
        if scheme == "mxfp4":
            return turn(rng.integers(120, 130, (*lead, K // group, outputs), np.uint8))
        if scheme == "nvfp4":
            return turn(rng.integers(0, 127, (*lead, K // group, outputs), np.uint8))
        if levels is None:
            return halves(K // group)
        inner, span = quant.SCHEMES[levels[0]], levels[1]
        return QTensor.from_codes(codes(inner, K // group), halves(K // group // span), inner, axis=axis)

    parts = {"offset": scales()} if has_offset else {}
    kind = quant.SCHEMES[scheme]
    weight = QTensor.from_codes(codes(kind, K), scales(), kind, axis=axis, **parts)
    arrays = arrays_of(dataclasses.replace(weight, scale=jnp.zeros(()), offset=None))
    for part in ("scale", "offset"):
        plane = getattr(weight, part)
        if isinstance(plane, QTensor):
            arrays[part] = decode(arrays_of(plane), plane.scheme.name, axis)
        elif plane is not None:
            arrays[part] = np.asarray(plane)
    return weight, arrays


def dense(weight: QTensor, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns values [..., K, M] in float64, and the largest value that a code could stand for in each place."""
    name, axis = weight.scheme.name, weight.axis
    largest = 0.0
    for code in (0, weight.scheme.max_code):
        planes = quant.pack(jnp.full(weight.shape, code, jnp.uint8), weight.scheme.bits, weight.group_size, axis=axis)
        extreme = arrays | {f"planes.{i}": np.asarray(plane) for i, plane in enumerate(planes)}
        largest = np.maximum(largest, np.abs(decode(extreme, name, axis)))
    if "offset" in arrays:
        largest = largest + 2 * np.repeat(np.abs(arrays["offset"].astype(np.float32)), weight.group_size, axis)
    both = (decode(arrays, name, axis).astype(np.float64), largest.astype(np.float64))
    return both if axis == -2 else tuple(np.swapaxes(x, -1, -2) for x in both)  # type: ignore[return-value]


def check(y_RM: jax.Array, x_RK: np.ndarray, weight_KM: np.ndarray, largest_KM: np.ndarray) -> None:
    """Checks the bound of `cpu.matmul`'s docstring."""
    bound_RM = (x_RK.shape[1] + 16) * 2.0**-24 * 16 * np.abs(x_RK).astype(np.float64) @ largest_KM
    assert y_RM.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(y_RM, np.float64) - x_RK.astype(np.float64) @ weight_KM) <= bound_RM)


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "axis"), EITHER_AXIS)
def test_one_row_is_numpys_in_as_many_bits(name: str, axis: int) -> None:
    """The layout takes at most 1.1 times the bytes in the file; outputs fill whole tiles."""
    weight, arrays = made(name, 3, 48, axis)
    bits = FORMS[name][-1]
    tiled = quant.prepare(weight, "cpu")
    assert isinstance(tiled, cpu.TiledWeight) and weight.bits_per_weight == bits
    assert bits <= 8 * tiled.nbytes / tiled.size <= 1.1 * bits
    x_RK = np.random.default_rng(1).standard_normal((1, 768)).astype(np.float32)
    check(quant.product(jnp.asarray(x_RK), tiled, axis=axis), x_RK, *dense(weight, arrays))


@pytest.mark.matrix
@pytest.mark.parametrize("rows", [3, cpu.MAX_UNROLLED_ROWS + 1, cpu.MIN_WHOLE_ROWS])
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("name", FORMS)
def test_several_rows_of_a_layer_are_numpys(name: str, axis: int, rows: int) -> None:
    """Outputs do not fill the tiles; the products are the unrolled sum, slabs, and the whole weight."""
    weight, arrays = made(name, 2, 21, axis, lead=(2,))
    x_RK = np.random.default_rng(1).standard_normal((rows, 512)).astype(np.float32)
    layer = cpu.layout(weight).at_layer(jnp.asarray(1))
    weight_LKM, largest_LKM = dense(weight, arrays)
    check(jax.jit(cpu.matmul)(jnp.asarray(x_RK), layer), x_RK, weight_LKM[1], largest_LKM[1])


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0"])
def test_some_rows_whose_sums_fit_no_cache_are_numpys(name: str, monkeypatch) -> None:
    """As with a vocabulary, outputs are computed band by band; the last band is moved back."""
    monkeypatch.setattr(cpu_rows, "BAND_BYTES", 8 * 16 * 4 * 16 * 2)
    weight, arrays = made(name, 2, 45, -2)
    x_RK = np.random.default_rng(1).standard_normal((8, 512)).astype(np.float32)
    check(jax.jit(cpu.matmul)(jnp.asarray(x_RK), cpu.layout(weight)), x_RK, *dense(weight, arrays))


def under_units(bits: int, length: int, outputs: int, axis: int, lead: tuple[int, ...] = ()) -> Any:
    """Returns a weight with scales in int8, and its arrays with one level of scales."""
    rng, kind = np.random.default_rng(bits + length), quant.SCHEMES[f"int{bits}"]
    turn = (lambda x: x) if axis == -2 else (lambda x: np.swapaxes(x, -1, -2))
    shapes = [(*lead, rows, outputs) for rows in (length, length // 32, 1)]
    codes, scales = (rng.integers(0, top, shape, np.uint8) for top, shape in zip((2**bits, 256), shapes, strict=False))
    unit = rng.uniform(-0.01, 0.01, shapes[2]).astype(np.float16)
    second = QTensor.from_codes(jnp.asarray(turn(scales)), jnp.asarray(turn(unit)), quant.SCHEMES["int8"], axis=axis)
    weight = QTensor.from_codes(jnp.asarray(turn(codes)), second, kind, axis=axis)
    arrays = arrays_of(dataclasses.replace(weight, scale=jnp.zeros(()), offset=None))
    return weight, arrays | {"scale": turn((scales - np.float32(128)) * unit.astype(np.float32))}


@pytest.mark.parametrize(
    ("bits", "length", "axis", "rows"),
    [(2, 576, -2, 1), (3, 96, -1, 1), (4, 96, -1, 3), (5, 96, -2, 1), (6, 160, -2, 3), (8, 96, -2, 20)],
)
def test_scales_under_one_float_for_an_output_are_numpys(bits: int, length: int, axis: int, rows: int) -> None:
    """Any number of whole groups, one layer of a stack: memory does not grow, and the layout is undone."""
    weight, arrays = under_units(bits, length, 21, axis, (2,))
    tiled = cpu.layout(weight)
    assert tiled.nbytes * 21 == weight.nbytes * 32  # padded to whole tiles
    x_RK = np.random.default_rng(1).standard_normal((rows, length)).astype(np.float32)
    weight_LKM, largest_LKM = dense(weight, arrays)
    layer = tiled.at_layer(jnp.asarray(1))
    check(jax.jit(cpu.matmul)(jnp.asarray(x_RK), layer), x_RK, weight_LKM[1], largest_LKM[1])
    jax.tree.map(np.testing.assert_array_equal, layer.restore(), weight[1])


@pytest.mark.parametrize(("bits", "axis"), [(4, -2), (8, -1)])
def test_scales_under_one_float_for_an_output_on_other_backends(bits: int, axis: int) -> None:
    """Scales stay codes on GPU and TPU, in the kernels too; run in the interpreter."""
    weight, arrays = under_units(bits, 384, 64, axis, (2,))
    weight_LKM, largest_LKM = dense(weight, arrays)
    values = np.asarray(quant.dequantize(weight))
    for module, rows, dtype, width in ((gpu, 3, jnp.float32, 1), (tpu, 3, jnp.bfloat16, 2)):
        laid_out = jax.jit(module.layout)(weight)
        assert laid_out.nbytes == weight.nbytes + 2 * 64 * (2 + 12 * (width - 1))
        np.testing.assert_allclose(quant.dequantize(laid_out.restore()), values, rtol=1e-6)
        for few in (rows, 100):
            x_RK = jnp.asarray(np.random.default_rng(1).standard_normal((few, 384)), dtype)
            y_RM = jax.jit(functools.partial(module.matmul, interpret=True))(x_RK, laid_out.at_layer(jnp.int32(1)))
            x = np.asarray(x_RK, np.float64)
            bound = (400 * 2.0**-23) * np.abs(x) @ largest_LKM[1] + 2.0**-8 * (width - 1) * np.abs(x) @ np.abs(
                weight_LKM[1]
            )
            assert (np.abs(np.asarray(y_RM, np.float64) - x @ weight_LKM[1]) <= bound).all()
        if axis == -1:
            table = module.layout(weight[0])
            np.testing.assert_allclose(table.rows(jnp.asarray([0, 63, 5])), values[0][[0, 63, 5]], rtol=1e-6)
    assert gpu.uses_kernel(gpu.layout(weight), 3) and tpu.uses_kernel(tpu.layout(weight), 3, jnp.bfloat16)


@fuzz(30)
@given(
    name=st.sampled_from(["Q4_K", "Q6_K", "IQ4_XS"]),
    blocks=st.integers(1, 3),
    outputs=st.integers(1, 40),
    axis=st.sampled_from([-2, -1]),
    rows=st.sampled_from([1, 2, 40]),
    levels=st.sampled_from(
        [("uint4", 2), ("int6", 4), ("uint6", 8), ("int8", 1), ("int4", 8), ("uint2", 8), ("nf4", 8)]
    ),
    seed=st.integers(0, 9),
)
def test_any_two_levels_are_numpys(
    name: str, blocks: int, outputs: int, axis: int, rows: int, levels: tuple[str, int], seed: int
) -> None:
    """Groups of the second level differ from any type's, longer and shorter than a step; some codes become floats."""
    weight, arrays = made(name, blocks, outputs, axis, seed=seed, levels=levels)
    x_RK = np.random.default_rng(seed).standard_normal((rows, 256 * blocks)).astype(np.float32)
    tiled = cpu.layout(weight)
    check(quant.product(jnp.asarray(x_RK), tiled, axis=axis), x_RK, *dense(weight, arrays))
    np.testing.assert_array_equal(quant.dequantize(cpu.restore(tiled)), quant.dequantize(weight))


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "axis"), EITHER_AXIS)
def test_layout_is_undone(name: str, axis: int) -> None:
    """Every array of both levels comes back bit for bit, from a stack and one layer; NumPy and JAX lay out the same."""
    weight, _ = made(name, 1, 21, axis, lead=(2,))
    tiled = cpu.layout(weight)
    for back, expected in (
        (tiled.restore(), weight),
        (tiled.at_layer(jnp.asarray(1)).restore(), weight[1]),
        (quant.prepare(weight, "cpu"), tiled),
    ):
        assert jax.tree.structure(back) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, back, expected)
    tiled.restore().validate()


@pytest.mark.parametrize("name", ["Q2_K", "Q6_K", "IQ4_XS", "MXFP4"])
def test_rows_of_a_table_are_its_own(name: str) -> None:
    weight, arrays = made(name, 1, 37, -1)
    ids = jnp.asarray([0, 36, 16, 15])
    expected = dense(weight, arrays)[0].T[np.asarray(ids)]
    np.testing.assert_allclose(quant.rows(cpu.layout(weight), ids), expected, rtol=1e-6, atol=1e-6)


def test_a_scale_for_the_whole_second_level_is_broadcast() -> None:
    weight, _ = made("Q4_K", 1, 20, -2)
    whole = dataclasses.replace(weight.scale, scale=jnp.full((1, 1), 0.25, jnp.float16))
    weight = dataclasses.replace(weight, scale=whole).validate()
    tiled = cpu.layout(weight)
    np.testing.assert_array_equal(quant.dequantize(tiled.restore()), quant.dequantize(weight))
    x_1K = np.random.default_rng(0).standard_normal((1, 256)).astype(np.float32)
    np.testing.assert_allclose(
        quant.product(jnp.asarray(x_1K), tiled), x_1K @ np.asarray(quant.dequantize(weight)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["Q2_K", "Q4_K", "MXFP4"])
def test_one_row_writes_no_floats(name: str) -> None:
    """Neither weights nor scales become floats in memory: temporaries are small compared with the packed weight."""
    weight = jax.eval_shape(lambda: zeros(name, 2048, 2048))
    tiled = jax.eval_shape(cpu.layout, weight)
    program = jax.jit(quant.product).lower(jax.ShapeDtypeStruct((1, 2048), jnp.float32), tiled).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2048 * 2048 / 8


def zeros(name: str, K: int, outputs: int) -> QTensor:
    """Returns a weight [K, outputs] of zeros in a type's form."""
    scheme, group, levels, has_offset, _ = FORMS[name]
    kind = quant.SCHEMES[scheme]

    def scales() -> Any:
        if kind.scale_code:
            return jnp.zeros((K // group, outputs), jnp.uint8)
        if levels is None:
            return jnp.zeros((K // group, outputs), jnp.float16)
        inner, outer = quant.SCHEMES[levels[0]], jnp.zeros((K // group // levels[1], outputs), jnp.float16)
        return QTensor.from_codes(jnp.zeros((K // group, outputs), jnp.uint8), outer, inner)

    offset = scales() if has_offset else None
    return QTensor.from_codes(jnp.zeros((K, outputs), jnp.uint8), scales(), kind, offset=offset)


@pytest.mark.parametrize("name", ["Q4_K", "Q4_1"])
def test_on_a_gpu_two_levels_become_one(name: str) -> None:
    """The kernel can then take them; run in the interpreter."""
    weight, arrays = made(name, 1, 64, -1)
    laid_out = gpu.layout(weight)
    np.testing.assert_array_equal(quant.dequantize(laid_out.restore()), quant.dequantize(weight))
    x_RK = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
    assert gpu.uses_kernel(laid_out, 3)
    check(gpu.matmul(jnp.asarray(x_RK), laid_out, interpret=True), x_RK, *dense(weight, arrays))


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_other_backends_say_which_product_they_take(backend: str) -> None:
    """Types without a layout are multiplied by the reference, with a reason that users are shown."""
    laid_out = {"gpu": {"Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "TQ2_0"}, "tpu": {"Q4_0", "Q8_0"}}[backend]
    for name in FORMS:
        weight = jax.eval_shape(lambda name=name: zeros(name, 512, 32))
        (said,) = quant.lowerings(weight, backend)
        assert said == f"{backend} layout" if name in laid_out else said.startswith("reference: "), (name, said)
