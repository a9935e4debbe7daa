"""Sampling: which tokens the knobs keep, draws from the tokens that are left, independence of rows."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamajax import LlamaJaxError, Sampler, make_sampler, sample
from llamajax.generation.noise import gumbel_noise
from llamajax.generation.sampling import NEUTRAL, filter_logits

V = 16
OFF = {"temperature": 1.0, "top_k": V, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
KNOBS = {
    "temperature": st.floats(0.05, 5),
    "top_k": st.integers(1, V + 3),
    "top_p": st.floats(0.01, 0.999),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.5, 2),
}
# In float32, a token this close to a threshold may fall on either side of it.
MARGIN = 1e-4

_filter = jax.jit(filter_logits)
_sample = jax.jit(sample)
_thorough = settings(max_examples=80, deadline=None, derandomize=True)
_seeds = st.integers(0, 1 << 30)


def _expected_filter(logits: np.ndarray, seen: np.ndarray, knobs: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Applies the knobs by their definitions, one token at a time, in float64.

    Returns:
        The logits after penalty and temperature, which tokens are kept, and which are too close to a threshold to tell.
    """
    knobs = OFF | knobs
    penalty = knobs["repetition_penalty"]
    x = [logit / penalty if logit > 0 else logit * penalty for logit in np.asarray(logits, np.float64)]
    x = np.where(seen, x, np.asarray(logits, np.float64)) / knobs["temperature"]
    kept, unsure, near = np.ones(V, bool), np.zeros(V, bool), MARGIN * max(1.0, np.abs(x).max())
    for i in range(V):
        # Top-k: a token stays if fewer than k tokens are likelier, so ties with the k-th stay.
        kept[i] = np.sum(x > x[i]) < knobs["top_k"]
        unsure[i] = np.sum(x > x[i] + near) < knobs["top_k"] <= np.sum((x > x[i] - near) & (x != x[i]))
    left = kept | unsure
    power = np.exp(x - x.max())
    probability = np.where(kept, power, 0) / power[kept].sum()
    for i in np.flatnonzero(left):
        # Top-p: a token stays if the tokens before it (likelier, or tied with a lower id) do not reach the probability.
        before = np.sum(probability[(x > x[i]) | ((x == x[i]) & (np.arange(V) < i))])
        # Min-p: a token stays if it has at least this fraction of the likeliest's probability.
        kept[i] &= (before < knobs["top_p"] or knobs["top_p"] == 1) and power[i] >= knobs["min_p"]
        unsure[i] |= abs(before - knobs["top_p"]) < MARGIN and knobs["top_p"] < 1
        unsure[i] |= 0 < abs(power[i] - knobs["min_p"]) < MARGIN * knobs["min_p"]
    return x, kept, unsure


def _check_filter(logits: np.ndarray, seen: np.ndarray, knobs: dict) -> None:
    sampler = make_sampler(**{"temperature": 1.0} | knobs)
    actual = np.asarray(_filter(jnp.asarray(logits)[None], sampler, jnp.asarray(seen)[None])[0], np.float64)
    x, kept, unsure = _expected_filter(logits, seen, knobs)
    np.testing.assert_array_equal((actual > -1e29)[~unsure], kept[~unsure])
    both = kept & (actual > -1e29)
    np.testing.assert_allclose(actual[both], x[both], rtol=1e-5, atol=1e-6)
    assert actual[x.argmax()] > -1e29  # the likeliest token stays, whatever the knobs
    np.testing.assert_array_equal(actual[actual <= -1e29], np.float32(-1e30))


# ---- What is kept ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOBS)
@_thorough
@given(seed=_seeds, data=st.data())
def test_each_knob_alone(name, seed, data):
    """Logits are small integers, so that there are ties."""
    rng = np.random.default_rng(seed)
    _check_filter(rng.integers(-6, 7, V).astype(np.float32), rng.random(V) < 0.5, {name: data.draw(KNOBS[name])})


