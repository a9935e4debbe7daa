"""Attention with windows, chunks, soft caps and sinks, in every implementation, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamajax import Config, KVCache
from llamajax.caches import Scores
from llamajax.caches.attention import SLOT_BLOCK, attend, attend_blocks, attend_causal
from tests.fuzz import fuzz
from tests.programs import QUICK

few = fuzz(10)
SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.sampled_from([2, 8]))
CHANGES = st.fixed_dictionaries(
    {
        "window": st.none() | st.integers(1, 40),
        "chunk": st.none() | st.integers(1, 40),
        "soft_cap": st.none() | st.sampled_from([0.5, 3.0]),
        "sinks": st.booleans(),
    }
)


def expected(query_BTNH, key_BKSH, value_BKSH, position_BT, window, chunk, soft_cap, sinks_N) -> np.ndarray:
    """Computes one query at a time, over the slots from the first to the last that it sees."""
    query_BTNH, key_BKSH, value_BKSH = (np.asarray(x, np.float64) for x in (query_BTNH, key_BKSH, value_BKSH))
    B, T, N, _ = query_BTNH.shape
    group, mixed = N // key_BKSH.shape[1], np.empty((B, T, N, value_BKSH.shape[-1]))
    for b, t, n in np.ndindex(B, T, N):
        position = int(position_BT[b if len(position_BT) > 1 else 0, t])
        first = 0 if window is None else max(0, position + 1 - window)
        first = first if chunk is None else max(first, position // chunk * chunk)
        seen = slice(first, position + 1)
        score = key_BKSH[b, n // group, seen] @ query_BTNH[b, t, n]
        if soft_cap is not None:
            score = soft_cap * np.tanh(score / soft_cap)
        power = np.exp(score)
        total = power.sum() + (0 if sinks_N is None else np.exp(float(sinks_N[n])))
        mixed[b, t, n] = power @ value_BKSH[b, n // group, seen] / total
    return mixed


def drawn(seed: int, B: int, T: int, K: int, G: int, S: int, H: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns queries, keys and values whose scores differ by a few units."""
    rng = np.random.default_rng(seed)
    query_BTNH = rng.standard_normal((B, T, K * G, H)) / H**0.5 * 2
    key_BKSH, value_BKSH = rng.standard_normal((2, B, K, S, H))
    return tuple(np.float32(x) for x in (query_BTNH, key_BKSH, value_BKSH))


def check(function, arrays, position_BT, changes: dict, seed: int) -> None:
    """Checks a `function` of queries, keys, values, positions, scores; window and chunk are known at run time only."""
    heads = arrays[0].shape[2]
    sinks_N = np.float32(np.random.default_rng(seed).standard_normal(heads)) if changes["sinks"] else None
    numbers = {name: changes[name] for name in ("window", "chunk") if changes[name] is not None}

    @jax.jit
    def run(numbers, sinks_N, *arrays):
        return function(*arrays, Scores(**numbers, soft_cap=changes["soft_cap"], sinks_N=sinks_N))

    compiled = run.lower(numbers, sinks_N, *arrays, position_BT).compile(compiler_options=QUICK)
    actual = compiled(numbers, sinks_N, *arrays, position_BT)
    wanted = expected(*arrays, position_BT, changes["window"], changes["chunk"], changes["soft_cap"], sinks_N)
    assert actual.shape == wanted.shape
    np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=2e-5)


def ragged(seed: int, B: int, T: int, slots: int) -> np.ndarray:
    """Returns the positions of T tokens in each row, somewhere within the slots."""
    first_B = np.random.default_rng(seed).integers(0, slots - T + 1, B)
    return np.int32(first_B[:, None] + np.arange(T))


@few
@given(SHAPES, CHANGES, st.integers(1, 9), st.integers(0, 60), st.integers(0, 99))
def test_attend(shape: tuple, changes: dict, T: int, more: int, seed: int) -> None:
    B, K, G, H = shape
    check(attend, drawn(seed, B, T, K, G, T + more, H), ragged(seed, B, T, T + more), changes, seed)


