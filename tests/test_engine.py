"""Rows that come and go: each text is as it is alone, whatever the others do; draws follow the model."""

import dataclasses
import resource
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from llamajax import Config, Engine, EngineState, Knobs, Llama, LlamaJaxError, generate
from llamajax.generation.compilation import Compilations
from llamajax.generation.sampling import NEUTRAL
from tests import reference
from tests.reference import random_model, weights_of

ROWS, SLOTS = 8, 256


@dataclasses.dataclass
class Request:
    """A request and its results.

    Attributes:
        prompt: ids.
        knobs: knobs of the row.
        given_up: number of tokens after which the caller frees the row; None: never.
        made: ids so far.
        log_probabilities: log-probabilities of these ids.
    """

    prompt: list[int]
    knobs: Knobs
    given_up: int | None = None
    made: list[int] = dataclasses.field(default_factory=list)
    log_probabilities: list[float] = dataclasses.field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether the engine should have ended the request."""
        return len(self.made) == self.knobs.max_new_tokens or self.made[-1:] in [[each] for each in self.knobs.stop_ids]


def _requests(count: int, seed: int, vocab_size: int = 320) -> list[Request]:
    """Returns requests, greedy and sampled, filtered and penalized, with stop ids and without; some are given up."""
    rng, made = np.random.default_rng(seed), []
    for number in range(count):
        knobs = Knobs(
            max_new_tokens=int(rng.integers(1, 40)),
            temperature=float(rng.choice([0, 0.7, 1.3])),
            top_k=rng.choice([None, 1, 40]),
            top_p=rng.choice([None, 0.8]),
            min_p=rng.choice([None, 0.02]),
            repetition_penalty=rng.choice([None, 1.4]),
            seed=number,
            stop_ids=tuple(map(int, rng.integers(3, vocab_size, rng.choice([0, 8])))),
        )
        # An alphabet of two tokens makes drafts that are right, one of many makes drafts that are wrong.
        alphabet = rng.integers(3, vocab_size, rng.choice([2, 50]))
        prompt = [1, *map(int, rng.choice(alphabet, rng.integers(0, 30)))]
        made.append(Request(prompt, knobs, int(rng.integers(1, 40)) if rng.random() < 0.2 else None))
    return made


class Alone:
    """An engine of one row."""

    def __init__(self, model: Llama):
        """Creates the engine, without drafts."""
        self._engine = Engine(model, 1, SLOTS)
        self._state = self._engine.empty()

    def run(self, request: Request) -> Request:
        """Runs a copy of the request alone."""
        copy = dataclasses.replace(request, made=[], log_probabilities=[])
        self._state = self._engine.insert(self._state, 0, copy.prompt, copy.knobs)
        while not copy.ended:
            self._state, made = self._engine.step(self._state)
            _take(copy, made, 0)
        return copy


def _take(request: Request, made, row: int) -> None:
    count = int(made.count_B[row])
    request.made += made.token_BM[row, :count].tolist()
    request.log_probabilities += made.log_probability_BM[row, :count].tolist()


def _serve(engine: Engine, requests: Sequence[Request], seed: int, grows: bool) -> list[Request]:
    """Serves requests in random order, copies some rows meanwhile, and frees some early; returns all, with copies."""
    rng, state = np.random.default_rng(seed), engine.empty()
    waiting = [requests[i] for i in rng.permutation(len(requests))]
    rows: dict[int, Request] = {}
    served: list[Request] = []
    while waiting or rows:
        free = [row for row in rng.permutation(engine.rows).tolist() if row not in rows]
        for row in free[: rng.integers(1, engine.rows + 1)]:
            if rows and rng.random() < 0.1:  # another sample of what a row has so far
                source = int(rng.choice(list(rows)))
                text, left = rows[source], rows[source].knobs.max_new_tokens - len(rows[source].made)
                knobs = dataclasses.replace(text.knobs, sample=1, max_new_tokens=left)
                state = engine.copy(state, source, row, knobs)
                rows[row] = Request([*text.prompt, *text.made], knobs)
            elif waiting:
                rows[row] = waiting.pop()
                state = engine.insert(state, row, rows[row].prompt, rows[row].knobs)
        if grows and len(waiting) < len(requests) // 2:
            (engine, state), grows = engine.grow(state, engine.slots + 1), False
        idle = [row for row in range(engine.rows) if row not in rows]
        state, made = engine.step(state, int(rng.integers(1, 20)))
        assert not np.asarray(made.count_B)[idle].any()
        for row, request in list(rows.items()):
            _take(request, made, row)
            given_up = request.given_up is not None and len(request.made) >= request.given_up
            if given_up and not request.ended:
                state = engine.free(state, [row])
            assert (int(state.left_B[row]) == 0) == (request.ended or given_up)
            if request.ended or given_up:
                served.append(rows.pop(row))
    return served


@pytest.mark.parametrize("drafts", [0, 3])
def test_each_text_is_as_alone(drafts: int, tiny_model: Llama) -> None:
    """64 requests on 8 rows; rounding, as documented, moves log-probabilities by less than 1e-4."""
    counted = Compilations()
    engine = Engine(tiny_model, ROWS, SLOTS, drafts=drafts, counted=counted)
    requests = _requests(64, seed=1)
    served = _serve(engine, requests, seed=2, grows=True)
    assert len(served) > len(requests), "some rows must have been copied"
    alone = Alone(tiny_model)
    for request in served:
        expected = alone.run(request)
        count = len(request.made)
        assert request.made == expected.made[:count] and (count == len(expected.made) or request.given_up)
        np.testing.assert_allclose(request.log_probabilities, expected.log_probabilities[:count], atol=1e-4)
    assert len({len(request.made) for request in served}) > 20 and not all(request.ended for request in served)
    _serve(engine, _requests(12, seed=3), seed=4, grows=False)
    assert counted.compilations + counted.loads <= 13, "extend of two sizes, start, copy, step, free, twice; and grow"


def _live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def _serves_without_growing(model: Llama, requests: int) -> int:
    """Returns by how many KiB peak memory grew after the first tenth of the requests."""
    counted = Compilations()
    engine = Engine(model, ROWS, SLOTS, counted=counted)
    _serve(engine, _requests(requests // 10, seed=5), seed=6, grows=False)
    live = _live_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for part in range(9):
        _serve(engine, _requests(requests // 10, seed=7 + part), seed=part, grows=False)
        assert counted.compilations + counted.loads <= 6, "programs: extend of two sizes, start, copy, step and free"
        assert _live_bytes() <= live
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak


def test_nothing_is_left_behind(tiny_model: Llama) -> None:
    _serves_without_growing(tiny_model, 40)


@pytest.mark.exhaustive
def test_memory_is_flat_over_2000_requests(tiny_model: Llama) -> None:
    assert _serves_without_growing(tiny_model, 2000) < 8 << 10


# ---- Draws -----------------------------------------------------------------------------------------------------------

CONFIG = Config(
    vocab_size=50, width=32, ffn_width=48, num_layers=2, num_heads=4, num_kv_heads=2, head_size=8, context_length=512
)


def _probabilities(logits_V: np.ndarray, held: set[int], temperature: float, top_k: int, penalty: float) -> np.ndarray:
    """Returns each token's probability in float64, by a second implementation of the knobs."""
    penalized = np.where(logits_V > 0, logits_V / penalty, logits_V * penalty)
    logits_V = np.where([token in held for token in range(len(logits_V))], penalized, logits_V) / temperature
    logits_V[logits_V < np.sort(logits_V)[-top_k]] = -np.inf
    weights = np.exp(logits_V - logits_V.max())
    return weights / weights.sum()