@_thorough
@given(seed=_seeds, spread=st.floats(0.05, 1), knobs=st.fixed_dictionaries(KNOBS))
def test_all_knobs_together(seed, spread, knobs):
    """Knobs apply in order: penalty, temperature, top-k, top-p of the tokens left, min-p. No logits are tied."""
    rng = np.random.default_rng(seed)
    logits = spread * (rng.permutation(V) + rng.uniform(-0.4, 0.4, V) - V / 2)
    _check_filter(logits.astype(np.float32), rng.random(V) < 0.5, knobs)


def test_knobs_that_are_off_change_nothing():
    logits = np.random.default_rng(0).standard_normal((3, V)).astype(np.float32)
    np.testing.assert_array_equal(filter_logits(logits, make_sampler()), logits)
    np.testing.assert_array_equal(filter_logits(logits, make_sampler(temperature=0, top_k=1)), logits)


def test_top_p_of_one_keeps_everything():
    """transformers keeps everything as well."""
    logits = np.array([[0.0, -20.0, -21.0]], np.float32)
    np.testing.assert_array_equal(filter_logits(logits, make_sampler(top_p=1.0)), logits)


def test_known_example():
    """Probabilities are 0.5, 0.25, 0.15 and 0.1; results are worked out by hand."""
    logits = jnp.log(jnp.asarray([[0.25, 0.1, 0.5, 0.15]]))
    kept = lambda **knobs: np.flatnonzero(filter_logits(logits, make_sampler(**knobs))[0] > -1e29).tolist()  # noqa: E731
    assert kept(top_k=2) == [0, 2]
    assert kept(top_p=0.4) == [2]
    assert kept(top_p=0.6) == [0, 2]
    assert kept(top_p=0.8) == [0, 2, 3]
    assert kept(min_p=0.25) == [0, 2, 3]
    assert kept(min_p=0.4) == [0, 2]
    # Top-p applies to the tokens that top-k leaves: 0.5 / 0.75 exceeds 0.6, so the likeliest alone suffices.
    assert kept(top_k=2, top_p=0.6) == [2]


def test_top_p_keeps_the_fewest_of_equally_likely_tokens():
    """Of four tied tokens, the first one to four stay, also if an earlier knob excludes the others."""
    logits = np.full((7, V), -3.0, np.float32)
    logits[:, [1, 2, 4, 9]] = 1.0
    top_p = [0.1, 0.25, 0.26, 0.5, 0.74, 0.76, 1.0]
    filtered = np.asarray(_filter(logits, make_sampler(top_k=4, top_p=top_p)))
    for row, fewest in zip(filtered, [1, 1, 2, 2, 3, 4, 4], strict=True):
        assert np.flatnonzero(row > -1e29).tolist() == [1, 2, 4, 9][:fewest]
    flat = np.asarray(filter_logits(np.zeros((1, 1024), np.float32), make_sampler(top_p=0.25)))
    assert np.flatnonzero(flat[0] > -1e29).tolist() == list(range(256))


def _sorted_filter(logits: np.ndarray, knobs: dict) -> tuple[np.ndarray, np.ndarray]:
    """Returns which tokens a stable sort in float64 keeps, and which are too close to top-p's threshold to tell."""
    x = logits.astype(np.float64)
    order = np.argsort(-x, kind="stable")
    ranked = x[order]
    left = ranked >= ranked[min(knobs["top_k"], len(x)) - 1]
    power = np.where(left, np.exp(ranked - ranked[0]), 0)
    before = (np.cumsum(power) - power) / power.sum()
    end = knobs["top_p"] if knobs["top_p"] < 1 else 2
    kept, unsure = np.zeros(len(x), bool), np.zeros(len(x), bool)
    kept[order] = left & (before < end) & (np.exp(ranked - ranked[0]) >= knobs["min_p"])
    unsure[order] = abs(before - end) < 1e-5
    return kept, unsure


