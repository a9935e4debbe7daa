"""Caches that hold only what a window or a chunk sees, against NumPy over all tokens and the text of full caches."""

import dataclasses
import functools
import io
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from export.runners import answers
from llamajax import Config, Kept, KVCache, Llama, Scores, generate, stream
from llamajax.caches import PARTS, DensePart, QuantizedPart, RingPart, RotatedPart, TiledPart, Where
from llamajax.caches.attention import SLOT_BLOCK, attend_blocks, attend_causal
from llamajax.generation import engine
from tests.programs import QUICK
from tests.reference import random_model
from tests.test_attention import drawn, expected
from tests.test_cache import ROTATION

WINDOW, SLOTS = 40, 128  # slots of a ring: the window and 64 more, rounded up to a multiple of 64
CONFIG = Config(
    vocab_size=50,
    width=32,
    ffn_width=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=1024,
    layer_kinds=("window", "full"),
    window=WINDOW,
)
CHUNKS = dataclasses.replace(CONFIG, layer_kinds=("chunk",), window=None, chunk=WINDOW, num_layers=1)
_MORE = pytest.mark.exhaustive
CASES = [
    ("window", "dense", "float32"),
    ("window", "tiled", "float32"),
    ("window", "scatter", "int4"),
    ("chunk", "dense", "int8"),
    pytest.param("window", "straight", "float32", marks=_MORE),
    pytest.param("window", "scatter", "float32", marks=_MORE),
    pytest.param("window", "tiled", "float16", marks=_MORE),
    pytest.param("chunk", "tiled", "float32", marks=_MORE),
    pytest.param("chunk", "scatter", "float32", marks=_MORE),
]


@pytest.fixture(scope="module")
def model() -> Llama:
    return random_model(CONFIG)


# ---- One part against NumPy -----------------------------------------------------------------------------------------


class Text:
    """A ring, together with all keys and values that its rows were given."""

    def __init__(self, kind: str, layout: str, dtype: str, rows: int, slots: int = 1024):
        """Starts without tokens."""
        self.rng = np.random.default_rng(0)
        self.scores = Scores(window=WINDOW) if kind == "window" else Scores(chunk=WINDOW)
        config = CONFIG if kind == "window" else CHUNKS
        self.part = PARTS[kind](config, 2, rows, slots, dtype, layout)
        self.keys, self.values = (np.zeros((rows, 2, 0, 8)) for _ in range(2))
        self.length_B = np.zeros(rows, int)
        self.attend = jax.jit(type(self.part).attend, compiler_options=QUICK, static_argnames="scores")

    def call(self, T: int, count_B: Any, stay_B: Any = None) -> None:
        """Adds T tokens: each row counts `count_B` of them, or all, and then goes back to `stay_B` more than it had."""
        rows = len(self.length_B)
        query, key, value = self.rng.standard_normal((3, rows, T, 4, 8)).astype(np.float32)
        key, value = key[:, :, :2], value[:, :, :2]
        position_BT = jnp.asarray(self.length_B[:, None] + np.arange(T), jnp.int32)
        where = Where(position_BT, None if count_B is None else jnp.asarray(count_B, jnp.int32))
        mixed, self.part = self.attend(self.part, jnp.asarray(1), query, key, value, where, scores=self.scores)
        held = self.part.stored
        turn = ROTATION if isinstance(self.part, RotatedPart) else np.eye(8)
        codes = [held.encode(jnp.asarray(x @ turn, jnp.float32)) for x in (key, value)]
        seen = [(np.asarray(held.decode(code), np.float32) @ turn.T).swapaxes(1, 2) for code in codes]
        count_B = np.full(rows, T) if count_B is None else np.asarray(count_B)
        for b, count in enumerate(count_B):
            end, first = self.length_B[b] + count, self.length_B[b]
            room = max(0, end - self.keys.shape[2])
            self.keys, self.values = (np.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))) for x in (self.keys, self.values))
            self.keys[b, :, first:end], self.values[b, :, first:end] = (x[b, :, :count] for x in seen)
            if not count:
                continue
            wanted = expected(
                query[b : b + 1, :count],
                self.keys[b : b + 1, :, :end],
                self.values[b : b + 1, :, :end],
                np.arange(first, end)[None],
                self.scores.window,
                self.scores.chunk,
                None,
                None,
            )
            room = 5e-3 if self.part.stored.read(0)[0].dtype == jnp.float16 else 2e-5
            np.testing.assert_allclose(mixed[b : b + 1, :count], wanted, rtol=1e-4, atol=room)
        assert np.isfinite(mixed).all(), "results of padding and of waiting rows must be finite, too"
        self.length_B += count_B if stay_B is None else np.asarray(stay_B)


