"""The cache of 8, 4 and 3 bits, and of floats, against NumPy: codes, bounds, ragged rows, programs, cost."""

import dataclasses
import functools
import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llamajax
from llamajax import Config, KVCache, LlamaJaxError, generate, preset, stream
from llamajax.caches import CACHE_DTYPES
from llamajax.caches.rotated import rotation
from llamajax.cli import main
from llamajax.evaluation.evaluate import encode_documents
from llamajax.train import heldout_stories
from quant import QTensor
from tests import reference
from tests.fuzz import fuzz
from tests.programs import QUICK
from tests.programs import step as _step
from tests.reference import random_model, weights_of

CONFIG = Config(
    vocab_size=50,
    width=32,
    ffn_width=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=512,
)
QUANTIZED = {"int8": 255, "int4": 15}  # the largest code of those with a zero point
# What a quantized cache multiplies heads of 8 with: signs, and the Hadamard matrix of order 8 by Sylvester's rule.
_SIGNS = np.array([1, 1, 1, -1, 1, 1, -1, 1])
ROTATION = _SIGNS[:, None] * functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * 3) / np.sqrt(8)
# Float32 rounding of x / scale + zero may add |x| times this to half a step, in steps.
ROUNDING = 1e-4


def begun(config: Config, B: int, slots: int, dtype: str, length_B) -> KVCache:
    """Returns a cache of zeros that counts some tokens."""
    cache = KVCache.empty(config, B, slots, dtype)
    return dataclasses.replace(cache, length_B=jnp.broadcast_to(jnp.asarray(length_B, jnp.int32), (B,)))


def write(cache: KVCache, layer, key_BTKH, value_BTKH, count_B=0) -> KVCache:
    """Returns the cache with tokens written in one layer, as they are, without rotation; `count_B` of them count."""
    (whole,) = cache.parts
    part = whole.stored.write(layer, jnp.asarray(key_BTKH), jnp.asarray(value_BTKH), cache.length_B)
    return KVCache((whole.storing(part),), cache.length_B + jnp.asarray(count_B, jnp.int32))


_write = jax.jit(write, compiler_options=QUICK)
_forward = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