def _assert_drawn_from(tokens: np.ndarray, probabilities: np.ndarray) -> None:
    """Applies a chi-square test at one in a thousand; tokens expected less than 5 times are counted together."""
    counts, expected = np.bincount(tokens, minlength=len(probabilities)), probabilities * len(tokens)
    assert not counts[probabilities == 0].any()
    often = expected >= 5
    assert often.sum() > 5 and len(tokens) > 500
    observed = [*counts[often], counts[~often].sum()]
    wanted = [*expected[often], expected[~often].sum()]
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], np.asarray(wanted[:-1]) * sum(observed[:-1]) / sum(wanted[:-1])
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


def test_draws_behind_drafts_are_the_models() -> None:
    """Draws 20,000 times per kind of row, beside greedy rows: the first token, and the one after a right draft."""
    model = random_model(CONFIG)
    weights, kinds = weights_of(model), [(1.0, 50, 1.0), (0.6, 12, 1.6)]
    prompt = [29, 41, 46, 29, 41]
    engine = Engine(model, 208, SLOTS, drafts=2)
    state, rows = engine.empty(), range(208)
    logits_TV = reference.forward(CONFIG, weights, prompt)
    drawn: list[list[np.ndarray]] = [[], []]
    for number in range(200):
        each = [
            Knobs(3, temperature, top_k, repetition_penalty=penalty, seed=number, sample=sample)
            for temperature, top_k, penalty in kinds
            for sample in range(100)
        ]
        each += [Knobs(3, temperature=0)] * 8
        keep = len(prompt) - 1 if number else 0  # the prompt stays in the cache
        state = engine.insert(state, rows, [prompt] * 208, each, keep=keep)
        state, made = engine.step(state, 1)
        token_BM, count_B = np.asarray(made.token_BM), np.asarray(made.count_B)
        for kind in range(2):
            part = slice(100 * kind, 100 * kind + 100)
            drawn[kind].append(np.where(np.arange(2) < count_B[part, None], token_BM[part, :2], -1))
        assert (token_BM[200:, 0] == logits_TV[-1].argmax()).all()
    for (temperature, top_k, penalty), parts in zip(kinds, drawn, strict=True):
        first, second = np.concatenate(parts).T
        assert len(first) == 20_000
        _assert_drawn_from(first, _probabilities(logits_TV[-1], set(prompt), temperature, top_k, penalty))
        assert ((first == 46) == (second >= 0)).all(), "the draft must be 46, which followed 29, 41 before"
        behind_V = reference.forward(CONFIG, weights, [*prompt, 46])[-1]
        expected = _probabilities(behind_V, {*prompt, 46}, temperature, top_k, penalty)
        _assert_drawn_from(second[second >= 0], expected)