def test_a_large_vocabulary_with_ties_against_a_sort():
    """Logits in steps of 1/8 make thousands equal; some are minus infinity; one row is all equal, one all zeros."""
    size, rng = 50_000, np.random.default_rng(0)
    logits = np.round(rng.standard_normal((12, size)) * 24).astype(np.float32) / 8
    logits[1, rng.random(size) < 0.7] = -np.inf
    logits[2] = -7.25
    logits[3] = np.where(rng.random(size) < 0.5, 0.0, -0.0)
    logits[4] = np.where(np.arange(size) == 7, 1e30, -1e20)
    logits[5] *= 1e-41  # subnormal numbers, which XLA may take for zeros
    logits[6, 3:] = -np.inf
    top_k = [40, 1 << 30, 1000, 1, 2, 1 << 30, 10, 49_999, 1 << 30, 50_000, 3, 1 << 30]
    top_p = [0.9, 0.95, 1.0, 0.5, 1.0, 0.25, 1.0, 0.999, 0.01, 1.0, 0.4, 0.7]
    min_p = [0, 0, 0, 0, 0, 0, 0, 0.01, 0, 0.05, 0, 0]
    filtered = np.asarray(_filter(logits, make_sampler(top_k=top_k, top_p=top_p, min_p=min_p)))
    for i in range(12):
        knobs = {"top_k": top_k[i], "top_p": top_p[i], "min_p": min_p[i]}
        x = logits[i] if i != 5 else np.zeros(size, np.float32)
        kept, unsure = _sorted_filter(x, knobs)
        actual = filtered[i] > -1e29
        # A token with a logit of minus infinity may be kept: it cannot be drawn.
        possible = np.isfinite(x) & ~unsure
        np.testing.assert_array_equal(actual[possible], kept[possible], err_msg=str(i))
        assert unsure.sum() < 500 and np.array_equal(filtered[i][actual], x[actual])


def test_of_tied_tokens_the_first_are_kept_to_the_last_one():
    """Of 50,000 tied tokens, top-p keeps exactly the share it asks for, from the lowest id on; top-k keeps all."""
    logits = np.full((12, 50_000), 3.5, np.float32)
    fewest = [1, 2, 3, 127, 128, 129, 25_000, 32_768, 49_151, 49_152, 49_999, 50_000]
    top_p = [(count - 0.5) / 50_000 for count in fewest]
    filtered = np.asarray(_filter(logits, make_sampler(top_k=[9] * 12, top_p=top_p, min_p=[0.5] * 12)))
    assert [np.flatnonzero(row > -1e29).tolist() for row in filtered] == [list(range(count)) for count in fewest]


# ---- What is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [None, 3.0])
def test_greedy_is_argmax_and_ignores_keys(penalty):
    logits = np.random.default_rng(0).standard_normal((32, V)).astype(np.float32)
    seen = np.random.default_rng(1).random((32, V)) < 0.5
    sampler = make_sampler(temperature=0, top_k=3, repetition_penalty=penalty)
    penalized = np.where(seen & (logits > 0), logits / (penalty or 1), np.where(seen, logits * (penalty or 1), logits))
    assert penalty is None or (penalized.argmax(1) != logits.argmax(1)).any()
    for seed in (0, 1):
        token, _ = _sample(logits, jax.random.split(jax.random.key(seed), 32), sampler, seen)
        np.testing.assert_array_equal(token, penalized.argmax(axis=1))
        assert token.dtype == jnp.int32


