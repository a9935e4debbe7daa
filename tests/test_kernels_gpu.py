"""The GPU lowering against NumPy: layouts, the Triton kernel in Pallas' interpreter, and XLA's product."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant.kernels import gpu


def make(scheme: str, shape: tuple[int, ...], group_size: int, axis: int, scale_dtype=jnp.bfloat16, **planes):
    """Returns a random QTensor, every code equally likely; `planes` are the dtypes of zero and offset."""
    rng = np.random.default_rng(0)
    bits = int(scheme[-1])
    codes = rng.integers(0, 2**bits, shape, np.uint8)
    groups = list(shape)
    groups[axis] //= group_size
    scale = jnp.asarray(rng.uniform(0.01, 0.1, groups), scale_dtype)
    highest = {"zero": 2**bits - 1, "offset": 0.5}
    planes = {name: jnp.asarray(rng.uniform(0, highest[name], groups), dtype) for name, dtype in planes.items()}
    return quant.QTensor.from_codes(jnp.asarray(codes), scale, quant.SCHEMES[scheme], axis=axis, **planes)


def decode(weight: quant.QTensor) -> np.ndarray:
    """Returns float64 [..., K, M], decoded from the bytes by FORMAT.md."""
    planes = {"packed": weight.planes[0], "scale": weight.scale, "zero": weight.zero, "offset": weight.offset}
    planes = {
        k: np.asarray(v) if weight.axis == -2 else np.swapaxes(v, -1, -2) for k, v in planes.items() if v is not None
    }
    packed, scale = planes["packed"], planes["scale"]
    bits, groups = weight.scheme.bits, scale.shape[-2]
    parts = packed.astype(int).reshape(*packed.shape[:-2], groups, -1, packed.shape[-1])
    codes = np.concatenate([parts >> slot * bits & 2**bits - 1 for slot in range(8 // bits)], axis=-2)
    value = codes - (2 ** (bits - 1) if weight.scheme.kind == "int" else 0.0)
    value = value - planes.get("zero", np.zeros_like(scale)).astype(float)[..., None, :]
    value = value * scale.astype(float)[..., None, :]
    value = value + planes.get("offset", np.zeros_like(scale)).astype(float)[..., None, :]
    return value.reshape(*value.shape[:-3], -1, value.shape[-1])


def check(y_RM, x_RK, weight: quant.QTensor) -> None:
    """Compares with the product in float64, within the bounds of `gpu.matmul`'s docstring."""
    weight_KM = decode(weight)
    x = np.abs(np.asarray(x_RK, np.float64))
    if len(x) <= gpu.MAX_KERNEL_ROWS:
        bound = (len(weight_KM) + 16) * 2.0**-23 * (x @ largest(weight))
    else:
        rounding = {"bfloat16": 2.0**-9, "float16": 2.0**-12, "float32": 0}[x_RK.dtype.name]
        bound = (rounding + len(weight_KM) * 2.0**-23) * (x @ np.abs(weight_KM))
    assert y_RM.dtype == jnp.float32
    assert (np.abs(np.asarray(y_RM, np.float64) - np.asarray(x_RK, np.float64) @ weight_KM) <= bound).all()


def largest(weight: quant.QTensor) -> np.ndarray:
    """Returns [K, M]: the sum of the largest terms of a group's weights from code, zero point and offset."""
    planes = {name: getattr(weight, name) for name in ("scale", "zero", "offset")}
    planes = {k: np.abs(np.asarray(v, np.float64)) for k, v in planes.items() if v is not None}
    sum_CM = (2**weight.scheme.bits + planes.get("zero", 0)) * planes["scale"] + planes.get("offset", 0)
    sum_CM = sum_CM if weight.axis == -2 else sum_CM.swapaxes(-1, -2)
    return np.repeat(sum_CM, weight.group_size, axis=-2)


def activations(rows: int, length: int, dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, length)), dtype)


CASES = [
    ("int4", -2, 32, jnp.bfloat16, {}),
    ("int4", -1, 64, jnp.float16, {}),
    ("int4", -2, 384, jnp.float32, {}),
    ("uint4", -2, 128, jnp.bfloat16, {"zero": jnp.uint8}),
    ("uint4", -1, 32, jnp.float16, {"zero": jnp.float16, "offset": jnp.float16}),
    ("int8", -2, 64, jnp.bfloat16, {}),
    ("uint8", -1, 128, jnp.float32, {"offset": jnp.float32}),
    ("int2", -2, 64, jnp.float16, {}),
]


