"""Prompt lookup against plain greedy decoding, and against a lookup written here in plain Python."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llamajax
from llamajax import Engine, Knobs, Llama, LlamaJaxError, Tokenizer, abstract_model, generate, stream
from llamajax.generation.programs import DRAFT_PASSES, step
from llamajax.generation.speculate import MAX_DRAFTS, MAX_NGRAM, draft_tokens
from quant import SCHEMES, quantize_rtn

EOS = 2
LOOP = [*range(40, 50)]  # what the model of `cycle` says repeatedly


def _drafted(ids: list[int], count: int) -> list[int]:
    """Drafts tokens by Saxena's rule in plain Python; a draft that reaches the end goes on copying itself."""
    for size in range(MAX_NGRAM, 0, -1):
        for end in range(len(ids) - 1, size - 1, -1):
            if ids[end - size : end] == ids[-size:]:
                copied = list(ids)
                for i in range(count):
                    copied.append(copied[end + i])
                return copied[len(ids) :]
    return ids[-1:] * count


def _passes(prompt: list[int], made: list[int], count: int) -> int:
    """Counts the forward passes that make `made`: each gives the agreeing part of its draft and one token more."""
    at, passes = 0, 0
    while at < len(made):
        draft = _drafted(prompt + made[:at], count)
        agreeing = next((i for i, token in enumerate(draft) if made[at + i : at + i + 1] != [token]), count)
        at, passes = at + agreeing + 1, passes + 1
    return passes


def _assert_same(
    model: Llama, tokenizer: Tokenizer | None, prompts: Any, drafts: int, room: float = 1e-4, **options: Any
) -> Any:
    """Asserts that all results are the same with and without speculation; returns the run with speculation."""
    options = {"temperature": 0, **options}
    run = stream(model, tokenizer, prompts, speculate=drafts, **options)
    pieces = list(run)
    plain = stream(model, tokenizer, prompts, **options)
    list(plain)
    for ours, theirs in zip(run.completions, plain.completions, strict=True):
        assert ours.tokens == theirs.tokens
        np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=room)
        assert dataclasses.replace(ours, log_probabilities=[]) == dataclasses.replace(theirs, log_probabilities=[])
    texts = "".join(pieces) if run.single else ["".join(row) for row in zip(*pieces, strict=True)]
    assert texts == (run.completions[0].text if run.single else [row.text for row in run.completions])
    assert run.speed.decode_tokens == plain.speed.decode_tokens == sum(len(row.tokens) for row in run.completions)
    return run


@pytest.fixture(scope="module")
def cycle(tiny_tokenizer: Tokenizer) -> Callable[[list[int]], Llama]:
    """Builds a model that repeats the given tokens in a cycle: one-hot embeddings, layers that add nothing."""
    V = tiny_tokenizer.vocab_size
    config = llamajax.Config(
        vocab_size=V, width=V, ffn_width=2, num_layers=1, num_heads=1, num_kv_heads=1, head_size=2, context_length=512
    )

    def build(ids: list[int]) -> Llama:
        head_VD = np.zeros((V, V), np.float32)
        head_VD[ids[1:] + ids[:1], ids] = 1.0
        model = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_model(config))
        model.embed_VD.set_value(jnp.eye(V))
        model.norm.weight_D.set_value(jnp.ones(V))
        model.head_VD.set_value(jnp.asarray(head_VD))
        return model

    return build


def _with_context(model: Llama, length: int) -> Llama:
    config = dataclasses.replace(model.config, context_length=length)
    return jax.tree.unflatten(jax.tree.structure(abstract_model(config)), jax.tree.leaves(model))


# ---- The draft ------------------------------------------------------------------------------------------------------

_draft_tokens = jax.jit(draft_tokens, static_argnames="drafts")


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=23), min_size=4, max_size=4), st.integers(0, 3))
@settings(deadline=None, derandomize=True, database=None, max_examples=150)
def test_draft_is_the_python_lookup(rows: list[list[int]], behind: int) -> None:
    """Few different tokens occur often; after the newest token, the history holds tokens of old drafts."""
    history = np.full((4, 24), behind, np.int32)
    for row, ids in enumerate(rows):
        history[row, : len(ids)] = ids
    length_B = jnp.asarray([len(ids) - 1 for ids in rows], jnp.int32)
    draft_BK = _draft_tokens(jnp.asarray(history), length_B, drafts=6)
    assert draft_BK.tolist() == [_drafted(ids, 6) for ids in rows]


