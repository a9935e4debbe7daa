"""Packing: FORMAT.md's bytes, by hand and by a decoder written from its text; round trips; the lowered programs."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quant
from quant.packing import PLANE_BITS, unpack_runs

_thorough = settings(max_examples=30, deadline=None, derandomize=True)

# Worked out by hand from FORMAT.md for one group of one output: bits, codes, bytes of each plane.
GOLDEN = [
    (8, [0, 1, 128, 255], ["0001 80ff"]),
    (7, [0, 127, 64, 16, 15, 85, 42, 33], ["f0 5f a0 10", "80 97", "26"]),
    (6, [5, 63, 16, 42], ["05 af", "9c"]),
    (5, [0, 31, 16, 15, 1, 2, 17, 30], ["10 2f 10 ef", "c6"]),
    (4, [1, 2, 3, 4], ["31 42"]),
    (3, [0, 1, 2, 3, 4, 5, 6, 7], ["88 dd", "f0"]),
    (2, [3, 0, 2, 1], ["63"]),
]
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


def decode(arrays: dict[str, np.ndarray], scheme: str, axis: int) -> np.ndarray:
    """Decodes a weight with one level of scales to float32, from FORMAT.md's text and with NumPy alone."""
    if axis == -1:
        return np.swapaxes(decode({k: np.swapaxes(v, -1, -2) for k, v in arrays.items()}, scheme, -2), -1, -2)
    kind, bits = (scheme.rstrip("0123456789"), int(scheme[-1])) if "int" in scheme else (scheme, 4)
    bits = 2 if kind == "ternary" else bits
    widths = {8: [8], 7: [4, 2, 1], 6: [4, 2], 5: [4, 1], 4: [4], 3: [2, 1], 2: [2]}[bits]
    K = arrays["planes.0"].shape[-2] * 8 // widths[0]
    C = arrays["scale"].shape[-2]
    g = K // C
    code = np.zeros((*arrays["planes.0"].shape[:-2], K, arrays["planes.0"].shape[-1]), int)
    for number, p in enumerate(widths):
        n = g * p // 8
        for k in range(K):
            c, element = divmod(k, g)
            byte = arrays[f"planes.{number}"][..., c * n + element % n, :].astype(int)
            code[..., k, :] += (byte >> (element // n * p)) % 2**p << sum(widths[:number])
    if kind == "nf4":
        value = np.array(NF4)[code]
    elif kind == "iq4_nl":
        value = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])[code]
    elif kind in ("mxfp4", "nvfp4"):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = np.where(exponent == 0, mantissa / 2, (1 + mantissa / 2) * 2.0 ** (exponent - 1))
        value = np.where(code & 8, -magnitude, magnitude)
    else:
        value = code - {"int": 2 ** (bits - 1), "uint": 0, "ternary": 1}[kind]
    planes = {k: np.repeat(v, g, -2).astype(np.float32) for k, v in arrays.items() if k in ("scale", "zero", "offset")}
    scale = np.exp2(planes["scale"] - np.float32(127)) if kind == "mxfp4" else planes["scale"]
    if kind == "nvfp4" and arrays["scale"].dtype == np.uint8:
        exponent, mantissa = np.floor(scale / 8), scale % 8 / 8
        scale = np.where(exponent == 0, mantissa * 2**-6, (1 + mantissa) * 2 ** (exponent - 7)).astype(np.float32)
    weight = (value.astype(np.float32) - planes.get("zero", np.float32(0))) * scale + planes.get(
        "offset", np.float32(0)
    )
    if "order" in arrays:
        stored, weight = weight, np.empty_like(weight)
        np.put_along_axis(weight, np.broadcast_to(arrays["order"], weight.shape), stored, -2)
    return weight


def arrays_of(qtensor: quant.QTensor) -> dict[str, np.ndarray]:
    """Returns the arrays of a QTensor, named as in FORMAT.md."""
    named = {f"planes.{i}": plane for i, plane in enumerate(qtensor.planes)}
    named |= {name: getattr(qtensor, name) for name in ("scale", "zero", "offset", "order")}
    return {name: np.asarray(array) for name, array in named.items() if array is not None}