# ---- What each call does ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
def test_kept_tokens_are_not_computed_again(cache_dtype: str, tiny_model: Llama) -> None:
    """A row goes back to the tokens that two texts share, even if it had ended in its last slots."""
    engine = Engine(tiny_model, 2, SLOTS, cache_dtype=cache_dtype, drafts=2)
    first = [1, *range(10, 230)]
    state = engine.insert(engine.empty(), 0, first, Knobs(33, temperature=0))
    for _ in range(3):
        state, made = engine.step(state)
    assert state.left_B.tolist() == [0, 0] and state.cache.length_B.tolist() == [253, 0]
    state, _ = engine.step(engine.insert(state, 1, [5], Knobs(3)))  # row 0 is idle meanwhile
    text = [*first[:200], 7, 8, 9]
    assert [chunk.tokens_bT.shape for chunk in engine.plan(state, [0], [text], [200])] == [(1, 16)]
    state = engine.insert(state, 0, text, Knobs(12, temperature=0), keep=200)
    state, made = engine.step(state)
    alone = generate(tiny_model, None, text, max_new_tokens=12, temperature=0, cache_dtype=cache_dtype)
    assert made.token_BM[0, : made.count_B[0]].tolist() == alone.tokens[: int(made.count_B[0])]
    assert int(made.count_B[0]) == 12