@pytest.mark.parametrize(
    ("ids", "draft"),
    [
        ([5], [5, 5, 5, 5]),
        ([5, 6, 7], [7, 7, 7, 7]),  # 7 is new
        ([7, 8, 9, 7], [8, 9, 7, 8]),  # the draft copies itself
        ([7, 1, 2, 7, 3, 4, 7], [3, 4, 7, 3]),  # the most recent 7
        ([6, 7, 1, 2, 3, 9, 7, 8, 6, 7], [1, 2, 3, 9]),  # an older place that agrees in two tokens
        ([7, 7, 7], [7, 7, 7, 7]),
    ],
)
def test_drafts_by_hand(ids: list[int], draft: list[int]) -> None:
    """Drafts worked out by hand check the reference above as well."""
    history = jnp.asarray([ids + [0] * (16 - len(ids))], jnp.int32)
    assert _draft_tokens(history, jnp.asarray([len(ids) - 1]), drafts=4).tolist() == [draft] == [_drafted(ids, 4)]


# ---- The same text --------------------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.parametrize("drafts", [1, 4, 9])
def test_a_batch_is_plain_greedy_decoding(drafts: int, tiny_model: Llama) -> None:
    """Rows of different lengths accept different numbers of drafts; a model of random weights soon repeats itself."""
    rng = np.random.default_rng(5)
    prompts = [[1, *map(int, rng.integers(3, 320, length))] for length in (5, 0, 29, 1, 16, 17, 3, 8)]
    run = _assert_same(tiny_model, None, prompts, drafts, max_new_tokens=100)
    each = [_passes(prompt, row.tokens, drafts) for prompt, row in zip(prompts, run.completions, strict=True)]
    assert len(set(each)) > 1
    assert (run.speed.decode_steps, run.speed.row_steps) == (max(each), sum(each))


@pytest.mark.matrix
@pytest.mark.parametrize("seed", range(4))
def test_random_models(seed: int, tiny_model: Llama) -> None:
    rng = np.random.default_rng(seed)
    model = jax.tree.map(lambda leaf: leaf * jnp.asarray(rng.uniform(0.3, 1.7, leaf.shape), leaf.dtype), tiny_model)
    run = _assert_same(model, None, [1, 270, 300, 12, 12, 281], 4, max_new_tokens=200)
    assert run.speed.decode_steps == _passes([1, 270, 300, 12, 12, 281], run.completions[0].tokens, 4)
    assert run.speed.decode_steps < 200


@pytest.mark.exhaustive
def test_the_box() -> None:
    """Forward passes are as many as the lookup predicts: for a full story, one that repeats its prompt, and another."""
    model, tokenizer = llamajax.load("box", dtype=jnp.float32)
    prompts = ["Once upon a time", '"I can smell snow, and a great deal of it." ' * 6 + '"I can', "At night the"]
    run = _assert_same(model, tokenizer, prompts, 4, smooth=False)
    expected = [
        _passes(tokenizer.encode(prompt), row.tokens + [EOS] * (row.finish_reason == "stop"), 4)
        for prompt, row in zip(prompts, run.completions, strict=True)
    ]
    assert "stop" in {row.finish_reason for row in run.completions}
    assert run.speed.row_steps == sum(expected) < run.speed.decode_tokens


@pytest.mark.exhaustive
def test_stories(stories260k: Any) -> None:
    _assert_same(*stories260k, ["", "The cat sat on the mat. " * 5], 4, max_new_tokens=200)


@pytest.mark.matrix
@pytest.mark.parametrize(("cache_dtype", "room"), [("float32", 1e-4), ("int8", 0.02)])
def test_quantized(cache_dtype: str, room: float, tiny_model: Llama) -> None:
    """4-bit weights and an 8-bit cache: a rejected draft leaves no trace in them.

    A key or value midway between two codes may get either in programs of other shapes (`caches/quantized.py`).
    """
    model = jax.tree.map(lambda leaf: leaf, tiny_model)
    weight = model.stacks[0][0].ffn.gate_DF
    weight.set_value(quantize_rtn(weight.get_value(), SCHEMES["int4"], group_size=24, axis=-2))
    _assert_same(model, None, [[1, 270, 300, 12], [1]], 4, max_new_tokens=60, cache_dtype=cache_dtype, room=room)