@pytest.mark.parametrize(("kind", "layout", "dtype"), CASES)
def test_a_ring_is_all_that_queries_see(kind: str, layout: str, dtype: str) -> None:
    """Pieces have more tokens than slots, a few, or one; rows have different lengths, wait, and go back."""
    text = Text(kind, layout, dtype, 3)
    ring = text.part.held if dtype.startswith("int") else text.part
    assert isinstance(ring, RingPart) and ring.stored.slots == SLOTS and text.part.spare == SLOTS - WINDOW + 1
    text.call(150, [150, 30, 0])
    text.call(20, [3, 20, 17])
    for stay_B in ([0, 1, 4], [2, 4, 1], [4, 3, 0]):  # steps of 3 drafts, some of which were wrong
        text.call(4, None, stay_B)
    for _ in range(3):
        text.call(1, [1, 1, 0], [1, 1, 0])
    text.call(150, [0, 149, 2])
    text.call(20, [20, 0, 20])
    text.call(4, None, [0, 4, 2])
    text.call(1, None)
    assert (text.length_B > SLOTS).tolist() == [True, True, False]


def test_a_cache_of_few_slots_goes_on_as_a_ring() -> None:
    """A cache with no more slots than a ring is a plain one; when it grows into a ring, each token keeps its slot."""
    for layout, dtype, kind in (("dense", "float32", DensePart), ("tiled", "float32", TiledPart)):
        text = Text("window", layout, dtype, 2, slots=64)
        assert type(text.part) is kind and text.part.slots == 64
        text.attend = jax.jit(kind.attend, compiler_options=QUICK, static_argnames="scores")
        text.call(20, None)
        text.call(20, [20, 11])
        larger = PARTS["window"](CONFIG, 2, 2, 512, dtype, layout)
        text.part = text.part.grow(larger)
        text.attend = jax.jit(type(text.part).attend, compiler_options=QUICK, static_argnames="scores")
        for _ in range(6):
            text.call(20, [20, 20])
        text.part = text.part.grow(PARTS["window"](CONFIG, 2, 2, 1024, dtype, layout))
        text.call(20, [20, 1])
    for slots, kind in ((SLOTS, QuantizedPart), (SLOTS + 1, RingPart)):
        assert type(PARTS["window"](CONFIG, 1, 1, slots, "int8", "dense").held) is kind


def test_blocks_that_a_window_hides_are_not_looked_at() -> None:
    """NaN in hidden blocks would show; in a sequence without a cache, their scores are not even computed."""
    query, key, value = drawn(0, 1, 4, 2, 2, 3 * SLOT_BLOCK + 40, 8)
    position_BT = 3 * SLOT_BLOCK + 36 + np.arange(4, dtype=np.int32)[None]
    for changes in ({"window": 100}, {"chunk": 300}):
        bad_key, bad_value = key.copy(), value.copy()
        bad_key[:, :, : 2 * SLOT_BLOCK] = bad_value[:, :, : 2 * SLOT_BLOCK] = np.nan
        blocks = jax.jit(lambda *arrays, changes=changes: attend_blocks(*arrays, Scores(**changes)))
        mixed = blocks(query, bad_key, bad_value, position_BT)
        wanted = expected(query, key, value, position_BT, changes.get("window"), changes.get("chunk"), None, None)
        np.testing.assert_allclose(mixed, wanted, rtol=1e-4, atol=2e-5)
    query, key, value = drawn(1, 1, 640, 1, 2, 640, 4)
    position_BT = np.arange(640, dtype=np.int32)[None]
    causal = jax.jit(lambda *arrays: attend_causal(*arrays, Scores(window=50)), compiler_options=QUICK)
    lowered = causal.lower(query, key, value, position_BT)
    wanted = expected(query, key, value, position_BT, 50, None, None, None)
    np.testing.assert_allclose(lowered.compile()(query, key, value, position_BT), wanted, rtol=1e-4, atol=2e-5)
    widths = {
        int(width) for width in re.findall(r"tensor<1x1x2x128x(\d+)xf32>", lowered.as_text()) if width not in "14"
    }
    assert widths == {128, 177}


