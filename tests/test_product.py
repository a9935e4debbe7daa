"""Products with one of many matrices, chosen by no index, one index or an index per row, against float64 NumPy."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quant
from quant import QTensor
from quant.kernels import cpu, gpu, tpu
from tests.programs import QUICK

K, M, GROUP = 128, 24, 32
PARTS = ("plain", "zero, offset", "two levels", "order", "outliers", "tensor")


class Case(NamedTuple):
    """A weight and its dequantized values, float64 [X, K, M]."""

    weight: Any
    dense_XKM: np.ndarray
    axis: int


def decode(qtensor: QTensor) -> np.ndarray:
    """Dequantizes to float64 by the formula of `QTensor`, from unpacked codes; axes stay as they are stored."""
    scheme, group = qtensor.scheme, qtensor.group_size
    codes = np.asarray(quant.unpack(qtensor.planes, scheme.bits, group, axis=qtensor.axis), np.float64)
    value = codes - scheme.bias if scheme.kind in ("int", "ternary") else codes

    def spread(plane: Any) -> np.ndarray:
        plane = decode(plane) if isinstance(plane, QTensor) else np.asarray(plane).astype(np.float64)
        return plane if plane.shape[qtensor.axis] == 1 else np.repeat(plane, group, qtensor.axis)

    if scheme.kind == "nf4":
        value = np.asarray(scheme.codebook, np.float64)[codes.astype(int)]
    value = value - (0 if qtensor.zero is None else spread(qtensor.zero))
    stored = value * spread(qtensor.scale) + (0 if qtensor.offset is None else spread(qtensor.offset))
    weight = stored
    if qtensor.order is not None:
        weight = np.empty_like(stored)
        np.put_along_axis(weight, np.broadcast_to(qtensor.order, stored.shape), stored, qtensor.axis)
    if qtensor.outlier is not None:
        index = np.broadcast_to(qtensor.outlier_index, qtensor.outlier.shape)
        np.put_along_axis(weight, index, np.asarray(qtensor.outlier).astype(np.float64), qtensor.axis)
    return weight


def made(lead: tuple[int, ...], axis: int, scheme: str = "int4", parts: str = "plain", seed: int = 0) -> QTensor:
    """Makes a QTensor of random codes, with the optional parts that `parts` names."""
    rng, kind = np.random.default_rng(seed), quant.SCHEMES[scheme]
    turn = (lambda plane: plane) if axis == -2 else (lambda plane: plane.swapaxes(-1, -2))
    codes = rng.integers(0, kind.max_code + 1, (*lead, K, M), np.uint8)
    scale = rng.uniform(0.5, 1.5, (*lead, K // GROUP, M)).astype(np.float32)
    arrays: dict[str, Any] = {}
    if parts == "zero, offset":
        arrays = {"zero": rng.integers(0, 9, scale.shape, np.uint8), "offset": rng.normal(size=scale.shape)}
    if parts == "order":
        arrays = {"order": np.argsort(rng.random((*lead, K)), axis=-1)[..., None].astype(np.int32)}
    if parts == "outliers":
        index = np.sort(np.argsort(rng.random((*lead, K)), axis=-1)[..., :3], axis=-1)[..., None].astype(np.int32)
        arrays = {"outlier": 9 * rng.normal(size=(*lead, 3, M)), "outlier_index": index}
    arrays = {
        name: jnp.asarray(turn(array), jnp.float32 if array.dtype == np.float64 else array.dtype)
        for name, array in arrays.items()
    }
    plane: Any = jnp.full((*lead, 1, 1), 0.5) if parts == "tensor" else jnp.asarray(turn(scale))
    if parts == "two levels":
        inner = jnp.asarray(rng.integers(1, 64, plane.shape, np.uint8))
        groups = jnp.full((*lead, 1, M) if axis == -2 else (*lead, M, 1), 0.02)
        plane = QTensor.from_codes(inner, groups, quant.SCHEMES["uint6"], axis=axis)
    return QTensor.from_codes(jnp.asarray(turn(codes)), plane, kind, axis=axis, **arrays)


def case(weight: Any, values: np.ndarray, axis: int) -> Case:
    """Makes a case whose values have their leading axes merged into one."""
    values = values if axis == -2 else values.swapaxes(-1, -2)
    return Case(weight, values.reshape(-1, K, M).astype(np.float64), axis)


def packed(lead: tuple[int, ...], axis: int, lay: Callable[[QTensor], Any], *names: str) -> Case:
    """Makes a case of a packed weight in the layout of `lay`."""
    qtensor = made(lead, axis, *names)
    return case(lay(qtensor), decode(qtensor), axis)


def mixed(lead: tuple[int, ...], axis: int, prepared: bool = False) -> Case:
    """Makes a case of layers of three types, floats among them, neither sorted nor alternating."""
    rng = np.random.default_rng(1)
    layers: list[Any] = []
    for number in range(lead[0]):
        scheme = ("int4", "int8", None)[(0, 2, 1, 1, 0)[number % 5]]
        floats = jnp.asarray(rng.normal(size=(*lead[1:], K, M) if axis == -2 else (*lead[1:], M, K)), jnp.float32)
        layers.append(floats if scheme is None else made(lead[1:], axis, scheme, seed=number))
    weight = quant.Mixed.of(layers, axis)
    assert isinstance(weight, quant.Mixed) and weight.shape[: len(lead)] == lead
    values = np.stack([decode(layer) if isinstance(layer, QTensor) else np.asarray(layer) for layer in layers])
    return case(quant.prepare(weight, "cpu") if prepared else weight, values, axis)


def floats(lead: tuple[int, ...], axis: int) -> Case:
    """Makes a case of an array of floats."""
    values = np.random.default_rng(0).normal(size=(*lead, K, M) if axis == -2 else (*lead, M, K)).astype(np.float32)
    return case(jnp.asarray(values), values, axis)


KINDS: dict[str, Callable[[tuple[int, ...], int], Case]] = {
    "array": floats,
    **{
        f"{scheme}, {parts}": lambda lead, axis, scheme=scheme, parts=parts: packed(
            lead, axis, lambda weight: weight, scheme, parts
        )
        for scheme, parts in [
            ("int4", "plain"), ("uint4", "zero, offset"), ("int3", "order"), ("int8", "outliers"), ("nf4", "plain"),
            ("ternary", "tensor"), ("uint5", "two levels"),
        ]
    },
    "cpu": lambda lead, axis: packed(lead, axis, cpu.layout, "int3", "order"),
    "cpu, two levels": lambda lead, axis: packed(lead, axis, cpu.layout, "uint4", "two levels"),
    "gpu": lambda lead, axis: packed(lead, axis, gpu.layout, "uint4", "zero, offset"),
    "tpu": lambda lead, axis: packed(lead, axis, tpu.layout),
    "mixed": mixed,
    "mixed, cpu": lambda lead, axis: mixed(lead, axis, prepared=True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the kernels for GPU and TPU in interpret mode."""
    for module in (gpu, tpu):
        compiled = module.matmul
        monkeypatch.setattr(module, "matmul", lambda x, weight, call=compiled: call(x, weight, interpret=True))
    yield