@pytest.mark.matrix
@pytest.mark.parametrize(("scheme", "axis", "group_size", "scale_dtype", "planes"), CASES)
def test_layout_keeps_every_bit(scheme, axis, group_size, scale_dtype, planes) -> None:
    weight = make(scheme, (2, 384, 384), group_size, axis, scale_dtype, **planes)
    laid_out = jax.jit(gpu.layout)(weight)
    assert (laid_out.shape, laid_out.ndim, laid_out.size) == (weight.shape, weight.ndim, weight.size)
    assert (laid_out.group_size, laid_out.dtype, laid_out.nbytes) == (weight.group_size, weight.dtype, weight.nbytes)
    restored = jax.jit(gpu.restore)(laid_out).validate()
    for before, after in zip(jax.tree.leaves(weight), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.matrix
@pytest.mark.parametrize(("scheme", "axis", "group_size", "scale_dtype", "planes"), CASES)
def test_matmul_is_the_product(scheme, axis, group_size, scale_dtype, planes) -> None:
    """Covers several blocks of outputs, several parts of K, and more rows than the kernel takes."""
    weight = make(scheme, (384, 320) if axis == -2 else (320, 384), group_size, axis, scale_dtype, **planes)
    laid_out = gpu.layout(weight)
    matmul = jax.jit(lambda x, w: gpu.matmul(x, w, interpret=True))
    few, dtype = 1 + group_size % 15, (jnp.bfloat16, jnp.float32, jnp.float16)[group_size // 32 % 3]
    assert gpu.uses_kernel(laid_out, few) and not gpu.uses_kernel(laid_out, 17)
    for rows in (few, 17):
        x_RK = activations(rows, 384, dtype)
        check(matmul(x_RK, laid_out), x_RK, weight)


@pytest.mark.parametrize("rows", [1, 16, 20])
def test_layers_of_a_stack(rows: int) -> None:
    """Layers are taken by number, by slices of a scan, and by vmap; with the kernel and without."""
    weight = make("int4", (3, 128, 128), 32, -2)
    laid_out = gpu.layout(weight)
    x_RK = activations(rows, 128, jnp.bfloat16)
    assert gpu.uses_kernel(laid_out.at_layer(jnp.int32(0)), rows) == (rows <= 16)
    assert laid_out.at_layer(jnp.int32(1)).shape == (128, 128)
    multiply = jax.jit(lambda w: gpu.matmul(x_RK, w, interpret=True))
    by_number = [multiply(laid_out.at_layer(jnp.int32(layer))) for layer in range(3)]
    _, by_scan = jax.lax.scan(lambda carry, layer: (carry, multiply(layer)), 0, laid_out)
    for product_LRM in (by_number, by_scan, jax.vmap(multiply)(laid_out)):
        for layer in range(3):
            check(product_LRM[layer], x_RK, weight[layer])


def test_one_layer_is_restored() -> None:
    weight = make("uint4", (3, 64, 128), 32, -1, zero=jnp.uint8)
    restored = gpu.restore(gpu.layout(weight).at_layer(jnp.int32(2)))
    np.testing.assert_array_equal(quant.dequantize(restored), quant.dequantize(weight[2]))


def test_one_scale_for_the_tensor() -> None:
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 3, (256, 128), np.uint8))
    weight = quant.QTensor.from_codes(codes, jnp.full((1, 1), 0.5, jnp.bfloat16), quant.SCHEMES["ternary"])
    x_RK = activations(3, 256, jnp.bfloat16)
    y_RM = gpu.matmul(x_RK, gpu.layout(weight), interpret=True)
    np.testing.assert_allclose(y_RM, np.asarray(x_RK, np.float64) @ ((np.asarray(codes) - 1.0) * 0.5), atol=1e-4)


def test_rows_of_a_table() -> None:
    weight = make("int4", (50, 64), 32, -1, jnp.float16)
    rows = jnp.asarray([0, 49, 7, 7])
    np.testing.assert_array_equal(gpu.layout(weight).rows(rows), quant.dequantize(weight)[rows])


@pytest.mark.parametrize(
    ("shape", "group_size", "rows", "expected"),
    [
        ((128, 128), 32, 1, True),
        ((128, 128), 32, 16, True),
        ((128, 128), 32, 17, False),
        ((128, 120), 32, 1, False),
        ((128, 128), 16, 1, False),
    ],
)
def test_which_lowering(shape, group_size, rows, expected) -> None:
    assert gpu.uses_kernel(gpu.layout(make("int4", shape, group_size, -2)), rows) == expected


_INT4 = make("int4", (64, 4), 32, -2)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (dataclasses.replace(_INT4, scheme=quant.SCHEMES["nf4"]), "nf4 codes are looked up in a table"),
        (make("int3", (64, 4), 32, -2), "its codes of 3 bits are in 2 planes"),
        (dataclasses.replace(_INT4, order=jnp.arange(64)[:, None]), "its groups consist of reordered inputs"),
        (dataclasses.replace(_INT4, outlier=_INT4.scale), "it has outlier channels"),
    ],
)
def test_refusals(weight, message) -> None:
    assert message in gpu.refusal(weight)
    with pytest.raises(ValueError, match=rf"laid out for a GPU: .*{message}.*; multiply with the QTensor"):
        gpu.layout(weight)


# JAX 0.12 announces the end of its Triton backend; until then the kernel is lowered.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("rows", [2, 16])
def test_rows_with_experts_of_their_own_are_lowered_to_the_kernel(rows: int) -> None:
    """Lowers for CUDA without a card: the kernel gets the whole stack and a number, and no matrix is sliced out."""
    weight = jax.eval_shape(gpu.layout, make("int4", (2, 4, 256, 384), 32, -2))
    product = jax.jit(lambda x, weight, layer, index: quant.product(x, weight.at_layer(layer), index))
    shapes = ((rows, 256), jnp.bfloat16), ((), jnp.int32), ((rows,), jnp.int32)
    x, layer, index = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    card = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")  # JAX 0.12 needs it
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=card)):
        text = product.trace(x, weight, layer, index).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "@__gpu$xla.gpu.triton" in line]
    assert calls and all("tensor<8x128x384xui8>" in line for line in calls)
    assert set(re.findall(r"tensor<[\dx]*xui8>", text)) == {"tensor<2x4x128x384xui8>", "tensor<8x128x384xui8>"}
