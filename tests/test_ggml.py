"""ggml's blocks: each type's codes and scales become a weight here and come back, bit for bit."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quant
from quant import QTensor, ggml, kind_of, quantize_hqq, quantize_rtn

gguf = pytest.importorskip("gguf", reason="compares with the gguf package: pip install gguf")

PACKED = [kind for kind in ggml.TYPES.values() if kind.packed is not None]
RETURNING = [kind for kind in PACKED if kind.packed.returns]
# Bits of float16: zeros, the smallest and the largest subnormal, the smallest normal, 1, -1, the largest, not finite.
EDGES = np.array([0, 0x8000, 1, 0x83FF, 0x0400, 0x3C00, 0xBC00, 0x7BFF, 0x7C00, 0x7C01, 0xFE00], "<u2")


def random_blocks(kind: ggml.Type, shape: tuple[int, ...], rng: np.random.Generator, finite: bool) -> np.ndarray:
    """Returns random uint8 [*shape, bytes of 3 blocks]; scales may be zero or subnormal, and not finite if allowed."""
    blocks = rng.integers(0, 256, (*shape, 3, kind.nbytes), np.uint8)
    blocks[..., :1, :] = rng.choice([0, 255, 0x55, 0xAA], blocks[..., :1, :].shape)
    start = 0
    for name, width in kind.packed.fields.items():
        field = blocks[..., start : start + width]
        if name in ("d", "m", "dmin") and width == 2:
            scales = (rng.normal(size=(*shape, 3, 1)) * 10 ** rng.uniform(-7, 1, (*shape, 3, 1))).astype("<f2")
            edges = rng.choice(EDGES[:8] if finite else EDGES, scales.shape)
            field[:] = np.where(rng.random(scales.shape) < 0.4, edges, scales.view("<u2")).view(np.uint8)
        elif name == "d" and finite:  # one byte per scale: exponents and small floats that both sides read as numbers
            field[:] = rng.integers(2, 126, field.shape)
        start += width
    assert start == kind.nbytes
    return blocks.reshape(*shape, -1)


def test_numbers_and_sizes_are_those_of_gguf() -> None:
    theirs = {kind.name: (int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {kind.name: (kind.number, kind.block, kind.nbytes) for kind in ggml.TYPES.values()}
    del (
        theirs["Q8_1"],
        ours["Q8_1"],
    )  # no type of files; gguf counts its two scales as float32, ggml-common.h as float16
    assert ours == theirs


@pytest.mark.parametrize("kind", PACKED, ids=lambda kind: kind.name)
def test_values_are_those_of_gguf(kind: ggml.Type) -> None:
    """Values agree in both orientations; the bytes are no more, except for TQ1_0, whose 1.6 bits become 2."""
    blocks = random_blocks(kind, (6,), np.random.default_rng(1), finite=True)
    weight = ggml.unpack(kind, blocks)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.number))
    expected = expected + np.float32(0)  # ggml's FP4 has no -0
    for made in (quant.dequantize(weight), np.asarray(quant.dequantize(ggml.transposed(weight))).T):
        np.testing.assert_array_equal((np.asarray(made) + np.float32(0)).view(np.uint32), expected.view(np.uint32))
    assert weight.nbytes == blocks.nbytes or kind.name == "TQ1_0"
    assert kind.bits_per_weight == 8 * blocks.nbytes / weight.size


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(RETURNING), st.lists(st.integers(1, 5), min_size=1, max_size=2), st.integers(0, 2**32 - 1))
def test_blocks_come_back_bit_for_bit(kind: ggml.Type, shape: list[int], seed: int) -> None:
    """Holds for any bytes, also NaN and infinite scales, and for any number of rows."""
    blocks = random_blocks(kind, tuple(shape), np.random.default_rng(seed), finite=False)
    before = blocks.copy()
    weight = ggml.unpack(kind, blocks)
    assert kind_of(weight) == kind_of(ggml.abstract(kind, weight.shape))
    assert ggml.type_of(weight) == ggml.type_of(ggml.transposed(weight)) == kind
    found, again = ggml.pack(weight)
    np.testing.assert_array_equal(again, blocks)
    np.testing.assert_array_equal(blocks, before)
    back = ggml.transposed(ggml.transposed(weight))
    assert found == kind and back.axis == -1
    for one, other in zip(jax.tree.leaves(weight), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("kind", RETURNING, ids=lambda kind: kind.name)
def test_more_blocks_than_are_moved_at_once(kind: ggml.Type) -> None:
    rows = 3 * (1 << 18) // kind.nbytes + 5
    blocks = np.random.default_rng(3).integers(0, 256, (rows, kind.nbytes), np.uint8)
    np.testing.assert_array_equal(ggml.pack(ggml.unpack(kind, blocks), kind)[1], blocks)


def test_ternary_of_powers_comes_back_as_tq2_0() -> None:
    codes = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (4, 512)).astype(np.float32) * np.float32(0.75)
    one, two = (gguf.quants.quantize(codes, gguf.GGMLQuantizationType[name]) for name in ("TQ1_0", "TQ2_0"))
    found, blocks = ggml.pack(ggml.unpack("TQ1_0", one))
    assert found.name == "TQ2_0"
    np.testing.assert_array_equal(blocks, two)
    with pytest.raises(ValueError, match="packing to TQ1_0: expected a type that quantized weights can be"):
        ggml.pack(ggml.unpack("TQ1_0", one), "TQ1_0")


@pytest.mark.parametrize("shape", [(1, 1), (130, 700), (2, 65, 513)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, ml_dtypes.bfloat16])
def test_transposed_arrays(shape: tuple[int, ...], dtype: type) -> None:
    x = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    made = ggml.transposed(x)
    assert made.flags.c_contiguous and made.dtype == x.dtype
    np.testing.assert_array_equal(made, np.swapaxes(x, -1, -2))


# ---- Floats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")])
def test_floats_are_views(name: str, dtype: str) -> None:
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.dtype(jnp.dtype(dtype)))
    blocks = x.view(np.uint8)
    made = ggml.floats(name, blocks)
    assert np.shares_memory(made, blocks) and made.dtype == x.dtype
    np.testing.assert_array_equal(made, x)
    assert kind_of(ggml.abstract(name, x.shape)) == kind_of(made)
    assert ggml.type_of(x) == ggml.nearest(x) == ggml.named(name)
    np.testing.assert_array_equal(ggml.pack(x)[1], blocks)


@pytest.mark.parametrize("kind", [k for k in ggml.TYPES.values() if k.dequantized], ids=lambda kind: kind.name)
def test_types_without_a_form_in_codes_become_float32(kind: ggml.Type) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (4, 2 * kind.nbytes), np.uint8)
    made = ggml.floats(kind.number, blocks)
    assert made.shape == (4, 2 * kind.block) and made.dtype == np.float32
    assert kind_of(made) == kind_of(ggml.abstract(kind, made.shape))
    with pytest.raises(ValueError, match=f"blocks of type {kind.name}: expected a type that is kept packed"):
        ggml.unpack(kind, blocks)


def test_one_bit_a_weight() -> None:
    """As `dequantize_row_q1_0` in ggml-quants.c: a set bit k is d, a clear one -d."""
    block = np.concatenate([np.array([-0.5], "<f2").view(np.uint8), np.array([0b101] + [0] * 14 + [128], np.uint8)])
    signs = np.full(128, 0.5, np.float32)
    signs[[0, 2, 127]] = -0.5
    np.testing.assert_array_equal(ggml.floats("Q1_0", block), signs)


def test_what_needs_the_gguf_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match="a tensor of type IQ2_XS needs the gguf package to be read: pip install gguf"):
        ggml.floats("IQ2_XS", np.zeros((1, 74), np.uint8))


# ---- Which type holds a weight --------------------------------------------------------------------------------------


def weight_of(scheme: str, group_size: int | str = 32, length: int = 512, **options) -> QTensor:
    floats = np.random.default_rng(5).normal(size=(length, 8)).astype(np.float32)
    options = {"scale_dtype": "float16"} | options
    return quantize_rtn(floats, scheme, group_size=group_size, **options)


@pytest.mark.parametrize(
    ("scheme", "group_size", "name"),
    [
        *[("int4", 32, "Q4_0"), ("int5", 32, "Q5_0"), ("int8", 32, "Q8_0"), ("iq4_nl", 32, "IQ4_NL")],
        *[("mxfp4", 32, "MXFP4"), ("ternary", 256, "TQ2_0")],
    ],
)
def test_what_our_quantizers_make_is_a_type(scheme: str, group_size: int, name: str) -> None:
    weight = weight_of(scheme, group_size)
    assert ggml.type_of(weight).name == name
    rounding = dataclasses.replace(weight, activations="int8-group", dtype=np.dtype("float16"))
    assert ggml.type_of(rounding).name == name
    kind, blocks = ggml.pack(ggml.transposed(weight))
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(np.asarray(quant.dequantize(weight)).T + np.float32(0), expected + np.float32(0))


@pytest.mark.parametrize("scheme", ["uint4", "uint5"])
@pytest.mark.parametrize("method", [quantize_rtn, quantize_hqq])
def test_zero_points_become_offsets(scheme: str, method) -> None:
    """Rounding -zero * scale to float16 changes a weight by at most half of float16's spacing; the rest is exact."""
    floats = np.random.default_rng(5).normal(size=(512, 8)).astype(np.float32)
    weight = method(floats, scheme, group_size=32, scale_dtype="float16")
    changed = quant.with_offset(weight)
    assert ggml.type_of(weight) is None and changed.zero is None
    assert ggml.type_of(changed).name == {"uint4": "Q4_1", "uint5": "Q5_1"}[scheme]
    before, after = np.asarray(quant.dequantize(weight)), np.asarray(quant.dequantize(changed))
    shift = np.abs(np.asarray(weight.zero, np.float32) * np.asarray(weight.scale, np.float32))
    assert (np.abs(after - before).reshape(16, 32, 8).max(1) <= shift * 2.0**-11 + 2.0**-25).all()
    kind, blocks = ggml.pack(ggml.transposed(changed))
    np.testing.assert_array_equal(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind.name]).T, after)


