"""The model against an independent float64 NumPy LLaMA: logits, cache, gradients, precision, compiled program."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llamajax import Config, KVCache, Llama, NoCache, RopeScaling, abstract_model, preset
from llamajax.caches.attention import attend, attend_causal
from llamajax.checkpoint.source import halves_from_pairs
from llamajax.evaluation.evaluate import next_token_losses
from llamajax.norm import RMSNorm
from llamajax.rope import apply_rope, rope_frequencies
from tests import reference
from tests.programs import QUICK
from tests.programs import forward as _forward
from tests.reference import random_model, weights_of

LINEAR = RopeScaling(kind="linear", factor=4.0)
# With these numbers, every head size in these tests has some frequencies kept, some blended and some slowed.
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, original_context_length=128)
BASE = Config(
    vocab_size=50,
    width=32,
    ffn_width=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=512,
)

_step = jax.jit(lambda model, tokens_BT, cache, count_B: model(tokens_BT, cache, count_B))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and its weights for the reference."""

    config: Config
    model: Llama
    weights: reference.Weights

    def expected(self, row: np.ndarray) -> np.ndarray:
        """Returns the reference's logits [T, V] of one sequence."""
        return reference.forward(self.config, self.weights, row)


def _case_of(config: Config, **options) -> Case:
    """Makes a random model with `config`, and its weights for the reference."""
    model = random_model(config, **options)
    return Case(config, model, weights_of(model))


@pytest.fixture(scope="module")
def base() -> Case:
    """A model with GQA and untied embeddings."""
    return _case_of(BASE)


def _some_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    """Draws random token ids from the base vocabulary."""
    return np.random.default_rng(seed).integers(0, BASE.vocab_size, shape).astype(np.int32)