def test_sampled_text_is_that_without_drafts(tiny_model: Llama) -> None:
    """Every seed gives the same text in a batch with greedy rows; penalties see the draft before each of its tokens."""
    prompts = [[1, *[270, 300] * 3], [1, 12, 12, 12], [1, *range(40, 50), *range(40, 45)], [1]] * 2
    options = {
        "temperature": [0, 0, 0.2, 0.6, 0.9, 1.2, 0.3, 0.2],
        "repetition_penalty": [1, 1.5, 1, 1.3, 0.7, 1, 0.6, 0.8],
        "top_k": [320, 320, 5, 40, 320, 100, 3, 320],
        "top_p": [1.0, 1.0, 0.9, 1.0, 0.8, 1.0, 1.0, 0.95],
    }
    run = _assert_same(tiny_model, None, prompts, 4, max_new_tokens=60, seed=list(range(8)), **options)
    assert 1 < run.speed.tokens_per_step < 5, "some drafts are right, and some are not"


# ---- Where rows end -------------------------------------------------------------------------------------------------


def test_repetition_takes_fewer_passes(cycle: Callable[[list[int]], Llama]) -> None:
    """After two rounds of the prompt all drafts are right: k + 1 tokens per pass."""
    run = _assert_same(cycle(LOOP), None, LOOP * 2, 4, max_new_tokens=100)
    assert (run.speed.decode_steps, run.speed.row_steps, run.speed.tokens_per_step) == (20, 20, 5.0)
    assert run.completions[0].tokens == LOOP * 10
    without = stream(cycle(LOOP), None, LOOP * 2, max_new_tokens=100, temperature=0)
    list(without)
    assert (without.speed.decode_steps, without.speed.row_steps, without.speed.tokens_per_step) == (100, 0, 0.0)


@pytest.mark.matrix
@pytest.mark.parametrize("limit", range(1, 12))
def test_the_limit_may_fall_anywhere_in_a_draft(limit: int, cycle: Callable[[list[int]], Llama]) -> None:
    run = _assert_same(cycle(LOOP), None, [LOOP * 2, LOOP[:4]], 4, max_new_tokens=limit)
    assert [len(row.tokens) for row in run.completions] == [limit, limit]
    assert run.completions[0].tokens == (LOOP * 2)[:limit]


@pytest.mark.parametrize("place", range(1, 8))
def test_a_stop_token_may_fall_anywhere_in_a_draft(
    place: int, cycle: Callable[[list[int]], Llama], tiny_tokenizer: Tokenizer
) -> None:
    """Drafts continue after the stop token, as the model would; the other row runs on."""
    ids = [*LOOP[:place], EOS, *LOOP[place:]]
    model = cycle(ids)
    run = _assert_same(model, tiny_tokenizer, [ids + ids[:1], ids + ids[: place + 2]], 5, max_new_tokens=40)
    first, second = run.completions
    assert (first.tokens, first.finish_reason) == (LOOP[1:place], "stop")
    assert (second.tokens, second.finish_reason) == (LOOP[place + 1 :] + LOOP[:place], "stop")


def test_stop_strings_cut_a_draft(cycle: Callable[[list[int]], Llama], tiny_tokenizer: Tokenizer) -> None:
    ids = [3 + byte for byte in b"abcdefghijklm"]
    for smooth in (True, False):
        run = _assert_same(cycle(ids), tiny_tokenizer, ids * 2, 4, stop=["hij"], max_new_tokens=60, smooth=smooth)
        assert run.completions[0].text == "abcdefg"


def test_the_context_is_filled_exactly(tiny_model: Llama) -> None:
    """256 slots would hold the text, but not the drafts of the last pass, nor those of a row that has ended."""
    model = _with_context(tiny_model, 256)
    prompt = [1, 270, 300, 12, 12, 281] * 30
    run = _assert_same(model, None, [prompt, prompt[:9]], 8)
    assert [len(row.tokens) for row in run.completions] == [256 - 180 + 1] * 2
    assert np.isfinite(run.completions[0].log_probabilities + run.completions[1].log_probabilities).all()


