"""QTensor: it behaves as the array it stands for, refuses what does not fit, and holds ggml's blocks without loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import quant
from quant import QTensor, Scheme

GROUP = 8
OUTLIERS = 3


def _made(name: str = "uint6", shape: tuple[int, ...] = (3, 32, 4), axis: int = -2, **changes: Any) -> QTensor:
    """Makes the worst case: random codes, every optional array that the scheme can have, and scales in two levels."""
    rng, scheme = np.random.default_rng(5), quant.SCHEMES[name]

    def along(length: int, others: tuple[int, ...] = shape) -> list[int]:
        return [length if i == len(shape) + axis else n for i, n in enumerate(others)]

    groups = along(shape[axis] // GROUP)
    indices = np.broadcast_to(np.arange(shape[axis]).reshape(-1, 1) if axis == -2 else np.arange(shape[axis]), shape)
    parts = {"scale": jnp.asarray(rng.normal(size=groups), jnp.float32)}
    if scheme.kind == "uint":
        parts["zero"] = jnp.asarray(rng.integers(0, 2**scheme.bits, groups, np.uint8))
        parts["offset"] = QTensor.from_codes(
            jnp.asarray(rng.integers(0, 64, groups, np.uint8)),
            jnp.asarray(rng.normal(size=along(1)), jnp.float16),
            Scheme("uint", 6),
            axis=axis,
        )
    order = indices[..., :1] if axis == -2 else indices[..., :1, :]
    parts["order"] = jnp.asarray(rng.permuted(order, axis=axis), jnp.int32)
    parts["outlier"] = jnp.asarray(rng.normal(size=along(OUTLIERS)), jnp.float16)
    chosen = np.take(rng.permuted(order, axis=axis), range(OUTLIERS), axis=axis)
    parts["outlier_index"] = jnp.asarray(chosen, jnp.int32)
    codes = jnp.asarray(rng.integers(0, scheme.max_code + 1, shape, np.uint8))
    return QTensor.from_codes(codes, scheme=scheme, axis=axis, **(parts | changes))


def _dense(qtensor: QTensor) -> np.ndarray:
    return np.asarray(quant.dequantize(qtensor))


def test_looks_like_the_weight() -> None:
    weight = jnp.ones((2, 64, 6), jnp.bfloat16)
    made = quant.quantize_rtn(weight, "int4", group_size=32)
    assert (made.shape, made.ndim, made.size, made.dtype) == (weight.shape, 3, weight.size, weight.dtype)
    assert made.group_size == 32
    assert made.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(made)) == 2 * 6 * (32 + 2 * 2)
    assert made.bits_per_weight == 4.5
    table = quant.quantize_rtn(jnp.ones((6, 64)), "int3", group_size=16, axis=-1, scale_dtype="float32")
    assert (table.shape, table.group_size, table.bits_per_weight) == ((6, 64), 16, 5.0)


def test_every_leaf_has_the_rank_of_the_weight() -> None:
    for shape, axis in [((3, 64, 4), -2), ((4, 64), -1)]:
        made = _made(shape=shape, axis=axis, scale=jnp.ones((*shape[:-2], 1, 1)), zero=None, offset=None)
        assert {leaf.ndim for leaf in jax.tree.leaves([made, _made(shape=shape, axis=axis)])} == {len(shape)}


@pytest.mark.parametrize("index", [1, -1, slice(1, 3), np.int64(2), (2,), np.array([2, 0])])
def test_indexing_is_that_of_the_weight(index: Any) -> None:
    made = _made()
    np.testing.assert_array_equal(_dense(made[index].validate()), _dense(made)[index])


def test_indexing_two_leading_axes_and_by_a_traced_index() -> None:
    made = _made(shape=(2, 3, 32, 4))
    np.testing.assert_array_equal(_dense(made[1, 2]), _dense(made)[1, 2])
    np.testing.assert_array_equal(_dense(made[:, 1]), _dense(made)[:, 1])
    # Compiled code may round a product and a sum once.
    np.testing.assert_allclose(jax.jit(lambda q, i: quant.dequantize(q[i]))(made, 1), _dense(made)[1], rtol=1e-5)
    assert len([layer.shape for layer in made]) == 2


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (3, r"index 3 is out of range for an axis of 3"),
        (-4, r"index -4 is out of range"),
        ((0, 0), r"2 indices: shape \(3, 32, 4\) has 1 leading axes"),
        (..., "index Ellipsis: expected integers"),
        (None, "index None: expected integers"),
    ],
)
def test_indexing_errors(index: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        _made()[index]


def test_jit_scan_and_vmap_see_layers() -> None:
    made = _made(shape=(3, 32, 32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32)), jnp.float32)

    @jax.jit
    def scanned(x: jax.Array, made: QTensor) -> jax.Array:
        return jax.lax.scan(lambda x, layer: (quant.product(x, layer) * 1e-3, None), x, made)[0]

    expected = np.asarray(x, np.float64)
    for layer in _dense(made).astype(np.float64):
        expected = expected @ layer * 1e-3
    np.testing.assert_allclose(scanned(x, made), expected, rtol=1e-5, atol=1e-6)
    each = jax.vmap(lambda layer: quant.product(x, layer))(made)
    np.testing.assert_allclose(each, np.asarray(x) @ _dense(made), rtol=1e-4, atol=1e-4)


def test_compiled_and_operation_by_operation_agree() -> None:
    for name in ("int5", "uint3", "nf4", "mxfp4", "nvfp4", "iq4_nl", "ternary"):
        scale = jnp.full((3, 4, 4), 120, jnp.uint8) if name in ("mxfp4", "nvfp4") else jnp.full((3, 4, 4), 0.3)
        made = _made(name, scale=scale, **({"offset": None} if "uint" in name else {}))
        with jax.disable_jit():
            eager = quant.dequantize(made)
        np.testing.assert_array_equal(jax.jit(quant.dequantize)(made), eager)


def test_gradients() -> None:
    """Gradients of the activations and of the float planes equal those of the formula, in NumPy."""
    made = _made("uint4", (32, 4), order=None, outlier=None, outlier_index=None)
    rng = np.random.default_rng(0)
    x, out = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 32), (2, 4)))

    def loss(x: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(quant.product(x, dataclasses.replace(made, scale=scale)) * out)

    by_x, by_scale = jax.grad(loss, argnums=(0, 1))(x, made.scale)
    np.testing.assert_allclose(by_x, out @ _dense(made).T, rtol=1e-5, atol=1e-4)
    codes = np.asarray(quant.unpack(made.planes, 4, GROUP), np.float32).reshape(4, GROUP, 4)
    by_weight = np.asarray(x.T @ out).reshape(4, GROUP, 4)
    expected = np.sum((codes - np.asarray(made.zero, np.float32)[:, None]) * by_weight, axis=1)
    np.testing.assert_allclose(by_scale, expected, rtol=1e-5, atol=1e-4)


def test_abstract_and_other_leaves() -> None:
    abstract = jax.eval_shape(lambda w: quant.quantize_rtn(w, "uint3", group_size=16), jnp.ones((2, 64, 4)))
    assert abstract.validate().shape == (2, 64, 4) and abstract.bits_per_weight == 3 + 24 / 16
    real = quant.quantize_rtn(jnp.ones((2, 64, 4)), "uint3", group_size=16)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    for placeholder in (True, None, "name", object()):
        flags = jax.tree.map(lambda _, value=placeholder: value, real)
        assert isinstance(flags, QTensor) and flags.scheme == real.scheme


def test_paths_name_the_arrays_as_the_format_does() -> None:
    named = jax.tree_util.tree_flatten_with_path(_made("uint6"))[0]
    paths = {jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in named}
    nested = {"offset.planes.0", "offset.planes.1", "offset.scale"}
    assert paths == {"planes.0", "planes.1", "scale", "zero", "order", "outlier", "outlier_index"} | nested


def test_one_partition_spec_fits_every_leaf() -> None:
    made = _made(shape=(3, 64, 4))
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    sharding = NamedSharding(mesh, PartitionSpec(None, "data", "model"))
    placed = jax.device_put(made, sharding)
    assert {leaf.sharding for leaf in jax.tree.leaves(placed)} == {sharding}
    product = jax.jit(lambda x, q, n: quant.product(x, q, n), in_shardings=(None, sharding, None))
    x = jnp.ones((2, 64))
    for number, expected in enumerate(np.asarray(x) @ _dense(made)):
        np.testing.assert_allclose(product(x, placed, number), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product_is_that_of_the_values(dtype: str) -> None:
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 5, 32)), dtype)
    weight, table = _made("int5", (32, 6)), _made("int5", (6, 32), -1)
    for made, weight_KM in [(weight, _dense(weight)), (table, _dense(table).T)]:
        expected = np.asarray(x, np.float64) @ weight_KM.astype(np.float64)
        got = quant.product(x, made, axis=made.axis, dtype=jnp.float32)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
        assert quant.product(x, made, axis=made.axis).dtype == x.dtype


@pytest.mark.parametrize("scale", ["groups", "tensor"])
def test_rows(scale: str) -> None:
    changes = {} if scale == "groups" else {"scale": jnp.full((1, 1), 0.5), "zero": None, "offset": None}
    table = _made("uint6", (10, 32), -1, dtype=jnp.bfloat16, **changes)
    ids = jnp.array([[0, 9, 3], [-1, -10, 10], [-11, 5, 5]])
    dense = quant.dequantize(table)
    rows = jax.jit(quant.rows)(table, ids)
    assert rows.dtype == jnp.float32  # whatever the dtype of the weight that the table stands for
    np.testing.assert_array_equal(rows, quant.rows(dense, ids))
    assert jnp.isnan(rows).any(-1).tolist() == [[False] * 3, [False, False, True], [True, False, False]]
    np.testing.assert_array_equal(quant.rows(table, 3), dense[3])
    single = _made("uint6", (1, 32), -1, **changes)
    np.testing.assert_array_equal(quant.rows(single, jnp.zeros(4, int)), np.repeat(_dense(single), 4, 0))


def test_rows_dequantizes_only_those() -> None:
    table = _made("int4", (1000, 32), -1)
    jaxpr = jax.make_jaxpr(quant.rows)(table, jnp.arange(2))
    floats = [out.aval for eqn in jaxpr.eqns for out in eqn.outvars if out.aval.dtype == jnp.float32]
    assert floats and all(aval.size <= 2 * 32 for aval in floats)


def _turned(shape: tuple[int, ...]) -> QTensor:
    """Makes scales in codes whose own scales lie along the last axis."""
    return QTensor.from_codes(jnp.ones(shape, jnp.uint8), jnp.ones((*shape[:-1], 1)), Scheme("uint", 6), axis=-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _made(scale=jnp.ones((3, 5, 4))), "5 groups do not divide a contraction axis of 32"),
        (lambda: _made(scale=jnp.ones((4, 4))), r"scale plane of shape \(4, 4\): expected \(3, 'C', 4\)"),
        (lambda: _made(scale=jnp.ones((3, 4, 1))), r"scale plane of shape \(3, 4, 1\): .* or \(3, 1, 1\)"),
        (lambda: _made(scale=jnp.ones((3, 4, 4), int)), "scale plane of dtype int32: expected float32 or bfloat16"),
        (lambda: _made("mxfp4", scale=jnp.ones((3, 4, 4))), "scale plane of dtype float32: expected uint8"),
        (lambda: _made(zero=jnp.ones((3, 1, 4))), r"zero plane of shape \(3, 1, 4\): expected \(3, 4, 4\)"),
        (lambda: _made("int4", zero=jnp.ones((3, 4, 4))), "zero plane beside int4 codes: only uint"),
        (lambda: _made("nf4", offset=jnp.ones((3, 4, 4))), "offset plane beside nf4 codes"),
        (lambda: _made(offset=jnp.ones((3, 4, 4), jnp.uint8)), "offset plane of dtype uint8"),
        (lambda: _made(offset=_turned((3, 4, 8))), r"offset plane of shape \(3, 4, 8\): expected \(3, 4, 4\)"),
        (lambda: _made(offset=_turned((3, 4, 4))), "offset plane with contraction axis -1: expected -2, the weight's"),
        (lambda: _made(order=jnp.ones((3, 32), jnp.int32)), r"order plane of shape \(3, 32\): expected \(3, 32, 1\)"),
        (lambda: _made(outlier=None), "one of outlier and outlier_index is None: expected both or neither"),
        (lambda: _made(outlier_index=None), "one of outlier and outlier_index is None"),
        (lambda: _made(outlier=jnp.ones((3, 0, 4))), "0 outlier channels: expected 1 to 32, or None for both"),
        (lambda: _made(outlier=jnp.ones((3, 33, 4))), "33 outlier channels: expected 1 to 32"),
        (lambda: _made(outlier=jnp.ones(4)), r"shape \(4,\) has no axis -2"),
        (lambda: _made(outlier=jnp.ones((3, 3, 5))), r"outlier plane of shape \(3, 3, 5\): expected \(3, 3, 4\)"),
        (lambda: _made(outlier=jnp.ones((3, 3, 4), jnp.int8)), "outlier plane of dtype int8: expected float32 or bfl"),
        (lambda: _made(outlier=jnp.ones((3, 2, 4))), r"outlier_index plane of shape \(3, 3, 1\): expected \(3, 2, 1\)"),
        (lambda: _made(outlier_index=jnp.ones((3, 3, 1))), "outlier_index plane of dtype float32: expected int32"),
        (
            lambda: _made(shape=(4, 32), axis=-1, outlier_index=jnp.ones((3, 1), jnp.int32)),
            r"outlier_index plane of shape \(3, 1\): expected \(1, 3\)",
        ),
        (lambda: _made(zero=_turned((3, 4, 4))), "zero plane is a QTensor: only scale and offset may"),
        (lambda: _made(activations="int8"), "activations 'int8': expected None or 'bfloat16' or 'int8-token'"),
        (lambda: _made(activations="int8-group"), "activations 'int8-group' beside an order"),
        (lambda: _made(dtype=jnp.int8), "dtype int8: expected a float type"),
        (lambda: Scheme("int", 9), "no scheme 'int' with 9 bits: expected one of int8, int7"),
        (lambda: Scheme("fp", 4), "no scheme 'fp' with 4 bits"),
        (lambda: Scheme("nf4", 8), "no scheme 'nf4' with 8 bits"),
        (lambda: Scheme.named("q4"), "no scheme 'q4': expected one of int8"),
        (lambda: quant.rows(_made(shape=(32, 4)), jnp.arange(2)), r"quantized along axis -2: expected \[V, D\]"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ggml's blocks, after the C structs in ggml-common.h and the loops in ggml-quants.c; bytes are [rows, blocks, bytes].


def _half(bytes_: np.ndarray) -> jax.Array:
    return jnp.asarray(np.ascontiguousarray(bytes_).view(np.float16)[..., 0])


def _whole_bytes(name: str, bytes_: np.ndarray, scale: jax.Array, offset: jax.Array | None = None) -> QTensor:
    """Makes a QTensor of a type whose bytes we store unchanged."""
    plane = jnp.asarray(bytes_.reshape(len(bytes_), -1))
    return QTensor((plane,), scale, offset=offset, scheme=quant.SCHEMES[name], axis=-1).validate()


def _codes(name: str, codes: np.ndarray, scale: Any, offset: Any = None) -> QTensor:
    """Makes a QTensor of codes [rows, ..., elements in order]."""
    flat = jnp.asarray(codes.reshape(len(codes), -1), jnp.uint8)
    return QTensor.from_codes(flat, scale, quant.SCHEMES[name], offset=offset, axis=-1)


def _q5(block: np.ndarray, start: int) -> np.ndarray:
    high = np.ascontiguousarray(block[..., start : start + 4]).view(np.uint32)
    low = np.concatenate([block[..., start + 4 :] & 15, block[..., start + 4 :] >> 4], -1)
    return low | (high >> np.arange(32, dtype=np.uint32) & 1).astype(np.uint8) << 4


def _k_scales(block: np.ndarray) -> tuple[QTensor, QTensor]:
    """Unpacks 8 scales and 8 minima of 6 bits from 12 bytes, as ggml's `get_scale_min_k4` does."""
    q = block[..., 4:16]
    scales, minima = [], []
    for j in range(8):
        if j < 4:
            scales.append(q[..., j] & 63)
            minima.append(q[..., j + 4] & 63)
        else:
            scales.append((q[..., j + 4] & 15) | (q[..., j - 4] >> 6) << 4)
            minima.append((q[..., j + 4] >> 4) | (q[..., j] >> 6) << 4)
    scale = _codes("uint6", np.stack(scales, -1), _half(block[..., :2]))
    return scale, _codes("uint6", np.stack(minima, -1), -_half(block[..., 2:4]))


