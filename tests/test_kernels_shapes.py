"""Every shape in which a weight can be quantized is multiplied on every backend: by its layout or the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import quant
from quant import QTensor
from quant.kernels import cpu, gpu, tpu
from quant.packing import plane_bits
from quant.prepare import prepare, refusal
from quant.recipe import Rule
from tests.fuzz import fuzz

LAYOUTS = {"cpu": cpu.layout, "gpu": gpu.layout, "tpu": tpu.layout}
SHAPES = ((86, 86), (1366, 1366), (254, 254), (254, 2), (8, 2), (134, 134), (178, 178))


def abstract(scheme: quant.Scheme, group: int, groups: int, outputs: int, axis: int) -> QTensor:
    """Returns a weight of shapes and dtypes only."""

    def plane(rows: int, dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, outputs) if axis == -2 else (outputs, rows), dtype)

    planes = tuple(plane(group * groups * width // 8, jnp.uint8) for width in plane_bits(scheme.bits))
    scale = plane(groups, jnp.uint8 if scheme.scale_code else jnp.float16)
    return QTensor(planes, scale, scheme=scheme, axis=axis).validate()


@st.composite
def weights(draw: st.DrawFn) -> QTensor:
    scheme = quant.SCHEMES[draw(st.sampled_from(sorted(quant.SCHEMES)))]
    multiple = 8 // min(plane_bits(scheme.bits))
    group = multiple * draw(st.one_of(st.integers(1, 70), st.sampled_from([83, 89, 127, 128, 256, 521, 683])))
    groups = draw(st.integers(1, max(1, min(13, 1400 // group))))
    return abstract(scheme, group, groups, draw(st.sampled_from([1, 16, 33, 64])), draw(st.sampled_from([-2, -1])))


@fuzz(120)
@given(weight=weights(), rows=st.sampled_from([1, 3, 17]))
@pytest.mark.parametrize("backend", sorted(LAYOUTS))
def test_whatever_validates_is_multiplied(backend: str, weight: QTensor, rows: int) -> None:
    _check_traced(weight, rows, backend)


@pytest.mark.parametrize(("length", "group"), SHAPES)
def test_odd_groups_are_multiplied(length: int, group: int) -> None:
    for scheme in ("int4", "uint8"):
        for rows in (1, 3):
            _check_traced(abstract(quant.SCHEMES[scheme], group, length // group, 20, -2), rows, "cpu")


def _check_traced(weight: QTensor, rows: int, backend: str) -> None:
    """Traces the product only; the tests of each lowering check the values."""

    def product(weight: QTensor, x_RK: jax.Array) -> jax.Array:
        laid_out = weight if refusal(weight, backend) else LAYOUTS[backend](weight)
        return quant.product(x_RK, laid_out, axis=weight.axis)

    length, outputs = weight.shape if weight.axis == -2 else weight.shape[::-1]
    for dtype in (jnp.float32, jnp.bfloat16):
        y_RM = jax.eval_shape(product, weight, jax.ShapeDtypeStruct((rows, length), dtype))
        assert (y_RM.shape, y_RM.dtype) == ((rows, outputs), dtype)


@pytest.mark.matrix
@pytest.mark.parametrize(("length", "group"), SHAPES)
@pytest.mark.parametrize("scheme", ["int4", "uint8"])
def test_odd_groups_on_the_cpu(scheme: str, length: int, group: int) -> None:
    """Compares one row and several with the dequantized weight in float64, within `cpu.matmul`'s bound."""
    rng = np.random.default_rng(length)
    weight = quant.quantize_rtn(rng.normal(size=(length, 20)).astype(np.float32), scheme, group_size=group)
    laid_out = prepare(weight, "cpu")
    assert isinstance(laid_out, cpu.TiledWeight)
    dense = np.asarray(quant.dequantize(weight), np.float64)
    scale = np.abs(np.asarray(weight.scale, np.float64)).max()
    for rows in (1, 3):
        x_RK = rng.normal(size=(rows, length)).astype(np.float32)
        y_RM = np.asarray(jax.jit(cpu.matmul)(x_RK, laid_out))
        bound = (length + 16) * 2.0**-24 * 16 * 256 * scale * np.abs(x_RK).sum(1, keepdims=True)
        assert (np.abs(y_RM - x_RK.astype(np.float64) @ dense) <= bound).all()


@pytest.mark.parametrize(("width", "scheme", "group"), [(86, "int4", 86), (1366, "int4", 1366), (254, "int4", 254)])
def test_the_ready_recipes_make_such_groups(width: int, scheme: str, group: int) -> None:
    rule = Rule(weights="*", scheme="int4", group_size=32, indivisible="int8").for_inputs(width)
    made = quant.quantize_rtn(np.ones((width, 2), np.float32), rule.scheme, group_size=rule.group_size)
    assert (rule.scheme, made.group_size) == (scheme, group)