def test_by_hand_with_no_slot_to_spare(cycle: Callable[[list[int]], Llama]) -> None:
    """Runs the pure functions under plain `jax.jit`; a row that ends first waits in its last slots for the other."""
    model, drafts, new = cycle(LOOP), 4, 30
    prompts = [LOOP * 22 + LOOP[:3], [60, 61, *LOOP]]
    assert len(prompts[0]) + new - 1 + drafts == 256
    engine = Engine(model, 2, 256, drafts=drafts)
    state = engine.insert(engine.empty(), [0, 1], prompts, Knobs(new, temperature=0))
    made: list[list[int]] = [[], []]
    total_B = np.zeros(2, int)
    for limit in (2, 1, 1000):  # A limit beyond a block is one block.
        state, each = jax.jit(step)(model, state, jnp.asarray(limit))
        assert each.token_BM.shape == each.log_probability_BM.shape == (2, DRAFT_PASSES * (drafts + 1))
        assert int(each.pass_B.max()) <= min(limit, DRAFT_PASSES)
        total_B += np.asarray(each.pass_B)
        for row in range(2):
            made[row] += each.token_BM[row, : int(each.count_B[row])].tolist()
    expected = [(LOOP[3:] + LOOP * 3)[:30], LOOP * 3]
    assert made == expected
    assert total_B.tolist() == [_passes(*each, drafts) for each in zip(prompts, expected, strict=True)] == [6, 7]
    assert state.left_B.tolist() == [0, 0]
    assert state.cache.length_B.tolist() == [len(prompt) - 1 + new for prompt in prompts]
    for row, prompt in enumerate(prompts):
        assert state.history_BS[row, : len(prompt) + new].tolist() == prompt + made[row]
    _, again = jax.jit(step)(model, state, jnp.asarray(8))
    assert again.count_B.tolist() == again.pass_B.tolist() == [0, 0], "rows that have ended make no pass"


def test_nothing_is_counted_behind_a_stop_token(cycle: Callable[[list[int]], Llama]) -> None:
    model, prompt = cycle(LOOP), LOOP * 2
    engine = Engine(model, 1, 64, drafts=7)
    state = engine.insert(engine.empty(), 0, prompt, Knobs(30, temperature=0, stop_ids=(LOOP[4], LOOP[2])))
    state, made = jax.jit(step)(model, state, jnp.asarray(16))
    assert (made.count_B.tolist(), made.pass_B.tolist(), state.left_B.tolist()) == ([3], [1], [0])
    assert made.token_BM[0, :3].tolist() == LOOP[:3]
    assert state.cache.length_B.tolist() == [len(prompt) - 1 + 3]


# ---- Programs, refusals ---------------------------------------------------------------------------------------------


def test_number_of_programs(tiny_model: Llama) -> None:
    """One program serves all prompts and limits of the same slots; the number of drafted tokens is part of a shape."""
    model = _with_context(tiny_model, 601)  # no other test has it, so that nothing is compiled yet

    def compiled(length: int, **options: Any) -> int:
        run = stream(model, None, [1] * length, temperature=0, **options)
        list(run)
        return run.speed.compilations + run.speed.loads

    assert compiled(2, max_new_tokens=3, speculate=2) == 2
    for length, limit in ((3, 1), (9, 20), (17, 200), (1, 64)):
        assert compiled(length, max_new_tokens=limit, speculate=2) == 0
    assert compiled(9, max_new_tokens=3, speculate=3) == 1
    assert compiled(9, max_new_tokens=3) == 1  # plain decoding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculate": -1}, f"speculate is -1: expected a whole number of tokens from 0 .off. to {MAX_DRAFTS}"),
        ({"speculate": MAX_DRAFTS + 1}, f"speculate is {MAX_DRAFTS + 1}: expected a whole number"),
        ({"speculate": 2.0}, "speculate is 2.0: expected a whole number"),
        ({"speculate": True}, "speculate is True: expected a whole number"),
    ],
)
def test_refused(options: dict[str, Any], message: str, tiny_model: Llama) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        generate(tiny_model, None, [1], **{"temperature": 0, **options})


def test_more_drafts_than_text(tiny_model: Llama) -> None:
    _assert_same(tiny_model, None, [1], MAX_DRAFTS, max_new_tokens=20)