def test_zero_points_that_float16_has_are_held() -> None:
    """With a scale of few bits, -zero * scale is exact in float16."""
    weight = weight_of("uint4")
    coarse = np.round(np.asarray(weight.scale, np.float32) * 64).clip(1) / 64
    weight = dataclasses.replace(weight, scale=coarse.astype(np.float16))
    assert ggml.type_of(weight).name == "Q4_1"
    _, blocks = ggml.pack(ggml.transposed(weight))
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1).T
    np.testing.assert_array_equal(np.asarray(quant.dequantize(weight)) + np.float32(0), expected + np.float32(0))


def under_units(scheme: str) -> QTensor:
    """Returns a weight whose scales are codes, with one float per output."""
    floats = np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32)
    return quant.quantize_two_levels(floats, scheme, "int8", group_size=32, scale_group="channel")


def test_wider_scales_are_held_where_float16_has_them() -> None:
    weight = weight_of("int4")
    for dtype in ("float32", "bfloat16"):
        scale = np.asarray(weight.scale).astype(np.dtype(jnp.dtype(dtype)))
        wide = dataclasses.replace(weight, scale=scale)
        exact = np.array_equal(scale.astype(np.float32).astype(np.float16).astype(np.float32), scale.astype(np.float32))
        assert exact  # bfloat16 has fewer bits, and these values are in float16's range
        assert ggml.type_of(wide).name == "Q4_0"
        assert ggml.type_of(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), wide)) is None
    beyond = dataclasses.replace(weight, scale=np.asarray(weight.scale, np.float32) * np.float32(1 + 2**-20))
    tiny = dataclasses.replace(weight, scale=np.full_like(np.asarray(weight.scale, np.float32), 2.0**-25))
    assert ggml.type_of(beyond) is None and ggml.type_of(tiny) is None


