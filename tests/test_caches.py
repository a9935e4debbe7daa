"""Rows of a cache that are added, removed and rewound, and cache layouts: against NumPy slices and fresh prefills."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import Config, KVCache, Llama
from llamajax.caches import Part
from tests import reference
from tests.programs import step
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
SLOTS = 64
KINDS = [("dense", "float32"), ("tiled", "float32"), ("dense", "int8"), ("scatter", "int4"), ("dense", "int3")]
# Logits are of order 1. Quantized: a value in the middle of two codes may get either in programs of other shapes.
ROOM = {"float32": 1e-4, "int8": 0.02, "int4": 0.3, "int3": 0.6}


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def weights(model: Llama) -> reference.Weights:
    return weights_of(model)


def tokens_of(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape).astype(np.int32)


def filled(model: Llama, layout: str, dtype: str, batch: int, seed: int = 0) -> tuple[KVCache, np.ndarray]:
    """Returns a cache whose rows hold 16, 15, 14 … tokens, and these tokens."""
    tokens_BT = tokens_of(batch, 16, seed=seed)
    cache = KVCache.empty(CONFIG, batch, SLOTS, dtype, layout=layout)
    return step(model, tokens_BT, cache, 16 - np.arange(batch, dtype=np.int32))[1], tokens_BT


def arrays_of(cache: KVCache) -> list[np.ndarray]:
    return [np.asarray(array) for array in cache.state.values()]


# ---- Rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "dtype"), KINDS)
def test_take_and_put_are_slices(model: Llama, layout: str, dtype: str) -> None:
    cache, _ = filled(model, layout, dtype, 4)
    rows = [2, 0, 0, 3, 2]
    taken = cache.take(jnp.asarray(rows))
    for actual, whole in zip(arrays_of(taken), arrays_of(cache), strict=True):
        assert actual.dtype == whole.dtype and np.any(whole[:, 0] != whole[:, 2])
        np.testing.assert_array_equal(actual, whole[:, rows])
    np.testing.assert_array_equal(taken.length_B, [14, 16, 16, 13, 14])

    other, _ = filled(model, layout, dtype, 2, seed=1)
    put = jax.jit(KVCache.put)(cache, jnp.asarray([3, 1]), other)
    for actual, whole, new in zip(arrays_of(put), arrays_of(cache), arrays_of(other), strict=True):
        expected = whole.copy()
        expected[:, 3], expected[:, 1] = new[:, 0], new[:, 1]
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(put.length_B, [16, 15, 14, 16])
    np.testing.assert_array_equal(cache.length_B, [16, 15, 14, 13])  # the argument is unchanged


@pytest.mark.parametrize(("layout", "dtype"), KINDS)
def test_a_request_that_comes_and_beams_that_part(
    model: Llama, weights: reference.Weights, layout: str, dtype: str
) -> None:
    """A row prefilled alone replaces another; then rows are taken in another order, one of them twice."""
    cache, tokens_BT = filled(model, layout, dtype, 3)
    new_1T = tokens_of(1, 9, seed=5)
    _, alone = step(model, new_1T, KVCache.empty(CONFIG, 1, SLOTS, dtype, layout=layout))
    cache = cache.put(jnp.asarray([1]), alone).take(jnp.asarray([1, 0, 1]))
    texts = [new_1T[0], tokens_BT[0], new_1T[0]]
    next_BT = tokens_of(3, 4, seed=6)
    logits_BTV, after = step(model, next_BT, cache)
    np.testing.assert_array_equal(after.length_B, [13, 20, 13])
    for b, text in enumerate(texts):
        if dtype == "float32":
            expected_TV = reference.forward(CONFIG, weights, np.concatenate([text, next_BT[b]]))[-4:]
        else:
            empty = KVCache.empty(CONFIG, 1, SLOTS, dtype, layout=layout)
            expected_TV = step(model, np.concatenate([text, next_BT[b]])[None], empty)[0][0, -4:]
        np.testing.assert_allclose(logits_BTV[b], expected_TV, atol=ROOM[dtype])


@pytest.mark.parametrize(("layout", "dtype"), KINDS)
def test_a_row_is_copied_to_others(model: Llama, layout: str, dtype: str) -> None:
    cache, _ = filled(model, layout, dtype, 4)
    copied = jax.jit(KVCache.copy)(cache, jnp.asarray(2), jnp.asarray([0, 3]))
    for actual, whole in zip(arrays_of(copied), arrays_of(cache), strict=True):
        np.testing.assert_array_equal(actual, whole[:, [2, 1, 2, 2]])
    np.testing.assert_array_equal(copied.length_B, [14, 15, 14, 14])


@pytest.mark.parametrize(("layout", "dtype"), KINDS)
def test_a_larger_cache_goes_on_where_the_smaller_was(
    model: Llama, weights: reference.Weights, layout: str, dtype: str
) -> None:
    cache, tokens_BT = filled(model, layout, dtype, 2)
    larger = jax.jit(KVCache.grow)(cache, KVCache.empty(CONFIG, 2, 2 * SLOTS, dtype, layout=layout))
    assert larger.slots == 2 * SLOTS
    next_BT = tokens_of(2, 6, seed=8)
    logits_BTV, after = step(model, next_BT, larger)
    np.testing.assert_array_equal(after.length_B, [22, 21])
    for b, length in enumerate([16, 15]):
        text = np.concatenate([tokens_BT[b, :length], next_BT[b]])
        if dtype == "float32":
            expected_TV = reference.forward(CONFIG, weights, text)[-6:]
        else:
            expected_TV = step(model, next_BT, cache)[0][b]
        np.testing.assert_allclose(logits_BTV[b], expected_TV, atol=ROOM[dtype])


def test_rows_that_wait_do_not_run_over(model: Llama) -> None:
    cache = dataclasses.replace(
        filled(model, "dense", "float32", 3)[0], length_B=jnp.asarray([SLOTS, SLOTS - 1, 9], jnp.int32)
    )
    waiting = cache.idle(jnp.asarray([True, False, True]), 4)
    np.testing.assert_array_equal(waiting.length_B, [SLOTS - 4, SLOTS - 1, 9])
    assert waiting.begin(4).fits_B.tolist() == [True, False, True]
    ring = KVCache((Ring(),), cache.length_B)
    assert ring.idle(jnp.asarray([True] * 3), 4) is ring


# ---- Going back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "dtype"), KINDS)
def test_rewound_rows_go_on_as_if_freshly_prefilled(
    model: Llama, weights: reference.Weights, layout: str, dtype: str
) -> None:
    """Dropped tokens leave no trace in rows shortened by different numbers of tokens."""
    cache, tokens_BT = filled(model, layout, dtype, 3)
    length_B = jnp.asarray([5, 15, 0], jnp.int32)
    shorter = cache.rewind(length_B)
    assert shorter is not None
    next_BT = tokens_of(3, 6, seed=7)
    logits_BTV, after = step(model, next_BT, shorter)
    np.testing.assert_array_equal(after.length_B, np.asarray(length_B) + 6)
    for b, length in enumerate(np.asarray(length_B)):
        text = np.concatenate([tokens_BT[b, :length], next_BT[b]])
        if dtype == "float32":
            expected_TV = reference.forward(CONFIG, weights, text)[-6:]
        else:
            empty = KVCache.empty(CONFIG, 1, SLOTS, dtype, layout=layout)
            expected_TV = step(model, text[None], empty)[0][0, -6:]
        np.testing.assert_allclose(logits_BTV[b], expected_TV, atol=ROOM[dtype])


class Ring(Part):
    """A part that drops old tokens; one step may write three."""

    slots = None
    spare = 3


def test_a_ring_goes_back_by_what_it_has_spare(model: Llama) -> None:
    cache, _ = filled(model, "dense", "float32", 2)
    with_ring = dataclasses.replace(cache, parts=(*cache.parts, Ring()))
    shorter_B = cache.length_B - 3
    assert with_ring.rewind(shorter_B) is None and with_ring.rewind(shorter_B, at_most=4) is None
    np.testing.assert_array_equal(with_ring.rewind(shorter_B, at_most=3).length_B, shorter_B)
    assert with_ring.slots == SLOTS and KVCache((Ring(),), cache.length_B).slots is None


# ---- Layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4", "int3"])
def test_layouts_store_the_same_bits(dtype: str, T: int) -> None:
    """Rows that overflow, too: a write past the end is moved back, as NumPy does here."""
    rng, S = np.random.default_rng(0), 12
    start_B = jnp.asarray([0, 3, S - T, S - 1, S, S + 5], jnp.int32)
    key_BTKH, value_BTKH = (jnp.asarray(rng.standard_normal((6, T, 2, 8)), jnp.float32) for _ in range(2))

    def written(layout: str) -> Any:
        part = KVCache.empty(CONFIG, 6, S, dtype, layout=layout).parts[0].stored
        return jax.jit(lambda part, layer: part.write(layer, key_BTKH, value_BTKH, start_B))(part, jnp.asarray(1))

    dense, straight, scatter = (jax.tree.leaves(written(name)) for name in ("dense", "straight", "scatter"))
    for one, *others in zip(dense, straight, scatter, strict=True):
        for other in others:
            np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
    if dtype == "float32":
        expected_BKSH = np.zeros((6, 2, S, 8), np.float32)
        for b, start in enumerate(np.minimum(start_B, S - T)):
            expected_BKSH[b, :, start : start + T] = key_BTKH[b].swapaxes(0, 1)
        np.testing.assert_array_equal(dense[0], [np.zeros_like(expected_BKSH), expected_BKSH])


@pytest.mark.parametrize("layout", ["straight", "scatter"])
def test_a_model_sees_the_same_in_each_layout(model: Llama, weights: reference.Weights, layout: str) -> None:
    """A text in three pieces: the first fits both rows, the second only the second row, the last neither."""
    tokens_BT = tokens_of(2, 40)
    cache = KVCache.empty(CONFIG, 2, 32, layout=layout)
    logits, cache = step(model, tokens_BT[:, :16], cache, np.int32([16, 12]))
    np.testing.assert_allclose(logits[0], reference.forward(CONFIG, weights, tokens_BT[0, :16]), atol=1e-4)
    logits, cache = step(model, np.stack([tokens_BT[0, 16:33], tokens_BT[1, 12:29]]), cache, np.int32([17, 17]))
    assert np.isnan(logits[0]).all()
    np.testing.assert_allclose(logits[1], reference.forward(CONFIG, weights, tokens_BT[1, :29])[12:], atol=1e-4)
    logits, cache = step(model, tokens_BT[:, 29:33], cache)
    assert np.isnan(logits).all() and cache.length_B.min() > 32