# ---- What a cache says of itself ------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_slots() -> None:
    windows = dataclasses.replace(CONFIG, layer_kinds=("window",))
    for dtype, element in (("float32", 4), ("int8", 1)):
        for slots in (1024, 1 << 20):
            for config, full_layers in ((CONFIG, 2), (windows, 0)):
                cache = jax.eval_shape(lambda c=config, s=slots, d=dtype: KVCache.empty(c, 3, s, d))
                head = 8 * element + (5 if dtype == "int8" else 0)
                ring, full = (2 * layers * 3 * 2 * head for layers in (4 - full_layers, full_layers))
                assert sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(cache.parts)) == (
                    ring * SLOTS + full * slots
                )
                assert (cache.slots, cache.reach, cache.spare) == (slots if full_layers else None, slots, 89)


def test_to_how_few_tokens_rows_can_go_back() -> None:
    """Rows lose tokens only when slots are reused: those that new tokens overwrote. A row that restarts lost none."""
    windows = dataclasses.replace(CONFIG, layer_kinds=("window",), num_layers=1)
    cache = KVCache.empty(windows, 3, 1024)
    assert cache.begin(1).reach == 1024

    def after(cache: KVCache, T: int, count_B: Any = None) -> KVCache:
        return cache.end(cache.begin(T, None if count_B is None else jnp.asarray(count_B, jnp.int32)))

    cache = after(cache, 200, [200, 128, 5])
    np.testing.assert_array_equal(cache.fewest_B, [200 - 89, 0, 0])
    cache = after(cache, 4)
    np.testing.assert_array_equal(cache.fewest_B, [204 - 89, 132 - 89, 0])
    cache = dataclasses.replace(cache, length_B=jnp.asarray([150, 0, 9]))
    cache = after(cache, 1)
    np.testing.assert_array_equal(cache.fewest_B, [204 - 89, 0, 0])
    rows = cache.take(jnp.asarray([1, 0]))
    np.testing.assert_array_equal(rows.fewest_B, [0, 115])
    np.testing.assert_array_equal(cache.put(jnp.asarray([2, 1]), rows).fewest_B, [115, 115, 0])
    np.testing.assert_array_equal(cache.copy(jnp.asarray(0), jnp.asarray([2])).fewest_B, [115, 0, 115])
    assert cache.rewind(cache.length_B - 89, at_most=89) is not None and cache.rewind(cache.length_B, 90) is None


@pytest.mark.parametrize(("layout", "dtype"), [("dense", "float32"), ("tiled", "float32"), ("dense", "int8")])
def test_a_step_copies_no_slots(layout: str, dtype: str, model: Llama) -> None:
    """Rings and full parts are updated in place; no other array of their shape is made."""
    cache = KVCache.empty(CONFIG, 2, 192, dtype, layout=layout)
    donating = jax.jit(lambda model, tokens_BT, cache: model(tokens_BT, cache), donate_argnames=("cache",))
    compiled = donating.lower(model, np.ones((2, 1), np.int32), cache).compile()
    planes = [array for name, array in cache.state.items() if name.startswith(("key", "value"))]
    shapes = {",".join(map(str, plane.shape)) for plane in planes if plane.shape[0] > 1}
    made = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", compiled.as_text())
    of_planes = {operation for shape, operation in made if shape in shapes}
    assert shapes and "dynamic-update-slice" in of_planes
    assert of_planes <= {"dynamic-update-slice", "parameter", "get-tuple-element", "fusion", "bitcast"}
    assert {name.partition(".")[0] for name in cache.state} == {
        "key_0",
        "value_0",
        "key_1",
        "value_1",
    }