@pytest.mark.parametrize(
    ("weight", "said", "nearest"),
    [
        (lambda: weight_of("int4", 128), "int4, groups of 128, scales in float16", "Q4_0 (int4, groups of 32"),
        (lambda: weight_of("int4", "tensor"), "int4, one scale, in float16", "Q4_0"),
        (lambda: weight_of("nf4", 64), "nf4, groups of 64", "IQ4_NL (iq4_nl, groups of 32, scales in float16)"),
        (lambda: weight_of("int6"), "int6, groups of 32", "Q6_K (int6, groups of 16, scales in int8)"),
        (lambda: weight_of("int3", length=96), "int3, groups of 32", "Q4_0"),
        (
            lambda: under_units("int4"),
            "int4, groups of 32, scales in int8 under one float for an output",
            "Q4_0 (int4, groups of 32, scales in float16)",
        ),
        (lambda: under_units("int3"), "int3, groups of 32, scales in int8 under one float", "Q3_K"),
        (lambda: weight_of("uint4"), "zero points", "Q4_1 (uint4, groups of 32, scales and offsets in float16)"),
        (lambda: weight_of("int8", 43, 172), "groups of 43, scales in float16, rows of 172", "F16"),
        (lambda: weight_of("ternary", "channel"), "ternary, groups of 512", "TQ2_0 (ternary, groups of 256"),
        (
            lambda: dataclasses.replace(
                weight_of("int4"), outlier=np.zeros((3, 8), np.float16), outlier_index=np.arange(3)[:, None]
            ),
            "3 outliers",
            "Q4_0",
        ),
        (
            lambda: dataclasses.replace(weight_of("int4"), order=np.arange(512, dtype=np.int32)[:, None]),
            "an order of its channels",
            "Q4_0",
        ),
    ],
)
def test_what_no_type_holds_is_named_with_the_nearest(weight, said: str, nearest: str) -> None:
    made = weight()
    assert ggml.type_of(made) is None
    assert said in ggml.described(made)
    assert ggml.explained(ggml.nearest(made)).startswith(nearest)
    with pytest.raises(ValueError, match="no ggml type holds it; the nearest is"):
        ggml.pack(ggml.transposed(made))