@pytest.mark.parametrize(("bits", "codes", "expected"), GOLDEN, ids=[f"{bits} bits" for bits, *_ in GOLDEN])
def test_golden_bytes(bits: int, codes: list[int], expected: list[str]) -> None:
    planes = quant.pack(jnp.array(codes, jnp.uint8)[:, None], bits, len(codes))
    assert [np.asarray(plane).tobytes() for plane in planes] == [bytes.fromhex(plane) for plane in expected]
    stored = tuple(jnp.array(list(bytes.fromhex(plane)), jnp.uint8)[:, None] for plane in expected)
    assert quant.unpack(stored, bits, len(codes))[:, 0].tolist() == codes


@pytest.mark.parametrize("axis", [-2, -1])
def test_worked_example(axis: int) -> None:
    turn = (lambda x: x) if axis == -2 else np.transpose
    codes = turn(np.arange(16, dtype=np.uint8).reshape(2, 8).T)
    scale = turn(np.array([[1, 0.5], [2, -0.25]], np.float16))
    made = quant.QTensor.from_codes(jnp.asarray(codes), jnp.asarray(scale), quant.Scheme("int", 4), axis=axis)
    in_memory = "20a8 31b9 64ec 75fd" if axis == -2 else "20316475 a8b9ecfd"
    assert np.asarray(made.planes[0]).tobytes() == bytes.fromhex(in_memory)
    in_memory = "003c 0038 0040 00b4" if axis == -2 else "003c 0040 0038 00b4"
    assert np.asarray(made.scale).tobytes() == bytes.fromhex(in_memory)
    two_levels = quant.QTensor.from_codes(
        turn(jnp.asarray([[160, 144], [192, 120]], jnp.uint8)),
        turn(jnp.full((1, 2), 2.0**-5, jnp.float16)),
        quant.SCHEMES["int8"],
        axis=axis,
    )
    in_memory = "a090 c078" if axis == -2 else "a0c0 9078"
    assert np.asarray(two_levels.planes[0]).tobytes() == bytes.fromhex(in_memory)
    assert np.asarray(two_levels.scale).tobytes() == bytes.fromhex("0028 0028")
    again = quant.QTensor.from_codes(jnp.asarray(codes), two_levels, made.scheme, axis=axis)
    np.testing.assert_array_equal(quant.dequantize(again), quant.dequantize(made))
    rows = [[-8, 0], [-7, 0.5], [-6, 1], [-5, 1.5], [-8, -1], [-6, -1.25], [-4, -1.5], [-2, -1.75]]
    assert quant.dequantize(made).tolist() == turn(np.array(rows)).tolist()