def test_what_does_not_fit_behind_kept_tokens_is_computed_again(tiny_model: Llama) -> None:
    """Chunks are padded: one that would pass the last slot begins earlier."""
    engine = Engine(tiny_model, 1, SLOTS)
    text = list(range(3, 3 + 250))
    state = engine.insert(engine.empty(), 0, text, Knobs(1))
    for keep, expected in ((249, []), (240, [(240, 16)]), (245, [(192, 64)]), (130, [(128, 64), (192, 64)])):
        chunks = engine.plan(state, [0], [text], [keep])
        assert [(int(chunk.held_b[0]), chunk.tokens_bT.shape[1]) for chunk in chunks] == expected
        assert all(int(chunk.held_b[0]) + chunk.tokens_bT.shape[1] <= SLOTS for chunk in chunks)


def test_a_row_of_nan_does_not_reach_the_next(tiny_model: Llama) -> None:
    """Slots after a row's tokens are read with weight zero. A prompt of one token needs no prefill."""
    engine = Engine(tiny_model, 2, SLOTS)
    state = engine.insert(engine.empty(), 0, [1, *[0] * 30], Knobs(1))
    parts = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), state.cache.parts)
    state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, parts=parts))
    state = engine.insert(state, 0, [1, 270, 300], Knobs(9, temperature=0))
    state = engine.insert(engine.free(state, 1), 1, [5], Knobs(9, temperature=0))
    state, made = engine.step(state)
    alone = generate(tiny_model, None, [[1, 270, 300], [5]], max_new_tokens=9, temperature=0)
    assert made.token_BM[:, :9].tolist() == [row.tokens for row in alone]
    assert np.isfinite(made.log_probability_BM[:, :9]).all()


def test_neutral_knobs_are_off(tiny_model: Llama) -> None:
    state = Engine(tiny_model, 2, 1).empty()
    assert state.cache.slots == 256 and state.left_B.tolist() == [0, 0]
    sampler = state.asked.sampler
    for name, off in NEUTRAL.items():
        if name != "temperature":
            assert getattr(sampler, name).tolist() == [off] * 2 and getattr(sampler, name).dtype == off.dtype


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda engine, state: engine.insert(state, 2, [1], Knobs(1)), "row 2: expected from 0 to 1, the engine's"),
        (lambda engine, state: engine.free(state, [0, 0]), r"rows \[0, 0\]: expected each at most once"),
        (lambda engine, state: engine.copy(state, 0, 0, Knobs(1)), r"rows \[0, 0\]: expected each at most once"),
        (lambda engine, state: engine.insert(state, 0, [], Knobs(1)), "0 tokens for row 0: expected at least 1, and"),
        (
            lambda engine, state: engine.insert(state, 0, [1] * 200, Knobs(57)),
            "max_new_tokens is 57 in row 0: expected from 0 to 56, the room in its 256 slots after 200 tokens: ask",
        ),
        (lambda engine, state: engine.insert(state, 0, [1], Knobs(1, top_k=0)), "top_k is 0: expected a whole"),
        (lambda engine, state: engine.insert(state, 0, [1], Knobs(1, seed=-1)), "seed is -1: expected a whole"),
        (lambda engine, state: engine.insert(state, 0, [1], Knobs(1, stop_ids=(1,) * 9)), "9 stop ids: expected at"),
        (lambda engine, state: engine.insert(state, 0, [1, 2], Knobs(1), keep=1), "keep is 1 in row 0: expected"),
    ],
)
def test_refused(call, message: str, tiny_model: Llama) -> None:
    engine = Engine(tiny_model, 2, SLOTS, drafts=1 if "57" in message else 0)
    state: EngineState = engine.empty()
    with pytest.raises(LlamaJaxError, match=message):
        call(engine, state)