def quantize(x: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns codes, scale and zero point per last axis, in float64, by the formula in the docstrings."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    scale = (high - low) / largest
    safe = np.where(scale == 0, 1, scale)
    zero = np.round(-low / safe)
    return np.clip(np.round(x / safe + zero), 0, largest), scale, zero


def round_trip(x: np.ndarray, largest: int) -> np.ndarray:
    codes, scale, zero = quantize(x.astype(np.float64), largest)
    return (codes - zero) * scale


def decode_bytes(slots: QTensor) -> np.ndarray:
    """Decodes the planes: element h is in the low bits of byte h, element h + H/2 in the high ones."""
    codes = np.asarray(slots.planes[0])
    if slots.scheme.bits == 4:
        codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
    return (codes.astype(np.float64) - np.asarray(slots.zero)) * np.asarray(slots.scale, np.float64)


def one_layer(head_size: int, kv_heads: int) -> Config:
    return dataclasses.replace(CONFIG, num_layers=1, num_heads=kv_heads, num_kv_heads=kv_heads, head_size=head_size)


# ---- What is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_codes_are_numpys(dtype: str) -> None:
    """Checks all three planes, and the floats that a decoder of the bytes makes of them."""
    x_BTKH = np.random.default_rng(0).normal(0.5, 1, (2, 5, 2, 8)).astype(np.float32)
    cache = write(KVCache.empty(CONFIG, 2, 5, dtype), jnp.asarray(1), x_BTKH, -x_BTKH)
    part = cache.parts[0].stored
    for slots, written_BTKH in ((part.key_LBKSH, x_BTKH), (part.value_LBKSH, -x_BTKH)):
        codes, scale, zero = (
            part.swapaxes(1, 2) for part in quantize(written_BTKH.astype(np.float64), QUANTIZED[dtype])
        )
        assert slots.planes[0].dtype == slots.zero.dtype == jnp.uint8 and slots.scale.dtype == jnp.float32
        np.testing.assert_allclose(slots.scale[1], scale, rtol=1e-6)
        np.testing.assert_array_equal(slots.zero[1], zero)
        np.testing.assert_allclose(decode_bytes(slots)[1], (codes - zero) * scale, rtol=1e-5, atol=1e-7)
        assert not decode_bytes(slots)[0].any(), "the other layer must stay empty"
    for read, slots in zip(part.read(jnp.asarray(1)), (part.key_LBKSH, part.value_LBKSH), strict=True):
        assert read.dtype == jnp.float32
        np.testing.assert_allclose(read, decode_bytes(slots)[1], rtol=1e-6)


@fuzz(15)
@given(
    dtype=st.sampled_from(list(QUANTIZED)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.sampled_from([2, 6, 64])),
    exponent=st.integers(-30, 37),
    shift=st.floats(-3, 3),
    seed=st.integers(0, 9),
)
def test_error_is_at_most_half_a_step(dtype: str, shape: tuple, exponent: int, shift: float, seed: int) -> None:
    """Every element is read back within half a step, at any magnitude and off-centre too; slot 0 stays empty."""
    B, T, K, H = shape
    x_BTKH = ((np.random.default_rng(seed).uniform(-1, 1, shape) + shift) * 10.0**exponent).astype(np.float32)
    cache = _write(begun(one_layer(H, K), B, T + 1, dtype, 1), jnp.asarray(0), x_BTKH, x_BTKH, T)
    read_BKSH, _ = cache.parts[0].stored.read(jnp.asarray(0))
    _, scale, _ = quantize(x_BTKH.astype(np.float64), QUANTIZED[dtype])
    error = np.abs(np.asarray(read_BKSH, np.float64)[:, :, 1:].swapaxes(1, 2) - x_BTKH)
    assert np.all(error <= scale * (0.5 + ROUNDING))
    assert not np.asarray(read_BKSH)[:, :, 0].any()


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_zeros_stay_zeros_and_large_values_finite(dtype: str) -> None:
    x_BTKH = np.zeros((1, 3, 2, 8), np.float32)
    x_BTKH[0, 1, 0] = np.linspace(-1e6, 3e6, 8)  # beyond float16
    x_BTKH[0, 1, 1] = -1e30
    key_BKSH, _ = write(KVCache.empty(CONFIG, 1, 3, dtype), 0, x_BTKH, x_BTKH).parts[0].stored.read(0)
    read = np.asarray(key_BKSH).swapaxes(1, 2)
    assert not read[0, 0].any() and not read[0, 2].any()
    np.testing.assert_allclose(read[0, 1, 0], x_BTKH[0, 1, 0], atol=4e6 / QUANTIZED[dtype] / 2)
    np.testing.assert_allclose(read[0, 1, 1], -1e30, rtol=1e-6)


def test_three_bits_are_two_planes_of_the_scale_of_least_error() -> None:
    """NumPy reads the bytes: two low bits of four elements a byte, the high bit of eight; code 4 stands for 0.

    The errors are compared with the best of 400 scales around the one that the largest value gives.
    """
    x_BTKH = np.random.default_rng(0).standard_normal((2, 5, 2, 16)).astype(np.float32)
    config = one_layer(16, 2)
    part = write(KVCache.empty(config, 2, 5, "int3"), 0, x_BTKH, -x_BTKH).parts[0].stored
    low, high = (np.asarray(plane)[0] for plane in part.key_LBKSH.planes)
    assert low.shape[-1] == 4 and high.shape[-1] == 2 and part.key_LBKSH.zero is None
    codes = np.concatenate([low >> 2 * i & 3 for i in range(4)], axis=-1)
    codes |= np.concatenate([high >> i & 1 for i in range(8)], axis=-1) << 2
    read = (codes.astype(np.float64) - 4) * np.asarray(part.key_LBKSH.scale, np.float64)[0]
    np.testing.assert_allclose(part.read(0)[0], read, rtol=1e-6)

    exact = x_BTKH.swapaxes(1, 2).astype(np.float64)
    errors = ((read - exact) ** 2).sum(-1)
    largest = np.abs(exact).max(-1, keepdims=True)
    scales = [sign * factor * largest / 4 for factor in np.linspace(0.5, 1.5, 200) for sign in (1, -1)]
    tried = [((np.clip(np.round(exact / scale), -4, 3) * scale - exact) ** 2).sum(-1) for scale in scales]
    assert np.all(errors < 1.15 * np.min(tried, axis=0))


def test_heads_that_fill_no_bytes_are_an_error() -> None:
    message = "a cache in int3 for heads of 6: expected a multiple of 8; int8 takes any heads"
    with pytest.raises(LlamaJaxError, match=message):
        KVCache.empty(one_layer(6, 2), 1, 8, "int3")


@pytest.mark.parametrize("size", [2, 6, 8, 64, 80, 96, 128])
def test_rotations_are_orthogonal_and_spread_single_channels_and_equal_ones(size: int) -> None:
    rotation_HH = rotation(size).astype(np.float64)
    np.testing.assert_allclose(rotation_HH @ rotation_HH.T, np.eye(size), atol=1e-6)
    assert np.abs(rotation_HH).max() <= np.sqrt(2 / size) * (1 + 1e-6)
    if size == 8:
        np.testing.assert_allclose(rotation_HH, ROTATION, atol=1e-7)
    if size >= 64:
        assert np.abs(np.ones(size) @ rotation_HH).max() < 0.3 * np.sqrt(size)


@pytest.mark.parametrize("dtype", [*QUANTIZED, "int3"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so_in_its_head_and_token(dtype: str, bad: float) -> None:
    x_BTKH = np.random.default_rng(0).standard_normal((2, 3, 2, 8)).astype(np.float32)
    x_BTKH[1, 2, 0, 5] = bad
    key_BKSH, _ = write(KVCache.empty(CONFIG, 2, 3, dtype), 0, x_BTKH, x_BTKH).parts[0].stored.read(0)
    finite_BTK = np.isfinite(key_BKSH).swapaxes(1, 2)
    assert not finite_BTK[1, 2, 0].any()
    finite_BTK[1, 2, 0] = True
    assert finite_BTK.all()


@pytest.mark.parametrize("name", ["llama3.1-8b", "llama3.2-1b", "llama2-7b"])
def test_bytes_are_those_promised(name: str) -> None:
    """A head takes per token, for keys and for values: H or H/2 bytes of codes, 4 of scale, 1 of zero point."""
    config = preset(name)
    H, per_row = config.head_size, 2 * config.num_layers * config.num_kv_heads * 1000
    promised = {"float32": 4 * H, "bfloat16": 2 * H, "float16": 2 * H, "int8": H + 5, "int4": H // 2 + 5}
    promised["int3"] = 3 * H // 8 + 4
    assert promised.keys() == set(CACHE_DTYPES)
    for dtype, size in promised.items():
        cache = jax.eval_shape(lambda dtype=dtype: KVCache.empty(config, 3, 1000, dtype))
        leaves = jax.tree.leaves(cache)
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) == 3 * per_row * size + 3 * 4
        shape = (config.num_layers, 3, config.num_kv_heads, 1000, H)
        assert cache.slots == 1000 and cache.parts[0].stored.key_LBKSH.shape == shape
        assert not any("int4" in leaf.dtype.name for leaf in leaves)


@pytest.mark.parametrize("dtype", ["int2", "uint8", "auto", "", 5, None, jnp.uint8, float, jnp.int32])
def test_another_dtype_is_an_error(dtype, tiny_model: llamajax.Llama) -> None:
    message = "the cache's dtype is .*: expected one of float32, bfloat16, float16, int8, int4, int3"
    with pytest.raises(LlamaJaxError, match=message):
        KVCache.empty(CONFIG, 1, 8, dtype)
    if dtype is not None:
        with pytest.raises(LlamaJaxError, match=message):
            stream(tiny_model, None, [1], cache_dtype=dtype)


def test_a_dtype_by_name_and_as_such() -> None:
    for dtype in (jnp.float16, jnp.bfloat16, jnp.int8, jnp.int4):
        one, other = (KVCache.empty(CONFIG, 1, 8, d) for d in (dtype, jnp.dtype(dtype).name))
        assert jax.tree.structure(one) == jax.tree.structure(other)
        assert [leaf.dtype for leaf in jax.tree.leaves(one)] == [leaf.dtype for leaf in jax.tree.leaves(other)]


# ---- Rows and writes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_ragged_writes_are_numpys(dtype: str) -> None:
    """Each row counts some tokens of a piece; the next piece overwrites the rest. A NumPy array models the cache."""
    rng, B, S = np.random.default_rng(1), 3, 40
    cache = KVCache.empty(CONFIG, B, S, dtype)
    expected_LBKSH, length_B = np.zeros((2, B, 2, S, 8), np.float32), np.zeros(B, int)
    for T in (8, 1, 8, 1, 8, 8):
        count_B = rng.integers(0, T + 1, B)
        for layer in range(2):
            key, value = rng.normal(0.3, 1, (2, B, T, 2, 8)).astype(np.float32)
            cache = _write(cache, jnp.asarray(layer), key, value, jnp.asarray(count_B if layer == 1 else [0] * B))
            for b in range(B):
                expected_LBKSH[layer, b, :, length_B[b] : length_B[b] + T] = key[b].swapaxes(0, 1)
        length_B += count_B
        np.testing.assert_array_equal(cache.length_B, length_B)
    for layer in range(2):
        key_BKSH = np.asarray(cache.parts[0].stored.read(jnp.asarray(layer))[0], np.float32)
        if dtype in QUANTIZED:
            expected_BKSH = round_trip(expected_LBKSH[layer], QUANTIZED[dtype])
            np.testing.assert_allclose(key_BKSH, expected_BKSH, rtol=1e-4, atol=1e-6)
        elif dtype != "int3":
            np.testing.assert_array_equal(key_BKSH, np.asarray(jnp.asarray(expected_LBKSH[layer], dtype), np.float32))
        else:  # which codes they are, another test says
            np.testing.assert_allclose(key_BKSH, expected_LBKSH[layer], atol=1.5)
            np.testing.assert_array_equal(key_BKSH == 0, key_BKSH * expected_LBKSH[layer] == 0)


@pytest.mark.parametrize("dtype", [*QUANTIZED, "int3"])
def test_a_row_is_stored_as_it_would_be_alone(dtype: str) -> None:
    """Rows are equal bit for bit, and `vmap` over caches is a loop over them."""
    x_BTKH = jnp.asarray(np.random.default_rng(2).standard_normal((3, 4, 2, 8)), jnp.float32)
    start_B = jnp.asarray([0, 3, 5])
    batch = write(begun(CONFIG, 3, 9, dtype, start_B), 1, x_BTKH, 2 * x_BTKH)
    caches = [begun(CONFIG, 1, 9, dtype, start_B[b]) for b in range(3)]
    alone = [write(cache, 1, x_BTKH[b : b + 1], 2 * x_BTKH[b : b + 1]) for b, cache in enumerate(caches)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *caches)
    mapped = jax.vmap(lambda cache, x: write(cache, 1, x, 2 * x))(stacked, x_BTKH[:, None])
    for b in range(3):
        of_batch = jax.tree.map(lambda leaf, b=b: leaf[:, b : b + 1], batch.parts)
        of_map = jax.tree.map(lambda leaf, b=b: leaf[b], mapped.parts)
        expected = jax.tree.leaves(alone[b].parts)
        for leaves in (jax.tree.leaves(of_batch), jax.tree.leaves(of_map)):
            for actual, leaf in zip(leaves, expected, strict=True):
                np.testing.assert_array_equal(actual, leaf)


# ---- The model with a quantized cache -------------------------------------------------------------------------------


def run_pieces(model: llamajax.Llama, tokens_BT: np.ndarray, pieces: list[int], dtype: str) -> np.ndarray:
    """Returns the logits of all tokens, put through the cache piece by piece."""
    cache, logits, first = KVCache.empty(model.config, len(tokens_BT), tokens_BT.shape[1], dtype), [], 0
    for size in pieces:
        part_BTV, cache = _step(model, tokens_BT[:, first : first + size], cache)
        logits.append(np.asarray(part_BTV, np.float64))
        first += size
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_logits_are_those_of_the_reference_with_rounded_keys_and_values(dtype: str, monkeypatch) -> None:
    """The reference is the NumPy LLaMA with attention over keys and values that NumPy rotated, rounded, rotated back.

    A value near the middle of two codes may be rounded to either, so the mean error counts, not the largest.
    """
    model, tokens = random_model(CONFIG), np.random.default_rng(3).integers(0, 50, (2, 24)).astype(np.int32)
    weights = weights_of(model)
    float_logits = np.stack([reference.forward(CONFIG, weights, row) for row in tokens])
    largest = QUANTIZED[dtype]

    def seen(x: np.ndarray) -> np.ndarray:
        return round_trip(x @ ROTATION, largest) @ ROTATION.T

    monkeypatch.setattr(reference, "held", lambda key, value: (seen(key), seen(value)))
    expected = np.stack([reference.forward(CONFIG, weights, row) for row in tokens])
    effect = np.mean(np.abs(expected - float_logits))
    for pieces in ([24], [16, 1, 1, 6]):
        assert np.mean(np.abs(run_pieces(model, tokens, pieces, dtype) - expected)) < 0.05 * effect


def test_rows_of_different_length_equal_each_row_alone() -> None:
    model, rng = random_model(CONFIG), np.random.default_rng(4)
    rows = [rng.integers(0, 50, length).astype(np.int32) for length in (20, 9)]
    cache, got, taken = KVCache.empty(CONFIG, 2, 32, "int8"), [[], []], [0, 0]
    for size, counts in ((16, (16, 3)), (1, (1, 0)), (8, (3, 6))):
        tokens_BT = rng.integers(0, 50, (2, size)).astype(np.int32)
        for b, count in enumerate(counts):
            tokens_BT[b, :count] = rows[b][taken[b] : taken[b] + count]
        logits, cache = _step(model, tokens_BT, cache, np.asarray(counts))
        for b, count in enumerate(counts):
            got[b].append(np.asarray(logits[b, :count]))
            taken[b] += count
    for b in range(2):
        alone = run_pieces(model, rows[b][None], [len(rows[b])], "int8")[0]
        # Logits are of order 1. The tolerance is for values in the middle of two codes, which may get either.
        np.testing.assert_allclose(np.concatenate(got[b]), alone, atol=0.02)


@pytest.mark.parametrize("dtype", [*QUANTIZED, "int3"])
def test_damaged_rows_are_nan_for_good(dtype: str) -> None:
    """Row 0 has an unknown token, row 1 overflows: both give NaN where a float cache does; row 2 is as without them."""
    model, tokens = random_model(CONFIG), np.random.default_rng(5).integers(0, 50, (3, 16)).astype(np.int32)
    expected = run_pieces(model, tokens, [8, 8], dtype)[2]
    tokens[0, 5] = 50

    def logits_of(dtype: str) -> np.ndarray:
        cache = KVCache.empty(CONFIG, 3, 16, dtype)
        cache = dataclasses.replace(cache, length_B=jnp.asarray([0, 9, 0]))
        first, cache = _step(model, tokens[:, :8], cache)
        return np.concatenate([first, _step(model, tokens[:, 8:], cache)[0]], axis=1)

    logits = logits_of(dtype)
    assert np.isnan(logits[0, 5:]).all() and np.isnan(logits[1]).all()
    np.testing.assert_array_equal(np.isnan(logits), np.isnan(logits_of("float32")))
    np.testing.assert_allclose(logits[2], expected, atol=1e-4)


class Box(NamedTuple):
    model: llamajax.Llama
    tokenizer: llamajax.Tokenizer


@pytest.fixture(scope="module")
def box() -> Box:
    return Box(*llamajax.load("box", dtype=jnp.float32))


# Bounds are three times the values measured on 136 windows of 512 tokens: KL 3.3e-6 and 9.9e-4 nats, and another
# likeliest token at 0.05% and 0.66% of the positions.
@pytest.mark.parametrize(("dtype", "divergence", "agreement"), [("int8", 1e-5, 0.998), ("int4", 3e-3, 0.98)])
def test_the_box_hardly_changes(box: Box, dtype: str, divergence: float, agreement: float) -> None:
    """KL(float || quantized) of the next token, on stories that the box never saw, put through the cache in pieces."""
    rows = encode_documents(box.tokenizer, heldout_stories()[:12])[: 6 * 384].reshape(6, 384)
    exact = jax.nn.log_softmax(_forward(box.model, rows))
    rounded = jax.nn.log_softmax(run_pieces(box.model, rows, [128, 128, 128], dtype))
    kl = np.sum(np.exp(exact) * (exact - rounded), axis=-1)
    assert 0 < kl.mean() < divergence
    assert np.mean(np.argmax(exact, -1) == np.argmax(rounded, -1)) > agreement


# ---- Generating -----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_greedy_text_of_the_box_is_the_same_with_8_bits(box: Box) -> None:
    prompt, options = "Once upon a time", {"temperature": 0, "max_new_tokens": 60}
    exact = generate(*box, prompt, **options)
    rounded = generate(*box, prompt, cache_dtype="int8", **options)
    assert rounded.text == exact.text and len(exact.tokens) == 60
    assert rounded.log_probabilities != exact.log_probabilities, "the cache was not quantized"
    np.testing.assert_allclose(rounded.log_probabilities, exact.log_probabilities, atol=0.05)


def test_the_cache_has_the_models_dtype_unless_told_otherwise(tiny_model: llamajax.Llama) -> None:
    """`step_bytes` is the weights, with only one row of the embedding, plus the cache as stored."""
    config = tiny_model.config
    weights = (config.num_parameters - config.vocab_size * config.width) * 4
    heads = 2 * config.num_layers * config.num_kv_heads * 256
    sizes = {None: 32, "float32": 32, "bfloat16": 16, "int8": 8 + 5, "int4": 4 + 5, "int3": 3 + 4}
    results = {}
    for dtype, size in sizes.items():
        run = stream(tiny_model, None, [1], max_new_tokens=4, temperature=0, cache_dtype=dtype)
        list(run)
        assert run.speed.step_bytes == weights + heads * size + 4
        results[dtype] = run.completions[0].log_probabilities
    assert results[None] == results["float32"] != results["int8"]
    np.testing.assert_allclose(results["bfloat16"], results["float32"], atol=0.2)


def test_command_line(box: Box, capsys) -> None:
    argv = ["generate", "--prompt=Once upon a time", "--temperature=0", "--max_new_tokens=8", "--json"]
    assert main([*argv, "--kv_cache=int8"]) == 0
    printed = json.loads(capsys.readouterr().out)
    made = generate(*box, "Once upon a time", temperature=0, max_new_tokens=8, cache_dtype="int8")
    assert (printed["tokens"], printed["log_probabilities"]) == (made.tokens, made.log_probabilities)
    assert main([*argv, "--kv_cache=int2"]) == 2
    error = capsys.readouterr().err
    assert "--kv_cache=int2: expected auto, float32, bfloat16, float16, int8, int4 or int3" in error


# ---- The compiled program -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", QUANTIZED)
def test_donated_cache_is_updated_in_place(dtype: str, batch: int) -> None:
    """Each plane of the result has the argument's buffer; none is copied, converted or scattered into."""
    donating = jax.jit(lambda model, tokens_BT, cache: model(tokens_BT, cache), donate_argnames=("cache",))
    model, cache = random_model(CONFIG), KVCache.empty(CONFIG, batch, 32, dtype)
    tokens_BT = np.ones((batch, 1), np.int32)
    lowered = donating.lower(model, tokens_BT, cache)
    planes = list(cache.state.values())
    shapes = {",".join(map(str, plane.shape)) for plane in planes}
    assert len(planes) == 6 and shapes == {f"2,{batch},2,32,{8 if dtype == 'int8' else 4}", f"2,{batch},2,32,1"}
    compiled = lowered.compile()
    made = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", compiled.as_text())
    of_planes = {operation for shape, operation in made if shape in shapes}
    assert "dynamic-update-slice" in of_planes
    assert of_planes <= {"dynamic-update-slice", "parameter", "get-tuple-element", "fusion", "bitcast"}
    assert "stablehlo.scatter" not in lowered.as_text()
    before = [plane.unsafe_buffer_pointer() for plane in planes]
    _, after = compiled(model, tokens_BT, cache)
    assert all(plane.is_deleted() for plane in planes)
    after_planes = list(after.state.values())
    assert before == [plane.unsafe_buffer_pointer() for plane in after_planes]
