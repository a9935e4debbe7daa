"""The TPU lowering against NumPy: layouts, XLA's product, and the Mosaic kernel in Pallas' interpreter."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant.kernels import tpu


def make(scheme: str, shape: tuple[int, ...], group_size: int, axis: int, scale_dtype=jnp.bfloat16, zero=None, seed=0):
    """Returns a random QTensor, every code equally likely."""
    rng = np.random.default_rng(seed)
    bits = int(scheme[-1])
    codes = rng.integers(0, 2**bits, shape, np.uint8)
    groups = list(shape)
    groups[axis] //= group_size
    scale = jnp.asarray(rng.uniform(0.01, 0.1, groups), scale_dtype)
    if zero is not None:
        zero = jnp.asarray(rng.uniform(0, 2**bits - 1, groups), zero)
    return quant.QTensor.from_codes(jnp.asarray(codes), scale, quant.SCHEMES[scheme], zero=zero, axis=axis)


def decode(weight: quant.QTensor) -> np.ndarray:
    """Returns float64 [..., K, M], decoded from the bytes by FORMAT.md."""
    planes = [weight.planes[0], weight.scale] + ([] if weight.zero is None else [weight.zero])
    planes = [np.asarray(p) for p in planes]
    packed, scale, *zero = (p if weight.axis == -2 else p.swapaxes(-1, -2) for p in planes)
    bits, groups = weight.scheme.bits, scale.shape[-2]
    parts = packed.astype(int).reshape(*packed.shape[:-2], groups, -1, packed.shape[-1])
    codes = np.concatenate([parts >> slot * bits & 2**bits - 1 for slot in range(8 // bits)], axis=-2)
    value = codes - (2 ** (bits - 1) if weight.scheme.kind == "int" else 0.0)
    for plane in zero:
        value = value - plane.astype(float)[..., None, :]
    value = value * scale.astype(float)[..., None, :]
    return value.reshape(*value.shape[:-3], -1, value.shape[-1])


def check(y_RM, x_RK, weight_KM: np.ndarray) -> None:
    """Compares with the product in float64, within the bounds of `tpu.matmul`'s docstring."""
    x = np.asarray(x_RK, np.float64)
    magnitude = np.abs(x) @ np.abs(weight_KM)
    rounding = 2.0**-8 if x_RK.dtype == jnp.bfloat16 else 0
    assert y_RM.dtype == jnp.float32
    error = np.abs(np.asarray(y_RM, np.float64) - x @ weight_KM)
    assert (error <= (rounding + (len(weight_KM) + 4) * 2.0**-24) * magnitude).all()


def activations(rows: int, length: int, dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, length)), dtype)


CASES = [
    ("int4", -2, 32, jnp.bfloat16, None),
    ("int4", -1, 64, jnp.float16, None),
    ("int4", -2, 384, jnp.float32, None),
    ("uint4", -2, 128, jnp.bfloat16, jnp.uint8),
    ("uint4", -1, 32, jnp.float16, jnp.float16),
    ("int8", -2, 64, jnp.bfloat16, None),
    ("uint8", -1, 128, jnp.float32, jnp.uint8),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("scheme", "axis", "group_size", "scale_dtype", "zero"), CASES)
def test_layout_keeps_every_bit(scheme, axis, group_size, scale_dtype, zero) -> None:
    weight = make(scheme, (2, 384, 384), group_size, axis, scale_dtype, zero)
    laid_out = jax.jit(tpu.layout)(weight)
    assert (laid_out.shape, laid_out.ndim, laid_out.size) == (weight.shape, weight.ndim, weight.size)
    assert (laid_out.group_size, laid_out.dtype) == (weight.group_size, weight.dtype)
    restored = jax.jit(tpu.restore)(laid_out)
    restored.validate()
    np.testing.assert_array_equal(restored.planes[0], weight.planes[0])
    np.testing.assert_array_equal(quant.dequantize(restored), quant.dequantize(weight))
    expected = decode(weight) if axis == -2 else decode(weight).swapaxes(-1, -2)
    np.testing.assert_allclose(quant.dequantize(restored), expected, rtol=1e-6, atol=1e-7)


def test_bytes_on_the_device() -> None:
    """Half a byte per code and two per bfloat16 scale, as in the QTensor. float16 scales become float32."""
    weight = make("int4", (256, 128), 32, -2)
    assert tpu.layout(weight).nbytes == weight.nbytes == 256 * 128 // 2 + 8 * 128 * 2
    assert tpu.layout(make("int4", (256, 128), 32, -2, jnp.float16)).nbytes == 256 * 128 // 2 + 8 * 128 * 4


@pytest.mark.matrix
@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize(("scheme", "axis", "group_size", "scale_dtype", "zero"), CASES)
def test_matmul_is_the_product(scheme, axis, group_size, scale_dtype, zero, kernel) -> None:
    """Covers outputs that do not fill the blocks, and both lowerings."""
    rows, outputs = 2 + group_size % 19, 300
    weight = make(scheme, (384, outputs) if axis == -2 else (outputs, 384), group_size, axis, scale_dtype, zero)
    laid_out = tpu.layout(weight, kernel=kernel)
    matmul = jax.jit(lambda x, w: tpu.matmul(x, w, interpret=True))
    for dtype in (jnp.bfloat16, jnp.float32):
        x_RK = activations(rows, 384, dtype)
        assert tpu.uses_kernel(laid_out, rows, dtype) == (kernel and dtype == jnp.bfloat16)
        check(matmul(x_RK, laid_out), x_RK, decode(weight))