def _assert_close(actual, expected, tolerance) -> None:
    """Asserts that absolute differences are at most `tolerance`; logits here are of order 1, and NaN fails."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= tolerance


# ---- Logits ---------------------------------------------------------------------------------------------------------

# Pairwise covering: every pair of values of two settings occurs in a row: N and K, tied, epsilon, theta, H, D,
# scaling, L.
COVERING = [
    (4, 4, False, 1e-5, 5e5, 8, 24, None, 1),
    (4, 2, True, 1e-3, 5e5, 16, 64, LLAMA3, 2),
    (4, 1, True, 1e-3, 1e4, 32, 40, LINEAR, 1),
    (4, 2, False, 1e-6, 1e4, 32, 128, None, 2),
    (4, 1, False, 1e-5, 1e4, 16, 64, LLAMA3, 3),
    (4, 4, True, 1e-6, 1e4, 8, 24, LLAMA3, 1),
    (4, 4, False, 1e-3, 5e5, 8, 32, LINEAR, 2),
    (4, 1, True, 1e-6, 5e5, 16, 40, LINEAR, 1),
    (6, 2, True, 1e-5, 1e4, 8, 40, LINEAR, 2),
    (4, 1, True, 1e-3, 5e5, 8, 40, None, 2),
    (2, 2, True, 1e-5, 5e5, 32, 64, LLAMA3, 1),
    (3, 3, False, 1e-6, 5e5, 16, 40, None, 2),
]


@pytest.mark.parametrize(("heads", "kv_heads", "tied", "eps", "theta", "size", "width", "scaling", "layers"), COVERING)
def test_logits_equal_reference(heads, kv_heads, tied, eps, theta, size, width, scaling, layers):
    config = Config(
        vocab_size=50,
        width=width,
        ffn_width=40,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=size,
        context_length=64,
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=tied,
    )
    case, tokens = _case_of(config), _some_tokens(2, 12)
    _assert_close(_forward(case.model, tokens), [case.expected(row) for row in tokens], 1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"norm_eps": 1e-6},
        {"norm_eps": 1e-3},
        {"rope_theta": 5e5},
        {"rope_scaling": LINEAR},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": dataclasses.replace(LLAMA3, low_freq_factor=3.0)},
        {"num_heads": 2, "num_kv_heads": 1, "head_size": 16},  # the same matrices, split into other heads
        {"tied_embeddings": True},
    ],
    ids=str,
)
def test_every_setting_changes_the_logits(base, change):
    """Without this test, a setting that both sides ignore, or that has too little effect, would pass the test above."""
    tokens = _some_tokens(2, 24)
    start = {"rope_scaling": LLAMA3} if getattr(change.get("rope_scaling"), "low_freq_factor", 1.0) != 1.0 else {}
    before = random_model(dataclasses.replace(BASE, **start))
    after = random_model(dataclasses.replace(BASE, **start | change))
    difference = np.abs(np.asarray(_forward(before, tokens)) - np.asarray(_forward(after, tokens)))
    assert np.max(difference) > 30 * 1e-4


@pytest.mark.parametrize("name", ["llama3.2-1b", "llama3.1-8b", "llama2-7b"])
def test_rope_frequencies_of_published_models(name):
    config = preset(name)
    actual = np.asarray(rope_frequencies(config.rope("full"), config.head_size))
    expected = reference.frequencies(config)
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


def test_halves_from_pairs_turns_metas_rope_layout_into_ours(base):
    """Weights in Meta's layout run with Meta's RoPE give the same logits as permuted weights run with ours."""
    permuted = {
        name: halves_from_pairs(array, BASE.head_size) if "q_proj" in name or "k_proj" in name else array
        for name, array in base.weights.items()
    }
    row = _some_tokens(12)
    meta = reference.forward(BASE, base.weights, row, neighbours=True)
    _assert_close(reference.forward(BASE, permuted, row), meta, 1e-12)
    assert np.max(np.abs(base.expected(row) - meta)) > 0.1


# ---- Cache ----------------------------------------------------------------------------------------------------------

# These tests always use 2 rows, 32 slots and pieces of 24, 16, 8 or 1 tokens, so that they share 4 programs.
SLOTS = 32


def _run_pieces(case: Case, tokens_BT: np.ndarray, pieces: list[int], slots: int = SLOTS) -> np.ndarray:
    """Feeds all tokens through the cache piece by piece; returns their logits."""
    cache, logits, first = KVCache.empty(case.config, len(tokens_BT), slots, case.model.dtype), [], 0
    for size in pieces:
        part_BTV, cache = _step(case.model, tokens_BT[:, first : first + size], cache, np.full(len(tokens_BT), size))
        logits.append(part_BTV)
        first += size
        np.testing.assert_array_equal(cache.length_B, first)
    assert first == tokens_BT.shape[1]
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("pieces", [[24], [16, 8], [8, 1, 1, 8, 1, 1, 1, 1, 1, 1], [1] * 24], ids=str)
def test_pieces_agree_with_reference_and_whole(base, pieces):
    tokens = _some_tokens(2, 24)
    logits = _run_pieces(base, tokens, pieces)
    _assert_close(logits, [base.expected(row) for row in tokens], 1e-5)
    _assert_close(logits, _forward(base.model, tokens), 1e-5)


def test_count_is_all_tokens_unless_given(base):
    tokens, cache = _some_tokens(2, 8), KVCache.empty(BASE, 2, SLOTS)
    logits, after = _step(base.model, tokens, cache, None)
    np.testing.assert_array_equal(after.length_B, 8)
    _assert_close(logits, _run_pieces(base, tokens, [8]), 1e-5)
    np.testing.assert_array_equal(cache.length_B, 0)  # the argument is unchanged: nothing is mutated
    assert not cache.parts[0].key_LBKSH.any()


def test_several_query_blocks_agree_with_cache_and_reference(base):
    """For more than 128 tokens, `attend_causal` processes the queries in blocks."""
    tokens = _some_tokens(1, 300)
    blocks = _forward(base.model, tokens)
    _assert_close(blocks, [base.expected(tokens[0])], 1e-4)
    _assert_close(_run_pieces(base, tokens, [300], slots=300), blocks, 1e-5)


@pytest.mark.parametrize("length", [130, 1030])
def test_attend_causal_at_uneven_lengths(length):
    """130 tokens leave a last block of 2; 1030 need blocks longer than 128, because there are at most 8 blocks."""
    query, key, value = np.random.default_rng(0).standard_normal((3, 1, length, 2, 4)).astype(np.float32)
    position_1T, keys = np.arange(length, dtype=np.int32)[None], key.swapaxes(1, 2)
    actual = jax.jit(attend_causal)(query * np.float32(0.5), keys, value.swapaxes(1, 2), position_1T)  # 0.5: 1/sqrt(4)
    wide = (array[0].astype(np.float64) for array in (query, key, value))
    expected = [reference.causal_attention(*head) for head in zip(*(np.moveaxis(x, 1, 0) for x in wide), strict=True)]
    _assert_close(actual[0], np.stack(expected, axis=1), 1e-5)


def test_rows_of_different_length_equal_each_row_alone(base):
    """Rows are fed in four ragged pieces; the padding consists of random ids, which must not matter."""
    plan = [(16, (16, 3)), (1, (1, 0)), (8, (5, 8)), (1, (1, 1))]
    rows = [_some_tokens(sum(counts[b] for _, counts in plan), seed=b) for b in range(2)]
    cache, got, taken = KVCache.empty(BASE, 2, SLOTS), [[], []], [0, 0]
    for size, counts in plan:
        tokens_BT = _some_tokens(2, size, seed=99)
        for b, count in enumerate(counts):
            tokens_BT[b, :count] = rows[b][taken[b] : taken[b] + count]
        logits, cache = _step(base.model, tokens_BT, cache, np.asarray(counts))
        for b, count in enumerate(counts):
            got[b].append(logits[b, :count])
            taken[b] += count
        np.testing.assert_array_equal(cache.length_B, taken)
    for b in range(2):
        _assert_close(np.concatenate(got[b]), base.expected(rows[b]), 1e-5)


def test_what_free_slots_hold_does_not_matter(base):
    empty, tokens = KVCache.empty(BASE, 2, SLOTS), _some_tokens(2, 8)
    key, value = empty.state.values()
    garbage = empty.with_state([jnp.full_like(key, 1e4), jnp.full_like(value, -1e4)], empty.length_B)
    logits, _ = _step(base.model, tokens, garbage, np.array([8, 8]))
    _assert_close(logits, [base.expected(row) for row in tokens], 1e-5)


def test_only_the_row_that_overflows_is_nan(base):
    """24 and 16 of 32 slots are taken, and 16 tokens are added: the first row does not fit, the second just fits."""
    rows = _some_tokens(2, 40)
    _, cache = _step(base.model, rows[:, :24], KVCache.empty(BASE, 2, SLOTS), np.array([24, 16]))
    logits, _ = _step(base.model, np.stack([rows[0, 24:40], rows[1, 16:32]]), cache, np.array([16, 16]))
    assert np.isnan(logits[0]).all()
    _assert_close(logits[1], base.expected(rows[1, :32])[16:], 1e-5)


def test_a_row_that_overflowed_stays_nan(base):
    """24 of 32 slots are taken; a padded piece of 16, of which 1 token counts, does not fit: the row stays NaN."""
    rows = _some_tokens(2, 26)
    _, cache = _step(base.model, rows[:, :24], KVCache.empty(BASE, 2, SLOTS), np.array([24, 24]))
    logits, cache = _step(base.model, np.pad(rows[:, 24:25], ((0, 0), (0, 15))), cache, np.array([1, 1]))
    assert np.isnan(logits).all()
    logits, _ = _step(base.model, rows[:, 25:26], cache, np.array([1, 1]))
    assert np.isnan(logits).all()


@pytest.mark.parametrize("batch", [1, 2])
def test_more_tokens_than_slots_is_an_error(base, batch):
    with pytest.raises(ValueError, match="9 tokens do not fit a cache of 8 slots: make the cache larger"):
        base.model(_some_tokens(batch, 9), KVCache.empty(BASE, batch, 8))


@pytest.mark.parametrize("bad", [BASE.vocab_size, BASE.vocab_size + 7, np.iinfo(np.int32).max])
def test_unknown_token_gives_nan_in_its_row_only(base, bad):
    tokens = _some_tokens(2, 12)
    tokens[0, 5] = bad
    logits = _forward(base.model, tokens)
    assert np.isnan(logits[0, 5:]).all()
    _assert_close(logits[1], base.expected(tokens[1]), 1e-5)


# ---- Transformations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_gradient_equals_finite_differences_of_reference(tied):
    """Checks each tensor of each layer along a random direction, at its largest gradient entry and at a random one."""
    config = dataclasses.replace(BASE, width=16, ffn_width=20, head_size=4, rope_scaling=LLAMA3, tied_embeddings=tied)
    case, rows, rng = _case_of(config), _some_tokens(2, 7), np.random.default_rng(1)
    gradient = jax.jit(jax.grad(lambda model: next_token_losses(model, rows).mean()), compiler_options=QUICK)
    gradients = weights_of(gradient(case.model))
    assert gradients.keys() == case.weights.keys()
    for name, gradient in gradients.items():
        largest, other = np.zeros((2, *gradient.shape))
        largest.flat[np.abs(gradient).argmax()] = 1
        other.flat[rng.integers(gradient.size)] = 1
        everywhere = rng.standard_normal(gradient.shape) / np.sqrt(gradient.size)
        for direction in (largest, other, everywhere):
            shifted = [case.weights | {name: case.weights[name] + shift * direction} for shift in (1e-4, -1e-4)]
            above, below = (reference.loss(config, weights, rows) for weights in shifted)
            expected = (above - below) / 2e-4
            assert np.sum(gradient * direction) == pytest.approx(expected, rel=1e-3, abs=1e-6), name
        assert np.abs(gradient).max() > 1e-4, f"the gradient of {name} is nearly zero"


def test_losses_equal_reference(base):
    rows = _some_tokens(3, 9)
    losses = jax.jit(next_token_losses, compiler_options=QUICK)(base.model, rows)
    assert losses.shape == (3, 8)
    assert float(losses.mean()) == pytest.approx(reference.loss(BASE, base.weights, rows), abs=1e-5)


def test_vmap_over_models(base):
    other, tokens = _case_of(BASE, seed=1), _some_tokens(1, 12)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), base.model, other.model)
    logits = jax.jit(jax.vmap(lambda model: model(tokens)[0]), compiler_options=QUICK)(stacked)
    _assert_close(logits[:, 0], [case.expected(tokens[0]) for case in (base, other)], 1e-4)


def test_without_jit_and_without_cache(base):
    tokens = _some_tokens(1, 12)
    logits, cache = base.model(tokens)
    assert cache == NoCache() and logits.dtype == jnp.float32
    _assert_close(logits, _forward(base.model, tokens), 1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"),  # parameter counts of the released weights: bytes of their safetensors / 2
    [("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496), ("llama3.2-1b", 1_235_814_400)],
)
def test_abstract_model_allocates_nothing(name, parameters):
    config = preset(name)
    abstract = abstract_model(config, jnp.bfloat16)
    leaves = jax.tree.leaves(abstract)
    assert all(type(leaf) is jax.ShapeDtypeStruct and leaf.dtype == jnp.bfloat16 for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == parameters == config.num_parameters
    logits = jax.eval_shape(_forward, abstract, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    assert (logits.shape, logits.dtype) == ((1, 8, config.vocab_size), jnp.float32)


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


def _rounded(array: np.ndarray) -> np.ndarray:
    """Rounds to bfloat16 and converts back to float64."""
    return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64)


def test_bfloat16_model_is_close_to_reference():
    """Both sides use the same rounded weights; activations are rounded about 20 times before a logit.

    Each rounding is off by 2**-9 / sqrt(3). In all that is 0.5% if the errors add up as random numbers do and the
    layers do not amplify them; twice that was measured.
    """
    case, tokens = _case_of(BASE, dtype=jnp.bfloat16), _some_tokens(2, 136)  # 136 tokens: two blocks of queries
    expected = np.stack([case.expected(row) for row in tokens])
    for logits in (_forward(case.model, tokens), _run_pieces(case, tokens[:, :24], [16, 8])):
        assert logits.dtype == jnp.float32
        error = np.asarray(logits, np.float64) - expected[:, : logits.shape[1]]
        assert np.sqrt(np.mean(error**2)) < 0.02 * np.std(expected)
        assert np.max(np.abs(error)) < 0.1 * np.std(expected)


def test_rms_norm_is_computed_in_float32():
    """The result is float64's, rounded once; in bfloat16, the root and the product would each be rounded as well."""
    x = _rounded(np.random.default_rng(0).standard_normal((1, 4, 1024)))
    actual = np.asarray(RMSNorm(1024, 1e-5, jnp.bfloat16)(jnp.asarray(x, jnp.bfloat16)), np.float64)
    expected = _rounded(reference.rms_norm(x, np.ones(1024), 1e-5))
    assert np.mean(actual == expected) > 0.999