def product(x: jax.Array, weight: Any, index: Any, axis: int) -> np.ndarray:
    """Runs the compiled product; returns it in float64."""
    compiled = jax.jit(
        lambda x, weight, index: quant.product(x, weight, index, axis=axis, dtype=jnp.float32), compiler_options=QUICK
    )
    return np.asarray(compiled(x, weight, index), np.float64)


def check(got: np.ndarray, x: Any, dense_XKM: np.ndarray, index: Any) -> None:
    """Asserts agreement within the rounding of float32 sums, whose factors are up to 2**9 times the weight."""
    x = np.asarray(x, np.float64)
    expected = (x[..., None, :] @ dense_XKM[np.asarray(index)])[..., 0, :]
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=2e-5 * max(1, np.abs(dense_XKM).max()) * np.sqrt(K))


def rows(*shape: int, seed: int = 5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, K)), jnp.float32)


def numbers(count: int, matrices: int, how: str) -> np.ndarray:
    """Returns a matrix index for each of `count` rows."""
    index = np.random.default_rng(count).integers(0, matrices, count).astype(np.int32)
    if how == "skewed":  # one matrix has most rows, some have none
        index[np.arange(count) % 8 != 0] = matrices // 2
    return {"one": np.full(count, matrices - 1, np.int32), "sorted": np.sort(index)}.get(how, index)