# ---- Text through the engine ----------------------------------------------------------------------------------------

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 40}
_rng = np.random.default_rng(3)
# A prompt longer than 4 windows and than a ring; one that repeats 4 ids, so that some drafts are right; a short one.
PROMPTS = [_rng.integers(0, 50, 290).tolist(), [7, 9, 11, 2] * 33, _rng.integers(0, 50, 5).tolist()]


@pytest.fixture(scope="module")
def full_text(model: Llama) -> Callable[[str], list[list[int]]]:
    """Returns what the model generates with full caches of a dtype, whose masks hide tokens before the window."""

    @functools.cache
    def of(dtype: str) -> list[list[int]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PARTS, "window", PARTS["full"])
            return [row.tokens for row in generate(model, None, PROMPTS, cache_dtype=dtype, **GREEDY)]

    return of


@pytest.mark.matrix
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("layout", ["dense", "tiled", "scatter"])
def test_text_is_that_of_full_caches(
    layout: str, dtype: str, drafts: int, model: Llama, full_text: Callable[[str], list[list[int]]], monkeypatch
) -> None:
    if layout == "tiled" and dtype == "int8":
        return
    empty = lambda *args: KVCache.empty(*args, layout=layout)  # noqa: E731
    monkeypatch.setattr(engine, "empty_cache", empty)
    run = stream(model, None, PROMPTS, cache_dtype=dtype, speculate=drafts, **GREEDY)
    list(run)
    assert [row.tokens for row in run.completions] == full_text(dtype)


def test_a_second_turn_keeps_what_is_still_there(model: Llama) -> None:
    """A turn that continues keeps all tokens; one that goes back too far is prefilled anew. The text is the same."""
    kept = Kept()

    def turn(text: list[int]) -> tuple[int, list[int]]:
        run = stream(model, None, text, kept=kept, least_slots=512, temperature=0, max_new_tokens=8)
        list(run)
        return run.speed.reused_tokens, run.completions[0].tokens

    first = PROMPTS[0][:200]
    reused, made = turn(first)
    assert reused == 0 and len(made) == 8
    text = [*first, *made, 3, 4, 5]
    reused, made = turn(text)
    assert reused == len(first) + 7
    on = made
    shorter = text[:150]  # of the 218 tokens in the cache, the last 89 can be dropped
    reused, made = turn(shorter)
    assert reused == 149
    assert made == generate(model, None, shorter, temperature=0, max_new_tokens=8).tokens
    reused, again = turn(shorter[:100])
    assert reused == 0, "at 218 tokens, those before 90, which a text of 99 sees, are overwritten"
    assert again == generate(model, None, shorter[:100], temperature=0, max_new_tokens=8).tokens
    assert turn(text) == (100, on), "reused up to where the texts differ"


def test_a_bundles_conversation_goes_back_as_far_as_its_cache(monkeypatch) -> None:
    """A text goes back by at most `spare` tokens from the cache's greatest length; beyond that, all is read again."""
    texts = iter([[*range(100)], [*range(95), 1], [*range(90), 1], [*range(90), 1, 5, 2]])
    kept = []

    def steps(session, bundle, ids, limit, choose, keep):
        kept.append(keep)
        yield from ((5, None), (5, None))

    monkeypatch.setattr(answers, "lines", lambda: iter("abcd"))
    monkeypatch.setattr(answers, "conversation", lambda *_: next(texts))
    monkeypatch.setattr(answers, "steps", steps)
    manifest = {"chat": {"stop": []}, "cache": {"spare": 9}}
    bundle, session = SimpleNamespace(slots=1000, manifest=manifest), SimpleNamespace(count=0, seconds=0)
    text = SimpleNamespace(decoder=lambda _: lambda token: b"" if token is None else b"x")
    options = SimpleNamespace(max_new_tokens=2, system="", prompt=None)
    answers.converse(session, bundle, text, options, None, [], io.BytesIO())
    assert kept == [0, 95, 0, 92], "the third goes back to 90, but after 101 tokens only 92 or more can be kept"