@pytest.mark.parametrize(("magnitude", "finite"), [(1e18, True), (1e30, False)])
def test_rms_norm_of_squares_beyond_float32_is_nan(magnitude, finite):
    """The norm is NaN rather than 0, which would give finite but meaningless logits."""
    x = np.random.default_rng(0).standard_normal((1, 2, 64)).astype(np.float32)
    x[0, 0] *= np.float32(magnitude)
    norm = RMSNorm(64, 1e-5, jnp.float32)
    for actual in (norm(jnp.asarray(x)), jax.jit(lambda norm, x: norm(x))(norm, x)):
        np.testing.assert_allclose(actual[0, 1], reference.rms_norm(x[0, 1], np.ones(64), 1e-5), rtol=1e-5)
        if finite:
            np.testing.assert_allclose(actual[0, 0], reference.rms_norm(x[0, 0], np.ones(64), 1e-5), rtol=1e-5)
        else:
            assert np.isnan(actual[0, 0]).all()


def test_rope_is_computed_in_float32():
    """In bfloat16, positions 4096 and 4097 would be the same. Angles in float32 are off by up to 4097 * 2**-24."""
    frequency = reference.frequencies(dataclasses.replace(BASE, head_size=16))
    head = _rounded(np.random.default_rng(0).standard_normal(16))
    positions = [255, 256, 257, 4096, 4097]
    x = jnp.broadcast_to(jnp.asarray(head, jnp.bfloat16), (1, len(positions), 1, 16))
    actual = apply_rope(x, jnp.asarray([positions]), jnp.asarray(frequency, jnp.float32))
    assert actual.dtype == jnp.bfloat16
    expected = np.stack([reference.rotate(head, position, frequency) for position in positions])
    np.testing.assert_allclose(np.asarray(actual[0, :, 0], np.float64), expected, rtol=2**-8, atol=1e-3)
    assert np.max(np.abs(expected[4] - expected[3])) > 0.5