@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("kind", ["array", "int4, plain", "cpu", "gpu", "tpu"])
def test_a_matrix_needs_no_number(kind: str, axis: int) -> None:
    weight, dense_XKM, axis = KINDS[kind]((), axis)
    x = rows(2, 3)
    check(product(x, weight, None, axis), x, dense_XKM, np.zeros((2, 3), int))
    check(product(x, weight, 0, axis), x, dense_XKM, np.zeros((2, 3), int))
    check(product(x, weight, np.full((2, 3), 7), axis), x, dense_XKM, np.zeros((2, 3), int))


@pytest.mark.matrix
@pytest.mark.parametrize("lead", [(3,), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_number_for_all_rows(kind: str, lead: tuple[int, ...]) -> None:
    """One index counts over all leading axes, is known at tracing or only at run time, and is clamped to the range."""
    weight, dense_XKM, axis = KINDS[kind](lead, -2 if len(lead) == 1 else -1)
    x, last = rows(2), len(dense_XKM) - 1
    for index, expected in ((0, 0), (last, last), (1, 1), (-1, 0), (99, last)):
        check(product(x, weight, jnp.asarray(index), axis), x, dense_XKM, [expected] * 2)
    for index, expected in ((1, 1), (-2, 0)):
        check(np.asarray(quant.product(x, weight, index, axis=axis), np.float64), x, dense_XKM, [expected] * 2)


@pytest.mark.matrix
@pytest.mark.parametrize("lead", [(3,), (11,), (2, 2)])
@pytest.mark.parametrize("how", ["any", "sorted", "one", "skewed"])
@pytest.mark.parametrize("count", [1, 3, 16, 17, 100])
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_for_each_row(kind: str, axis: int, count: int, how: str, lead: tuple[int, ...]) -> None:
    weight, dense_XKM, axis = KINDS[kind](lead, axis)
    x, index = rows(count), numbers(count, len(dense_XKM), how)
    check(product(x, weight, index, axis), x, dense_XKM, index)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_by_row(kind: str) -> None:
    """A case of each kind that always runs: rows of several axes, indices out of range, and no rows at all."""
    weight, dense_XKM, axis = KINDS[kind]((3,), -2)
    index = np.asarray([[0, 2, 1], [-1, 3, -(2**31)]], np.int32)
    check(product(rows(2, 3), weight, index, axis), rows(2, 3), dense_XKM, [[0, 2, 1], [0, 2, 0]])
    index = numbers(40, 3, "any")
    check(product(rows(40), weight, index, axis), rows(40), dense_XKM, index)
    assert product(rows(0), weight, np.zeros(0, np.int32), axis).shape == (0, M)


def test_bfloat16_is_rounded_once() -> None:
    weight, dense_XKM, _ = packed((3,), -2, cpu.layout)
    x, index = rows(20).astype(jnp.bfloat16), numbers(20, 3, "any")
    y = quant.product(x, weight, jnp.asarray(index))
    assert y.dtype == jnp.bfloat16
    expected = (np.asarray(x, np.float64)[:, None] @ dense_XKM[index])[:, 0]
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-3)


@pytest.mark.matrix
@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("kind", ["array", "int4, plain", "cpu", "gpu", "tpu", "mixed", "mixed, cpu"])
def test_experts_of_a_layer_in_a_scan(kind: str, count: int) -> None:
    """In a scan, each layer is a slice or a view of the stack, and its experts are numbered from 0."""
    weight, dense_XKM, _ = KINDS[kind]((2, 3), -2)
    x, index_LR = rows(count), np.stack([numbers(count, 3, "any"), numbers(count, 3, "sorted")])

    def step(carry: jax.Array, layer: Any, place: jax.Array, index_R: jax.Array) -> tuple[jax.Array, jax.Array]:
        assert layer.shape == (3, K, M)
        return carry, quant.product(x, layer, index_R)

    scan = jax.jit(lambda weight, index: quant.scan_layers(step, x[:1], weight, index)[1], compiler_options=QUICK)
    for layer, got in enumerate(np.asarray(scan(weight, index_LR), np.float64)):
        check(got, x, dense_XKM[3 * layer : 3 * layer + 3], index_LR[layer])
    # An index beyond a layer's range does not select an expert of the next layer.
    beyond = jax.jit(lambda weight: quant.scan_layers(step, x[:1], weight, np.full((2, count), 5))[1])(weight)
    for layer in range(2):
        check(np.asarray(beyond[layer], np.float64), x, dense_XKM, np.full(count, 3 * layer + 2))


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("kind", ["array", "uint4, zero, offset", "cpu", "mixed"])
def test_gradients_of_activations(kind: str, count: int) -> None:
    weight, dense_XKM, _ = KINDS[kind]((3,), -2)
    index, out = numbers(count, 3, "any"), np.random.default_rng(9).normal(size=(count, M))
    loss = lambda x: jnp.sum(quant.product(x, weight, index) * jnp.asarray(out, jnp.float32))  # noqa: E731
    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(rows(count))
    expected = (dense_XKM[index] @ out[..., None])[..., 0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4 * np.abs(dense_XKM).max())


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("axis", [-2, -1])
def test_gradients_of_arrays(axis: int, count: int) -> None:
    """Each matrix gets the gradient of its rows; a matrix without rows gets zeros."""
    weight, dense_XKM, _ = floats((4,), axis)
    index, out = numbers(count, 3, "any"), np.random.default_rng(9).normal(size=(count, M))

    def loss(weight: jax.Array) -> jax.Array:
        return jnp.sum(quant.product(rows(count), weight, index, axis=axis) * jnp.asarray(out, jnp.float32))

    gradient = np.asarray(jax.jit(jax.grad(loss), compiler_options=QUICK)(weight))
    expected_XKM = np.zeros_like(dense_XKM)
    for row, number in enumerate(index):
        expected_XKM[number] += np.outer(np.asarray(rows(count))[row], out[row])
    assert not expected_XKM[3].any()
    np.testing.assert_allclose(gradient if axis == -2 else gradient.swapaxes(1, 2), expected_XKM, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [4, 40])
@pytest.mark.parametrize("gradient", [False, True])
def test_no_copy_of_the_matrices(gradient: bool, count: int) -> None:
    """Matrices in use are not copied, and a gradient does not hold a matrix of floats per row or block."""
    tiled = jax.eval_shape(lambda: cpu.layout(quant.quantize_rtn(jnp.ones((8, 512, 512)), "int4", group_size=32)))
    total = lambda x, weight, index: jnp.sum(quant.product(x, weight, index))  # noqa: E731
    function = jax.grad(total) if gradient else quant.product
    x, index = jax.ShapeDtypeStruct((count, 512), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.int32)
    memory = jax.jit(function).lower(x, tiled, index).compile().memory_analysis()
    one_in_floats = 512 * 512 * 4
    # Products unpack a block of 16 outputs at a time, gradients a matrix; all blocks at once would take 13 or 20.
    assert memory.temp_size_in_bytes < one_in_floats * (4 if gradient else 1 if count > 16 else 1 / 8)


def test_errors() -> None:
    qtensor, array = made((3,), -2), jnp.ones((3, K, M))
    for weight in (qtensor, array, cpu.layout(qtensor), mixed((3,), -2).weight):
        expected = r"a weight of shape \(3, 128, 24\) without an index: expected one number, or one for each row"
        with pytest.raises(ValueError, match=expected):
            quant.product(rows(2), weight)
        for index in (np.zeros(3, int), np.zeros((2, 1), int), np.zeros(1, int)):
            shape = r"\(" + ", ".join(map(str, index.shape)) + r",?\)"
            with pytest.raises(
                ValueError, match=rf"an index of shape {shape} for rows \(2,\): expected one number for"
            ):
                quant.product(rows(2), weight, index)
        with pytest.raises(
            ValueError, match=r"activations of shape \(2, 24\) times .* \(3, 128, 24\): expected \[.*128\]"
        ):
            quant.product(jnp.ones((2, M)), weight, 0)
    for weight in (qtensor, cpu.layout(qtensor)):
        with pytest.raises(ValueError, match="along axis -1: expected -2, the weight"):
            quant.product(jnp.ones((2, M)), weight, 0, axis=-1)


def test_activations_are_rounded_by_row() -> None:
    """Activations are rounded as the weight's `activations` says; NumPy computes the expected int8 per token."""
    qtensor = dataclasses.replace(made((3,), -2), activations="int8-token")
    x, index = np.asarray(rows(20)), numbers(20, 3, "any")
    scale = np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127)
    rounded = np.round(x / scale).astype(np.float64) * scale
    for weight in (qtensor, cpu.layout(qtensor)):
        got = product(jnp.asarray(x), weight, index, -2)
        expected = (rounded[:, None] @ decode(qtensor)[index])[:, 0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)