@st.composite
def _packable(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """Draws codes, bits, a group size and an axis."""
    bits = draw(st.sampled_from(sorted(PLANE_BITS)))
    group_size = draw(st.sampled_from([8, 16, 24, 32, 128, 256]))
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = [*lead, draw(st.integers(1, 3)) * group_size, draw(st.integers(1, 5))]
    axis = draw(st.sampled_from([-2, -1]))
    if axis == -1:
        shape[-2:] = shape[:-3:-1]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return rng.integers(0, 2**bits, shape, np.uint8), bits, group_size, axis


@pytest.mark.matrix
@pytest.mark.parametrize("axis", [-2, -1])
@pytest.mark.parametrize("bits", sorted(PLANE_BITS))
def test_other_ways_to_unpack(bits: int, axis: int) -> None:
    """Float arithmetic, and the runs that exported products sum over, unpack to the codes that were packed."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (2, 48, 3), np.uint8)
    codes = codes if axis == -2 else codes.swapaxes(-1, -2)
    planes = quant.pack(jnp.asarray(codes), bits, 16, axis=axis)
    np.testing.assert_array_equal(quant.unpack(planes, bits, 16, axis=axis, arithmetic="float"), codes)
    grouped = codes.reshape(2, 3, 16, 3) if axis == -2 else codes.reshape(2, 3, 3, 16)
    for arithmetic in ("integer", "float"):
        runs = unpack_runs(planes, bits, 16, axis=axis, arithmetic=arithmetic)
        assert len({run.shape for run in runs}) == 1 and len(runs) == 8 // min(PLANE_BITS[bits])
        np.testing.assert_array_equal(np.concatenate(runs, axis), grouped)


@_thorough
@given(_packable())
def test_round_trip_and_the_independent_decoder(case: tuple[np.ndarray, int, int, int]) -> None:
    codes, bits, group_size, axis = case
    planes = quant.pack(jnp.asarray(codes), bits, group_size, axis=axis)
    assert sum(plane.nbytes for plane in planes) * 8 == codes.size * bits
    np.testing.assert_array_equal(quant.unpack(planes, bits, group_size, axis=axis), codes)
    scale_shape = list(codes.shape)
    scale_shape[axis] //= group_size
    arrays = {f"planes.{i}": np.asarray(plane) for i, plane in enumerate(planes)}
    decoded = decode(arrays | {"scale": np.ones(scale_shape, np.float32)}, f"uint{bits}", axis)
    np.testing.assert_array_equal(decoded, codes)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("name", "axis", "scale_dtype"),
    [*((name, axis, "bfloat16") for name in quant.SCHEMES for axis in (-2, -1))]
    + [("int4", -2, "float32"), ("uint5", -1, "float16")],
)
def test_the_independent_decoder_agrees_on_values(name: str, axis: int, scale_dtype: str) -> None:
    """Each scheme, with all optional planes it can have, agrees bit for bit: operations are in the same order."""
    rng, scheme = np.random.default_rng(3), quant.SCHEMES[name]
    codes = rng.integers(0, scheme.max_code + 1, (2, 32, 5), np.uint8)
    scale = rng.normal(size=(2, 4, 5)).astype(ml_dtypes.bfloat16 if scale_dtype == "bfloat16" else scale_dtype)
    optional = {"order": np.stack([rng.permutation(32) for _ in range(2)])[..., None].astype(np.int32)}
    if scheme.kind == "mxfp4":
        scale = rng.integers(100, 150, scale.shape, np.uint8)
    if scheme.kind == "nvfp4":
        scale = rng.integers(0, 127, scale.shape, np.uint8)
    if scheme.kind == "uint":
        optional["zero"] = rng.integers(0, 2**scheme.bits, scale.shape, np.uint8)
    turn = (lambda x: x) if axis == -2 else (lambda x: np.swapaxes(x, -1, -2))
    optional = {key: jnp.asarray(turn(value)) for key, value in optional.items()}
    made = quant.QTensor.from_codes(jnp.asarray(turn(codes)), jnp.asarray(turn(scale)), scheme, axis=axis, **optional)
    np.testing.assert_array_equal(quant.dequantize(made), decode(arrays_of(made), name, axis))


@pytest.mark.parametrize("case", ["float zero", "offset", "zero and offset", "per tensor", "per channel"])
def test_the_independent_decoder_agrees_on_optional_planes(case: str) -> None:
    rng = np.random.default_rng(4)
    codes = jnp.asarray(rng.integers(0, 8, (16, 3), np.uint8))
    shape = {"per tensor": (1, 1), "per channel": (1, 3)}.get(case, (2, 3))
    scale = jnp.asarray(rng.integers(1, 9, shape), jnp.float32)  # small integers: exact even if fused
    optional = {
        name: jnp.asarray(rng.integers(-9, 9, shape) / 4, jnp.float16) for name in ("zero", "offset") if name in case
    }
    made = quant.QTensor.from_codes(codes, scale, quant.Scheme("uint", 3), **optional)
    arrays = arrays_of(made)
    if case == "per tensor":
        arrays["scale"] = np.broadcast_to(arrays["scale"], (1, 3))
    assert set(optional) <= set(arrays)
    np.testing.assert_array_equal(quant.dequantize(made), decode(arrays, "uint3", -2))


@pytest.mark.parametrize(("bits", "axis"), [(8, -1), (7, -2), (6, -2), (5, -1), (4, -2), (4, -1), (3, -2), (2, -1)])
def test_jit_vmap_and_leading_axes_agree(bits: int, axis: int) -> None:
    codes = jnp.asarray(np.random.default_rng(bits).integers(0, 2**bits, (3, 16, 16), np.uint8))

    def pack(codes):
        return quant.pack(codes, bits, 8, axis=axis)

    def unpack(planes):
        return quant.unpack(planes, bits, 8, axis=axis)

    eager = pack(codes)
    for planes in (jax.jit(pack)(codes), jax.vmap(pack)(codes), jax.jit(jax.vmap(pack))(codes)):
        jax.tree.map(np.testing.assert_array_equal, planes, eager)
    assert (jax.jit(unpack)(eager) == codes).all() and (jax.vmap(unpack)(eager) == codes).all()


@pytest.mark.parametrize("bits", PLANE_BITS)
def test_lowers_to_shifts_and_masks(bits: int) -> None:
    def round_trip(codes):
        return quant.unpack(quant.pack(codes, bits, 32), bits, 32)

    equations = list(_equations(jax.make_jaxpr(round_trip)(jax.ShapeDtypeStruct((64, 8), jnp.uint8)).jaxpr))
    assert {str(equation.primitive) for equation in equations} <= {
        *("shift_right_logical", "shift_left", "and", "or", "mul", "iota"),
        *("reshape", "broadcast_in_dim", "split"),
    }
    assert {str(out.aval.dtype) for equation in equations for out in equation.outvars} == {"uint8"}


def _equations(jaxpr: Any) -> Iterator[Any]:
    """Yields a jaxpr's equations, with those of functions it calls: some versions of JAX do not inline small ones."""
    for equation in jaxpr.eqns:
        inner = equation.params.get("jaxpr")
        if inner is None:
            yield equation
        else:
            yield from _equations(inner.jaxpr)


def _zeros(*shape: int, dtype: jax.typing.DTypeLike = jnp.uint8) -> jax.Array:
    return jnp.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quant.pack(_zeros(32, 1), 9, 32), "codes of 9 bits: expected one of"),
        (lambda: quant.pack(_zeros(32, 1, dtype=jnp.int32), 4, 32), "dtype int32: expected uint8"),
        (lambda: quant.pack(_zeros(48, 1), 4, 32), "groups of 32 do not divide an axis of 48"),
        (lambda: quant.pack(_zeros(48, 1), 4, 0), "groups of 0 do not divide"),
        (lambda: quant.pack(_zeros(12, 1), 3, 12), "12 codes of 3 bits does not fill whole bytes: .* multiple of 8"),
        (lambda: quant.pack(_zeros(32, 1) + 16, 4, 32), "code 16 does not fit 4 bits: expected codes below 16"),
        (lambda: quant.pack(_zeros(32, 1), 4, 32, axis=0), "axis 0: expected -2"),
        (lambda: quant.pack(_zeros(32), 4, 32), r"shape \(32,\) has no axis -2"),
        (lambda: quant.unpack((_zeros(16, 1),), 3, 32), "1 planes for codes of 3 bits: expected 2"),
        (lambda: quant.unpack((_zeros(16, 1, dtype=jnp.int8),), 4, 32), "plane of dtype int8: expected uint8"),
        (lambda: quant.unpack((_zeros(8, 1), _zeros(8, 1)), 3, 32), r"shape \(8, 1\): expected \(4, 1\)"),
        (lambda: quant.unpack((_zeros(8, 1), _zeros(4, 2)), 3, 32), r"shape \(4, 2\): expected \(4, 1\)"),
        (lambda: quant.unpack((_zeros(16, 1),), 4, 24), "groups of 24 do not divide an axis of 32"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