def test_softmax_is_computed_in_float32():
    """Scores are about 140, where bfloat16 has steps of 1: attention weights would be off by a factor of e^0.5."""
    query, key, value = _rounded(np.random.default_rng(0).standard_normal((3, 16, 16)))
    query[:, 0], key[:, 0] = 24, 24  # adds 24 * 24 / sqrt(16) to every score, so that the other components decide
    inputs = [jnp.asarray(array, jnp.bfloat16)[None, :, None] for array in (query / 4, key, value)]
    position = jnp.arange(16)[None]
    actual = attend(inputs[0], inputs[1].swapaxes(1, 2), inputs[2].swapaxes(1, 2), position)
    expected = reference.causal_attention(query, key, value)
    assert actual.dtype == jnp.bfloat16
    _assert_close(actual[0, :, 0], expected, 2**-7 * np.max(np.abs(value)))


# ---- The compiled program -------------------------------------------------------------------------------------------


def _abstract_step(config: Config, batch: int) -> tuple:
    """Returns the arguments of one decode step as shapes."""
    cache = jax.eval_shape(lambda: KVCache.empty(config, batch, SLOTS))
    tokens_BT, count_B = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, 1), (batch,)))
    return abstract_model(config), tokens_BT, cache, count_B


def test_program_does_not_grow_with_depth():
    def lines(layers: int) -> list[int]:
        config = dataclasses.replace(BASE, num_layers=layers)
        model, tokens_BT = abstract_model(config), jax.ShapeDtypeStruct((2, 8), jnp.int32)
        loss = jax.jit(jax.grad(lambda model, tokens_BT: next_token_losses(model, tokens_BT).mean()))
        lowered = _step.lower(*_abstract_step(config, 2)), loss.lower(model, tokens_BT)
        return [len(program.as_text().splitlines()) for program in lowered]

    assert lines(2) == lines(12)