@pytest.mark.parametrize(("rows", "kernel"), [(1, True), (20, True), (8, False)])
def test_layers_of_a_stack(rows: int, kernel: bool) -> None:
    """Layers are taken by number, by slices of a scan, and by vmap; with the kernel and without."""
    weight = make("int4", (3, 256, 128), 32, -2)
    laid_out, expected = tpu.layout(weight, kernel=kernel), decode(weight)
    x_RK = activations(rows, 256, jnp.bfloat16)
    assert tpu.uses_kernel(laid_out.at_layer(jnp.int32(0)), rows, jnp.bfloat16) == kernel
    assert laid_out.at_layer(jnp.int32(1)).shape == (256, 128)
    multiply = jax.jit(lambda w: tpu.matmul(x_RK, w, interpret=True))
    by_number = [multiply(laid_out.at_layer(jnp.int32(layer))) for layer in range(3)]
    _, by_scan = jax.lax.scan(lambda carry, layer: (carry, multiply(layer)), 0, laid_out)
    for product_LRM in (by_number, by_scan, jax.vmap(multiply)(laid_out)):
        for layer in range(3):
            check(product_LRM[layer], x_RK, expected[layer])


def test_blocks_that_fit_no_vmem_are_xlas() -> None:
    """LLaMA 405B's longest contraction runs in narrower blocks with few rows, and by XLA with 64 rows."""
    abstract = jax.eval_shape(lambda: tpu.layout(quant.quantize_rtn(jnp.zeros((53248, 256)), "int4", group_size=128)))
    assert [tpu.uses_kernel(abstract, rows, jnp.bfloat16) for rows in (1, 8, 64)] == [True, True, False]


def test_one_layer_is_restored() -> None:
    weight = make("uint4", (3, 64, 128), 32, -1, zero=jnp.uint8)
    restored = tpu.restore(tpu.layout(weight).at_layer(jnp.int32(2)))
    np.testing.assert_array_equal(quant.dequantize(restored), quant.dequantize(weight[2]))


def test_one_scale_for_the_tensor() -> None:
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (256, 128), np.uint8))
    weight = quant.QTensor.from_codes(codes, jnp.full((1, 1), 0.5, jnp.bfloat16), quant.SCHEMES["int4"])
    x_RK = activations(3, 256, jnp.bfloat16)
    check(tpu.matmul(x_RK, tpu.layout(weight), interpret=True), x_RK, (np.asarray(codes) - 8.0) * 0.5)


def test_rows_of_a_table() -> None:
    weight = make("int4", (50, 64), 32, -1, jnp.float16)
    rows = jnp.asarray([0, 49, 7, 7])
    np.testing.assert_array_equal(tpu.layout(weight).rows(rows), quant.dequantize(weight)[rows])


@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "kernel", "expected"),
    [
        ((256, 128), 1, jnp.bfloat16, True, True),
        ((256, 128), 64, jnp.bfloat16, True, True),
        ((256, 128), 65, jnp.bfloat16, True, False),
        ((256, 128), 8, jnp.float32, True, False),
        ((256, 128), 8, jnp.bfloat16, False, False),
        ((96, 128), 8, jnp.bfloat16, True, False),
    ],
)
def test_which_lowering(shape, rows, dtype, kernel, expected) -> None:
    assert tpu.uses_kernel(tpu.layout(make("int4", shape, 32, -2), kernel=kernel), rows, dtype) == expected


_INT4 = make("int4", (64, 4), 32, -2)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (make("int2", (64, 4), 32, -2), "int2 codes are not whole numbers of 4 or 8 bits"),
        (dataclasses.replace(_INT4, scheme=quant.SCHEMES["nf4"]), "nf4 codes are not whole numbers"),
        (dataclasses.replace(_INT4, scale=_INT4), "scales have two levels, with several floats"),
        (dataclasses.replace(_INT4, offset=_INT4.scale), "offsets instead of zero points"),
        (dataclasses.replace(_INT4, order=jnp.arange(64)[:, None]), "groups consist of reordered inputs"),
        (dataclasses.replace(_INT4, outlier=_INT4.scale), "it has outlier channels"),
    ],
)
def test_refusals(weight, message) -> None:
    assert message in tpu.refusal(weight)
    with pytest.raises(ValueError, match=rf"laid out for TPU: .*{message}.*; multiply with the QTensor"):
        tpu.layout(weight)


@pytest.mark.parametrize("rows", [2, 16, 64])
def test_rows_with_experts_of_their_own_are_lowered_to_the_kernel(rows: int) -> None:
    """Lowers for TPU without one: the kernel gets the whole stack and a number, and no matrix is sliced out."""
    weight = jax.eval_shape(tpu.layout, make("int4", (2, 4, 256, 384), 32, -2))
    product = jax.jit(lambda x, weight, layer, index: quant.product(x, weight.at_layer(layer), index))
    shapes = ((rows, 256), jnp.bfloat16), ((), jnp.int32), ((rows,), jnp.int32)
    x, layer, index = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    text = product.trace(x, weight, layer, index).lower(lowering_platforms=("tpu",)).as_text()
    calls = [line for line in text.splitlines() if "@tpu_custom_call" in line]
    assert calls and all("tensor<8x256x384xi4>" in line for line in calls)
    assert set(re.findall(r"tensor<[\dx]*xi4>", text)) == {"tensor<2x4x256x384xi4>", "tensor<8x256x384xi4>"}
