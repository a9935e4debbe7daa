"""The cache in tiles: the same model outputs as from the plain cache, and from no cache at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llamajax
from llamajax.caches import STEP_SLOTS, DensePart, KVCache, QuantizedPart, TiledPart, empty_cache
from llamajax.caches.attention import BLOCK_QUERIES, SLOT_BLOCK, attend, attend_blocks
from llamajax.caches.tiled import TILE
from tests.programs import QUICK, forward, step


@pytest.mark.parametrize(
    ("B", "dtype"),
    [
        (3, "float32"),
        pytest.param(1, "float16", marks=pytest.mark.exhaustive),
        pytest.param(1, "float32", marks=pytest.mark.exhaustive),
        pytest.param(3, "float16", marks=pytest.mark.exhaustive),
    ],
)
def test_a_model_sees_what_it_wrote(tiny_model: llamajax.Llama, dtype: str, B: int) -> None:
    """Pieces begin and end inside tiles, and rows keep some tokens; logits are those of a plain cache and of none."""
    rng, V = np.random.default_rng(0), tiny_model.config.vocab_size
    cache = KVCache.empty(tiny_model.config, B, 2 * STEP_SLOTS, dtype, layout="tiled")
    plain = KVCache.empty(tiny_model.config, B, 2 * STEP_SLOTS, dtype)
    texts: list[list[int]] = [[] for _ in range(B)]
    seen: list[list[jax.Array]] = [[] for _ in range(B)]
    for T in (20, 1, 3, 20, 20, 1, 3, 20):
        tokens_BT, count_B = rng.integers(0, V, (B, T)), rng.integers(1, T + 1, B)
        logits_BTV, cache = step(tiny_model, jnp.asarray(tokens_BT), cache, jnp.asarray(count_B))
        expected_BTV, plain = step(tiny_model, jnp.asarray(tokens_BT), plain, jnp.asarray(count_B))
        for b in range(B):
            texts[b] += tokens_BT[b, : count_B[b]].tolist()
            actual_TV = logits_BTV[b, : count_B[b]]
            np.testing.assert_allclose(actual_TV, expected_BTV[b, : count_B[b]], rtol=1e-3, atol=1e-3)
            seen[b].append(actual_TV)
    np.testing.assert_array_equal(cache.length_B, plain.length_B)
    for b in range(B if dtype == "float32" else 0):
        padded = np.zeros(2 * STEP_SLOTS, int)  # padding after a text does not change it: one program for all
        padded[: len(texts[b])] = texts[b]
        alone_TV = forward(tiny_model, jnp.asarray(padded)[None])[0, : len(texts[b])]
        np.testing.assert_allclose(np.concatenate(seen[b]), alone_TV, rtol=1e-3, atol=1e-4)


def test_slots_are_where_the_docstring_says(tiny_model: llamajax.Llama) -> None:
    config = tiny_model.config
    (part,) = KVCache.empty(config, 2, 2 * STEP_SLOTS, layout="tiled").parts
    key_BTKH, value_BTKH = np.random.default_rng(0).standard_normal((2, 2, 7, 2, 8)).astype(np.float32)
    part = part.write(jnp.asarray(1), jnp.asarray(key_BTKH), jnp.asarray(value_BTKH), jnp.asarray([13, 60]))
    for b, start in enumerate((13, 60)):
        for t in range(7):
            slot = start + t
            np.testing.assert_array_equal(part.key_LBKSH[1, b, :, slot // TILE, :, slot % TILE], key_BTKH[b, t])
            at = (1, b, slice(None), slot // STEP_SLOTS, slot % STEP_SLOTS)
            np.testing.assert_array_equal(part.value_LBKSH[at], value_BTKH[b, t])
    assert not part.key_LBKSH[0].any() and int((part.key_LBKSH != 0).sum()) == key_BTKH.size
    for read_BKSH, written_BTKH in zip(part.read(jnp.asarray(1)), (key_BTKH, value_BTKH), strict=True):
        np.testing.assert_array_equal(read_BKSH[1, :, 60:67], written_BTKH[1].swapaxes(0, 1))


def test_a_row_that_overflows_is_nan(tiny_model: llamajax.Llama) -> None:
    cache = KVCache.empty(tiny_model.config, 2, STEP_SLOTS, layout="tiled")
    cache = dataclasses.replace(cache, length_B=jnp.asarray([STEP_SLOTS, 3], jnp.int32))
    logits_BTV, cache = step(tiny_model, jnp.asarray([[1], [1]]), cache)
    assert jnp.isnan(logits_BTV[0]).all() and not jnp.isnan(logits_BTV[1]).any()


def test_kinds_of_cache(tiny_config: llamajax.Config) -> None:
    (part,) = empty_cache(tiny_config, 1, 128, "float16").parts
    assert isinstance(part, TiledPart) == (jax.default_backend() == "cpu")
    for slots, dtype in ((128, "bfloat16"), (128, "int8"), (100, "float32")):
        (part,) = empty_cache(tiny_config, 1, slots, dtype).parts
        assert type(part.stored) is (QuantizedPart if dtype == "int8" else DensePart)
    with pytest.raises(ValueError, match="a tiled cache of 100 slots: expected a multiple of 64, or a dense cache"):
        KVCache.empty(tiny_config, 1, 100, layout="tiled")
    with pytest.raises(ValueError, match="a tiled cache in int8: expected a float type, or a dense cache"):
        KVCache.empty(tiny_config, 1, 128, "int8", layout="tiled")
    with pytest.raises(ValueError, match="layout 'ring' of a cache: expected dense, straight, scatter or tiled"):
        KVCache.empty(tiny_config, 1, 128, layout="ring")


@pytest.mark.parametrize(("B", "T", "K", "first"), [(1, 64, 2, 100), (3, 70, 4, 600), (2, 100, 1, 0)])
def test_attention_in_blocks_is_attention(B: int, T: int, K: int, first: int) -> None:
    """Attention in blocks and its gradient equal plain attention's, for rows at different positions."""
    rng, S = np.random.default_rng(0), 3 * SLOT_BLOCK
    query_BTNH = jnp.asarray(3 * rng.standard_normal((B, T, 4, 8)), jnp.float32)
    key_BKSH, value_BKSH = (jnp.asarray(rng.standard_normal((B, K, S, 8)), jnp.float32) for _ in range(2))
    position_BT = first + jnp.arange(T) + 3 * jnp.arange(B)[:, None]
    rest = key_BKSH, value_BKSH, position_BT

    def both(function):
        """Returns a function's result and the gradient of the sum of its squares."""

        def total(q):
            mixed = function(q, *rest)
            return jnp.sum(mixed**2), mixed

        (_, mixed), gradient = jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)(query_BTNH)
        return mixed, gradient

    (blocks, blocks_gradient), (plain, plain_gradient) = both(attend_blocks), both(attend)
    np.testing.assert_allclose(blocks, plain, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(blocks_gradient, plain_gradient, rtol=1e-3, atol=1e-4)


def test_long_prompts_do_not_hold_all_scores(tiny_model: llamajax.Llama) -> None:
    """For a cache of 4,096 slots and 256 queries, temporaries take less memory than all scores would."""
    cache = jax.eval_shape(lambda: KVCache.empty(tiny_model.config, 1, 4096))
    tokens_BT = jax.ShapeDtypeStruct((1, 4 * BLOCK_QUERIES), jnp.int32)
    layers = jax.jit(lambda tokens_BT, cache: tiny_model.blocks(tiny_model.embed(tokens_BT), cache))
    memory = layers.lower(tokens_BT, cache).compile().memory_analysis()
    scores = tiny_model.config.num_heads * 256 * 4096 * 4
    assert memory.temp_size_in_bytes < scores