@few
@given(SHAPES, CHANGES, st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_attend_blocks(shape: tuple, changes: dict, T: int, blocks: int, seed: int) -> None:
    """A window may begin after a block's end: that block must count for nothing, though it is processed first."""
    B, K, G, H = shape
    slots = blocks * SLOT_BLOCK
    check(attend_blocks, drawn(seed, B, T, K, G, slots, H), ragged(seed, B, T, slots), changes, seed)


@few
@given(SHAPES, CHANGES, st.sampled_from([1, 7, 128, 131, 300]), st.integers(0, 99))
def test_attend_causal(shape: tuple, changes: dict, T: int, seed: int) -> None:
    B, K, G, H = shape
    check(attend_causal, drawn(seed, B, T, K, G, T, H), np.arange(T, dtype=np.int32)[None], changes, seed)


def part_of(layout: str, dtype: str, K: int, G: int, H: int, key_BKSH: np.ndarray, value_BKSH: np.ndarray):
    """Returns a part of two layers, the second with these keys and values, and those as read back from it."""
    config = Config(
        vocab_size=8,
        width=8,
        ffn_width=8,
        num_layers=2,
        num_heads=K * G,
        num_kv_heads=K,
        head_size=H,
        context_length=512,
    )
    B, _, S, _ = key_BKSH.shape
    part = KVCache.empty(config, B, S, dtype, layout=layout).parts[0].stored
    part = part.write(1, *(jnp.asarray(x.swapaxes(1, 2)) for x in (key_BKSH, value_BKSH)), jnp.zeros(B, jnp.int32))
    return part, [np.asarray(x, np.float32) for x in part.read(1)]


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("dense", "float32"),
        ("straight", "float32"),
        ("scatter", "float32"),
        ("tiled", "float32"),
        ("tiled", "float16"),
        ("dense", "int8"),
        ("scatter", "int4"),
    ],
)
@fuzz(6)
@given(SHAPES, CHANGES, st.sampled_from([1, 2, 5, 40]), st.integers(0, 99))
def test_parts_of_caches(layout: str, dtype: str, shape: tuple, changes: dict, T: int, seed: int) -> None:
    """Each part attends to what it stores: keys and values in the cache's dtype, or in codes."""
    B, K, G, H = shape
    query_BTNH, *held = drawn(seed, B, T, K, G, 128, H)
    part, read = part_of(layout, dtype, K, G, H, *held)
    largest = 0.3 if dtype == "int4" else 0.02 if dtype == "int8" else 2e-3 if dtype == "float16" else 0
    for x, y in zip(held, read, strict=True):
        assert np.max(np.abs(x - y)) <= largest

    def mix(query_BTNH, key_BKSH, value_BKSH, position_BT, scores):
        return part.mix(jnp.asarray(1, jnp.int32), query_BTNH, position_BT, scores)

    check(mix, (query_BTNH, *read), ragged(seed, B, T, 128), changes, seed)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_long_prompts_of_a_cache_go_in_blocks(dtype: str) -> None:
    """Blocks are used from 64 queries and 512 slots on; here all that changes scores is set at once."""
    query_BTNH, *held = drawn(0, 2, 70, 2, 2, 2 * SLOT_BLOCK, 8)
    part, read = part_of("dense", dtype, 2, 2, 8, *held)

    def mix(query_BTNH, key_BKSH, value_BKSH, position_BT, scores):
        return part.mix(jnp.asarray(1, jnp.int32), query_BTNH, position_BT, scores)

    changes = {"window": 100, "chunk": 150, "soft_cap": 3.0, "sinks": True}
    check(mix, (query_BTNH, *read), np.int32([[0], [300]]) + np.arange(70, dtype=np.int32), changes, 0)


def test_a_change_is_a_change() -> None:
    """Each option changes the result: an option that both sides ignored would pass the tests above."""
    arrays = drawn(0, 1, 6, 2, 2, 50, 8)
    position_BT = np.arange(44, 50)[None]
    plain = expected(*arrays, position_BT, None, None, None, None)
    for changes in (
        (8, None, None, None),
        (None, 40, None, None),
        (None, None, 0.5, None),
        (None,) * 3 + (np.ones(4),),
    ):
        assert np.max(np.abs(expected(*arrays, position_BT, *changes) - plain)) > 0.01