@pytest.mark.parametrize("batch", [1, 3])
def test_cache_is_written_by_dynamic_update_slice(batch):
    text = _step.lower(*_abstract_step(BASE, batch)).as_text()
    assert "stablehlo.scatter" not in text
    cache = f"tensor<2x{batch}x2x32x8xf32>"
    updates = [line for line in text.splitlines() if "stablehlo.dynamic_update_slice" in line and cache in line]
    assert len(updates) == 2  # keys and values


@pytest.mark.parametrize("batch", [1, 3])
def test_donated_cache_is_updated_in_place(base, batch):
    """The returned cache occupies the argument's buffers, and the compiled program contains no copy of them."""
    donating = jax.jit(lambda model, tokens_BT, cache: model(tokens_BT, cache), donate_argnames=("cache",))
    cache, tokens = KVCache.empty(BASE, batch, SLOTS), _some_tokens(batch, 1)
    compiled = donating.lower(base.model, tokens, cache).compile()
    arrays = list(cache.state.values())
    before = [array.unsafe_buffer_pointer() for array in arrays]
    _, after = compiled(base.model, tokens, cache)
    assert len(arrays) == 2 and all(array.is_deleted() for array in arrays)
    assert before == [array.unsafe_buffer_pointer() for array in after.state.values()]
    assert not re.search(rf"= f32\[2,{batch},2,32,8\]\S* copy\(", compiled.as_text())