def _tied(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.integers(-3, 4, (rows, V)).astype(np.float32)


@pytest.mark.parametrize("knobs", [{}, {"top_k": 9, "top_p": 0.3, "min_p": 1.0, "repetition_penalty": 1.3}])
def test_rows_of_temperature_0_get_the_likeliest_token(knobs):
    """Greedy rows may stand beside sampled rows, which draw what they draw alone; temperatures may be traced."""
    rng, n = np.random.default_rng(0), 64
    logits, seen = _tied(rng, n), rng.random((n, V)) < 0.5
    logits[: n // 2] *= 1e30
    key = jax.random.split(jax.random.key(0), n)
    temperature = np.where(np.arange(n) % 2, 1.0, 0.0)
    token, log_probability = _sample(logits, key, make_sampler(temperature=temperature, **knobs), seen)
    assert np.isfinite(log_probability).all()
    greedy, _ = _sample(logits, key, make_sampler(temperature=0, **knobs), seen)
    warm, _ = _sample(logits, key, make_sampler(temperature=1.0, **knobs), seen)
    penalty = knobs.get("repetition_penalty", 1)
    penalized = np.where(seen, np.where(logits > 0, logits / np.float32(penalty), logits * np.float32(penalty)), logits)
    np.testing.assert_array_equal(greedy, penalized.argmax(axis=1))
    np.testing.assert_array_equal(token, np.where(temperature == 0, greedy, warm))

    @jax.jit
    def traced(temperature):
        sampler = dataclasses.replace(make_sampler(temperature=1.0, **knobs), temperature=temperature)
        return sample(logits, key, sampler, seen)[0], filter_logits(logits, sampler, seen)

    for cold in (0.0, -0.0, 1e-45, 9e-5):
        token, filtered = traced(jnp.full(n, cold, jnp.float32))
        np.testing.assert_array_equal(token, greedy)
        assert np.isfinite(filtered).all()


def test_draws_are_those_of_jax_random_categorical():
    """We add the noise ourselves, but seeds that people have written down must keep giving the same text."""
    logits = np.random.default_rng(0).standard_normal((100, V)).astype(np.float32)
    key = jax.random.split(jax.random.key(3), 100)
    expected = jax.vmap(jax.random.categorical)(key, logits)
    np.testing.assert_array_equal(_sample(logits, key, make_sampler())[0], expected)


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_log_probability_says_that_logits_are_not_finite(bad, temperature):
    """Only that row's log-probability is not finite. A logit of minus infinity is valid: its token cannot be drawn."""
    logits = np.random.default_rng(0).standard_normal((3, V)).astype(np.float32)
    logits[1, 5], logits[2, 5] = bad, -np.inf
    token, log_probability = _sample(
        logits, jax.random.split(jax.random.key(0), 3), make_sampler(temperature=temperature)
    )
    np.testing.assert_array_equal(np.isfinite(log_probability), [True, False, True])
    assert token[2] != 5


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 1.0},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
    ],
    ids=["plain", "all"],
)
def test_draws_follow_the_filtered_softmax(knobs):
    """The total variation distance of 20,000 draws is small.

    Its mean is at most sqrt(V / n) / 2 = 0.014, and one draw changes it by at most 1 / n, so that (McDiarmid) it is
    more than 0.02 above its mean with a probability of at most exp(-2 * 20000 * 0.02**2) = 1e-7.
    """
    n, rng = 20_000, np.random.default_rng(0)
    logits, seen = (rng.standard_normal(V) * 1.5).astype(np.float32), rng.random(V) < 0.5
    x, kept, unsure = _expected_filter(logits, seen, knobs)
    assert not unsure.any() and (kept.sum() < V or len(knobs) == 1)
    probability = np.where(kept, np.exp(x), 0) / np.sum(np.exp(x)[kept])
    token, log_probability = _sample(
        jnp.broadcast_to(logits, (n, V)),
        jax.random.split(jax.random.key(0), n),
        make_sampler(**knobs),
        jnp.broadcast_to(seen, (n, V)),
    )
    counts = np.bincount(token, minlength=V)
    assert not counts[~kept].any()
    assert np.abs(counts / n - probability).sum() / 2 < 0.034
    # The log-probability is the model's own, before any knob.
    expected = logits - np.log(np.sum(np.exp(logits.astype(np.float64))))
    np.testing.assert_allclose(log_probability, expected[np.asarray(token)], atol=1e-5)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_noise_is_that_of_jax_random_gumbel(impl):
    """Our noise equals jax.random.gumbel's bit for bit, for both kinds of keys."""
    key = jax.random.split(jax.random.key(5, impl=impl), 3)
    for size in (1, 1000):
        expected = jax.jit(jax.vmap(lambda one, size=size: jax.random.gumbel(one, (size,), jnp.float32)))(key)
        np.testing.assert_array_equal(jax.jit(gumbel_noise, static_argnums=1)(key, size), expected)