def _nibble_groups(qs: np.ndarray) -> np.ndarray:
    """Unpacks [..., 128] bytes to [..., 8, 32]: 32 bytes hold one group in their low halves, the next in the high."""
    runs = qs.reshape(*qs.shape[:-1], 4, 1, 32)
    return (runs >> np.array([[0], [4]], np.uint8) & 15).reshape(*qs.shape[:-1], 8, 32)


def _q5_k(block: np.ndarray) -> QTensor:
    high = block[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _codes("uint5", _nibble_groups(block[..., 48:]) | high << 4, *_k_scales(block))


def _q6_k(block: np.ndarray) -> QTensor:
    parts = []
    for half in (0, 1):
        ql, qh = block[..., 64 * half :][..., :64], block[..., 128 + 32 * half :][..., :32]
        for l_shift, first, h_shift in [(0, 0, 0), (0, 32, 2), (4, 0, 4), (4, 32, 6)]:
            parts.append((ql[..., first : first + 32] >> l_shift & 15) | (qh >> h_shift & 3) << 4)
    scale = _codes("int8", block[..., 192:208] ^ 0x80, _half(block[..., 208:]))
    return _codes("int6", np.concatenate(parts, -1), scale)


def _tq2_0(block: np.ndarray) -> QTensor:
    runs = block[..., :64].reshape(*block.shape[:-1], 2, 1, 32)
    return _codes("ternary", runs >> np.array([[0], [2], [4], [6]], np.uint8) & 3, _half(block[..., 64:]))


REPACK: dict[str, Callable[[np.ndarray], QTensor]] = {
    "Q4_0": lambda block: _whole_bytes("int4", block[..., 2:], _half(block[..., :2])),
    "Q4_1": lambda block: _whole_bytes("uint4", block[..., 4:], _half(block[..., :2]), _half(block[..., 2:4])),
    "Q5_0": lambda block: _codes("int5", _q5(block, 2), _half(block[..., :2])),
    "Q5_1": lambda block: _codes("uint5", _q5(block, 4), _half(block[..., :2]), _half(block[..., 2:4])),
    "Q8_0": lambda block: _whole_bytes("int8", block[..., 2:] ^ 0x80, _half(block[..., :2])),
    "Q4_K": lambda block: _codes("uint4", _nibble_groups(block[..., 16:]), *_k_scales(block)),
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "TQ2_0": _tq2_0,
    "MXFP4": lambda block: _whole_bytes("mxfp4", block[..., 1:], jnp.asarray(block[..., 0])),
    "NVFP4": lambda block: _whole_bytes("nvfp4", block[..., 4:], jnp.asarray(block[..., :4].reshape(len(block), -1))),
    "IQ4_NL": lambda block: _whole_bytes("iq4_nl", block[..., 2:], _half(block[..., :2])),
}
# Offsets of the float16 scales in a block, for the types that gguf reads but does not write.
SCALES_AT = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "NVFP4": ()}