def test_two_levels_of_other_sizes_are_of_no_type() -> None:
    """The planes are Q4_K's, but the second level has groups of 4."""
    rng = np.random.default_rng(0)
    weight = ggml.unpack("Q4_K", random_blocks(ggml.named("Q4_K"), (2,), rng, finite=True))
    double = np.repeat(np.asarray(weight.scale.scale), 2, -1)
    scale = QTensor.from_codes(
        quant.unpack(weight.scale.planes, 6, 8, axis=-1), double, quant.SCHEMES["uint6"], axis=-1
    )
    other = dataclasses.replace(weight, scale=scale)
    assert ggml.type_of(other) is None and ggml.nearest(other).name == "Q4_K"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ggml.named("Q4_2"), r"ggml type 'Q4_2': expected one of F32 \(0\), F16 \(1\), Q4_0 \(2\)"),
        (lambda: ggml.named(4), "ggml type 4: expected one of"),
        (lambda: ggml.unpack("Q4_0", np.zeros((2, 19), np.uint8)), r"type Q4_0, uint8 \(2, 19\): expected uint8 rows"),
        (lambda: ggml.unpack("Q4_0", np.zeros((2, 18), np.int8)), r"type Q4_0, int8 \(2, 18\): expected uint8 rows"),
        (lambda: ggml.unpack("I32", np.zeros((2, 4), np.uint8)), "blocks of type I32: expected a type that is kept"),
        (lambda: ggml.floats("I32", np.zeros((2, 4), np.uint8)), "floats of type I32: expected floats, or a type"),
        (lambda: ggml.abstract("I32", (2, 4)), "a weight of type I32: expected one that weights are stored in"),
        (lambda: ggml.abstract("Q6_K", (2, 128)), "rows of 128 in Q6_K: expected a multiple of 256"),
        (lambda: ggml.pack(weight_of("int4")), "a weight with axis -2: expected -1, as ggml has them"),
        (lambda: ggml.pack(ggml.transposed(weight_of("int4")), "Q5_0"), "expected what Q5_0 .* holds"),
        (lambda: ggml.pack(np.zeros((2, 4), np.float64)), "no ggml type holds it; the nearest is F32"),
        (lambda: quant.with_offset(_two_levels()), "scales of two levels beside zero points: expected float scales"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _two_levels() -> QTensor:
    weight = ggml.unpack("Q4_K", np.zeros((1, 144), np.uint8))
    return dataclasses.replace(weight, offset=None, zero=np.zeros((1, 8), np.uint8))