@pytest.mark.parametrize(
    "knobs",
    [
        {"top_p": 0.95},
        {"top_k": 40, "min_p": 0.1},
        {"top_k": 9_000},
        {"top_k": 9_000, "top_p": 0.6},
        {"top_p": 0.9, "min_p": 0.3},
        {"top_k": 10_000, "top_p": 0.99, "min_p": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("narrows", [True, False])
def test_draws_from_a_large_vocabulary(knobs, narrows):
    """Draws follow a sort's filter and the noise of jax.random, whether few tokens are likely or all of them.

    The vocabulary ends within a block of neighbours. Logits in steps of 1/8 are tied, also where top-p ends.
    """
    size, rows, rng = 20_011, 24, np.random.default_rng(3)
    spread = np.repeat([8.0, 4.0, 2.0, 0.2, 0.0, 30.0], 4)[:, None]
    logits = (np.round(rng.standard_normal((rows, size)) * spread * 8) / 8).astype(np.float32)
    logits[::4, rng.random(size) < 0.5] = -np.inf
    logits[1::4, -5:] = spread[1::4] * 4  # likely tokens at the end, in the incomplete block
    key = jax.random.split(jax.random.key(2), rows)
    noise = np.asarray(jax.vmap(lambda one: jax.random.gumbel(one, (size,), jnp.float32))(key))
    token, _ = jax.jit(functools.partial(sample, narrows=narrows))(logits, key, make_sampler(**knobs))
    sure = 0
    for i in range(rows):
        kept, unsure = _sorted_filter(logits[i], {"top_k": 1 << 30, "top_p": 1.0, "min_p": 0.0} | knobs)
        assert kept[token[i]] or unsure[token[i]]
        chances = np.where(kept, logits[i] + noise[i], -np.inf)
        if not unsure.any():
            assert token[i] == chances.argmax()
            sure += 1
    assert sure > rows // 2


MIXED = {
    "temperature": [0, 0.8, 0, 1.0, 0, 1.3],
    "top_k": [1 << 30, 1 << 30, 3, 5, 1 << 30, 1 << 30],
    "top_p": [1.0, 0.9, 0.5, 1.0, 1.0, 1.0],
    "min_p": [0.0, 0.0, 0.0, 0.1, 0.0, 0.0],
    "repetition_penalty": [1.0, 1.0, 1.0, 1.0, 1.5, 1.2],
}


def test_a_row_beside_rows_of_other_knobs_gives_exactly_what_it_gives_alone():
    """Greedy and sampled rows have every knob, off at its neutral value; in a lone row, a knob that is off is None."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, V)).astype(np.float32)
    seen, key = rng.random((6, V)) < 0.5, jax.random.split(jax.random.key(1), 6)
    token, log_probability = _sample(logits, key, make_sampler(**MIXED), seen)
    for i in range(6):
        row = slice(i, i + 1)
        samplers = [Sampler(**{name: jnp.asarray([values[i]], NEUTRAL[name].dtype) for name, values in MIXED.items()})]
        if i < 2:
            knobs = {name: None if values[i] == NEUTRAL[name] else values[i] for name, values in MIXED.items()}
            samplers.append(make_sampler(**knobs | {"temperature": MIXED["temperature"][i]}))
        for sampler in samplers:
            alone = _sample(logits[row], key[row], sampler, seen[row])
            assert (alone[0][0], alone[1][0]) == (token[i], log_probability[i])


def test_what_no_row_uses_is_not_executed():
    """Noise, powers of logits, thresholds and penalties are in branches; outside are only two passes over logits.

    Only these computations have loops, shifts and divisions.
    """

    def outside(jaxpr) -> set[str]:
        names = {equation.primitive.name for equation in jaxpr.eqns if equation.primitive.name != "cond"}
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("jit", "pjit", "closed_call"):
                names |= outside(equation.params["jaxpr"].jaxpr)
        return names

    traced = jax.make_jaxpr(sample)(
        jnp.zeros((6, V)), jax.random.split(jax.random.key(0), 6), make_sampler(**MIXED), jnp.zeros((6, V), bool)
    )
    costly = {"while", "scan", "shift_right_logical", "div", "sort", "cumsum", "random_bits"}
    assert "cond" in {equation.primitive.name for equation in traced.jaxpr.eqns}
    assert not costly & outside(traced.jaxpr)
    text = str(traced)
    assert all(name in text for name in ("while", "shift_right_logical", "div")) and "sort[" not in text


def test_a_row_depends_on_its_own_logits_and_key_only():
    """The same rows in another order, and beside other rows, draw the same tokens."""
    rng, sampler = np.random.default_rng(0), make_sampler(temperature=2.0, top_k=12, top_p=0.95)
    logits = rng.standard_normal((64, V)).astype(np.float32)
    key = jax.random.split(jax.random.key(0), 64)
    token, log_probability = _sample(logits, key, sampler)
    order = rng.permutation(64)
    moved = _sample(logits[order], key[order], sampler)
    np.testing.assert_array_equal(moved[0], token[order])
    np.testing.assert_allclose(moved[1], log_probability[order], atol=1e-6)
    others = np.concatenate([logits[:8], rng.standard_normal((56, V)).astype(np.float32)])
    np.testing.assert_array_equal(_sample(others, key, sampler)[0][:8], token[:8])
    for row in range(3):
        assert _sample(logits[row : row + 1], key[row : row + 1], sampler)[0][0] == token[row]
    # A row does depend on both: with other keys or other logits, some row draws differently.
    assert (_sample(logits, key[order], sampler)[0] != token).any()
    assert (_sample(logits[order], key, sampler)[0] != token).any()


def test_one_value_a_row_equals_each_row_with_its_value():
    logits = np.random.default_rng(0).standard_normal((3, V)).astype(np.float32)
    seen = np.random.default_rng(1).random((3, V)) < 0.5
    rows = {
        "temperature": [0.5, 1.0, 3.0],
        "top_k": [12, 5, 9],
        "top_p": [0.9, 1.0, 0.5],
        "min_p": [0.0, 0.1, 0.02],
        "repetition_penalty": [1.0, 1.3, 0.7],
    }
    together = _filter(logits, make_sampler(**rows), seen)
    for i in range(3):
        sampler = make_sampler(**{name: values[i] for name, values in rows.items()})
        np.testing.assert_array_equal(together[i], _filter(logits[i : i + 1], sampler, seen[i : i + 1])[0])


def test_numbers_of_numpy_and_jax_are_those_of_python():
    rows = {"temperature": [0.5, 1.0], "top_k": [12, 5], "top_p": [0.5, 1.0], "min_p": [0.0, 0.25]}
    expected = jax.tree.leaves(make_sampler(**rows))
    kinds = [np.asarray, jnp.asarray, tuple, lambda values: [np.asarray(value)[()] for value in values]]
    kinds.append(lambda values: [jnp.asarray(value) for value in values])
    for kind in kinds:
        actual = jax.tree.leaves(make_sampler(**{name: kind(values) for name, values in rows.items()}))
        assert all(map(np.array_equal, actual, expected)) and [x.dtype for x in actual] == [x.dtype for x in expected]
    for half in (np.float32(0.5), np.float16(0.5), jnp.bfloat16(0.5), jnp.asarray(0.5), np.asarray(0.5, jnp.bfloat16)):
        assert make_sampler(temperature=half).temperature == 0.5
    assert make_sampler(temperature=np.float32(0), top_k=np.int8(3)).temperature is None


# ---- The knobs ------------------------------------------------------------------------------------------------------

WHOLE, PENALTY = r"expected a whole number from 1 to 2\*\*30", "expected a positive number, 1 for none"
TOP_P, MIN_P = "expected a number above 0, at most 1", "expected a number from 0 to 1"
TEMPERATURE = r"expected 0 \(greedy\) or a finite number of at least 1e-4"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", -0.1, f"temperature is -0.1: {TEMPERATURE}"),
        ("temperature", math.inf, f"temperature is inf: {TEMPERATURE}"),
        ("temperature", math.nan, f"temperature is nan: {TEMPERATURE}"),
        ("temperature", [1.0, "hot"], f"temperature is 'hot': {TEMPERATURE}"),
        ("temperature", True, f"temperature is True: {TEMPERATURE}"),
        ("temperature", [1.0, -2.0], f"temperature is -2.0: {TEMPERATURE}"),
        ("temperature", [1.0, 1e-5], r"temperature is \[1.0, 1e-05\]: expected 0 \(greedy\) or at least 1e-4"),
        ("temperature", np.float32(-1), f"temperature is -1.0: {TEMPERATURE}"),
        ("temperature", np.bool_(True), f"temperature is True: {TEMPERATURE}"),
        ("temperature", np.array([1.0, np.inf]), f"temperature is inf: {TEMPERATURE}"),
        ("temperature", b"1", f"temperature is b'1': {TEMPERATURE}"),
        ("top_k", np.float32(3), f"top_k is 3.0: {WHOLE}"),
        ("top_k", 0, f"top_k is 0: {WHOLE}"),
        ("top_k", 2.0, f"top_k is 2.0: {WHOLE}"),
        ("top_k", True, f"top_k is True: {WHOLE}"),
        ("top_k", [3, -1], f"top_k is -1: {WHOLE}"),
        ("top_k", 1 << 40, f"top_k is {1 << 40}: {WHOLE}"),
        ("top_p", 0, f"top_p is 0: {TOP_P}"),
        ("top_p", 1.01, f"top_p is 1.01: {TOP_P}"),
        ("top_p", math.nan, f"top_p is nan: {TOP_P}"),
        ("min_p", -0.5, f"min_p is -0.5: {MIN_P}"),
        ("min_p", 1.5, f"min_p is 1.5: {MIN_P}"),
        ("repetition_penalty", 0.0, f"repetition_penalty is 0.0: {PENALTY}"),
        ("repetition_penalty", -1.0, f"repetition_penalty is -1.0: {PENALTY}"),
        ("repetition_penalty", math.inf, f"repetition_penalty is inf: {PENALTY}"),
    ],
)
def test_a_bad_knob_is_named(name, value, message):
    with pytest.raises(LlamaJaxError, match=f"^{message}"):
        make_sampler(**{name: value})


@pytest.mark.parametrize("greedy", [False, True])
def test_bad_knobs_are_refused_even_where_greedy_ignores_them(greedy):
    with pytest.raises(LlamaJaxError, match="top_p is 2"):
        make_sampler(temperature=0 if greedy else 1, top_p=2)


@pytest.mark.parametrize("temperature", [1e-30, 1e-46])
def test_a_tiny_temperature_is_refused(temperature):
    """Logits divided by it would exceed the value that marks excluded tokens, or overflow float32."""
    with pytest.raises(LlamaJaxError, match="at least 1e-4"):
        make_sampler(temperature=temperature, top_k=2)


def test_the_smallest_temperature_is_nearly_greedy():
    sampler = make_sampler(temperature=1e-4, top_k=2)
    key_B = jax.random.split(jax.random.key(0), 1)
    assert sample(jnp.asarray([[-12.0, -11.0, -10.0]]), key_B, sampler)[0][0] == 2


def test_changing_a_value_compiles_nothing():
    traces = []

    @jax.jit
    def traced(logits_BV, key_B, sampler):
        traces.append(sampler)
        return sample(logits_BV, key_B, sampler)[0]

    logits, key = jnp.arange(float(V))[None], jax.random.split(jax.random.key(0), 1)
    for temperature, top_k, top_p in [(1.0, 5, 0.9), (0.3, 1, 1.0), (7, V, 0.01)]:
        traced(logits, key, make_sampler(temperature=temperature, top_k=top_k, top_p=top_p))
    assert len(traces) == 1
    traced(logits, key, make_sampler(temperature=1.0, top_k=5))  # top_p off: another, shorter program
    assert len(traces) == 2