@pytest.mark.parametrize("name", REPACK)
def test_ggml_blocks_without_loss(name: str) -> None:
    """Repacked blocks have the gguf package's dequantized values bit for bit, in the same number of bytes."""
    gguf = pytest.importorskip("gguf", reason="compares with the gguf package: pip install gguf")
    rng, kind = np.random.default_rng(11), gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    if name in SCALES_AT:
        data = rng.integers(0, 256, (6, 3, size), np.uint8)
        for at in SCALES_AT[name]:
            scales = rng.normal(size=(6, 3, 1)) * 10 ** rng.uniform(-6, 0, (6, 3, 1))
            data[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
        if name == "NVFP4":
            data[..., :4] &= 127  # scales have no sign
        data = data.reshape(6, -1)
    else:
        weight = rng.normal(size=(6, 3 * elements)) * 10 ** rng.uniform(-4, 0, (6, 1))
        data = gguf.quants.quantize(weight.astype(np.float32), kind)
    expected = gguf.quants.dequantize(data, kind)
    made = REPACK[name](data.reshape(6, -1, size))
    assert made.shape == expected.shape and made.nbytes == data.nbytes
    if name in ("MXFP4", "NVFP4"):  # ggml has no -0
        np.testing.assert_array_equal(_dense(made), expected)
    else:
        np.testing.assert_array_equal(_dense(made).view(np.uint32), expected.view(np.uint32))
        np.testing.assert_array_equal(
            np.asarray(jax.jit(quant.dequantize)(made)).view(np.uint32), expected.view(np.uint32)
        )
