"""The generation loop against loops without a cache: tokens, log-probabilities, limits, programs, speed.

test_stream.py tests the text while it streams.
"""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llamajax
from llamajax import Engine, EngineState, Knobs, Llama, LlamaJaxError, Made, Tokenizer, generate, prefill, stream
from llamajax.caches import CACHE_DTYPES
from llamajax.generation.programs import DECODE_BLOCK, PREFILL_BUCKETS, plan_chunks, step
from llamajax.generation.speed import Speed
from llamajax.quantization.quantize import quantize, read_recipe

ROOT = Path(__file__).parents[1]
LENGTH = 64  # length of all sequences in the loops without a cache, so that they share one program
PROMPT = [1, 270, 300, 12, 12, 281]

_all_logits = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


def _logits(model: Llama, ids: list[int]) -> np.ndarray:
    """Returns the logits after every position of `ids`, without a cache; later padding is not seen."""
    assert len(ids) <= LENGTH
    return np.asarray(_all_logits(model, jnp.asarray([ids + [0] * (LENGTH - len(ids))])))[0, : len(ids)]


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def _greedy(model: Llama, prompt: list[int], count: int, penalty: float = 1.0) -> list[int]:
    """Generates greedily, and computes everything again in each step."""
    ids = list(prompt)
    for _ in range(count):
        logits = _logits(model, ids)[-1].copy()
        for index in set(ids):
            logits[index] = logits[index] / penalty if logits[index] > 0 else logits[index] * penalty
        ids.append(int(np.argmax(logits)))
    return ids[len(prompt) :]


def _ragged() -> list[list[int]]:
    """Returns eight prompts of 1 to 30 ids: rows without a prefill beside rows of two buckets."""
    rng = np.random.default_rng(5)
    return [[1, *map(int, rng.integers(3, 320, length))] for length in (5, 0, 29, 1, 16, 17, 3, 8)]


# ---- The same tokens as without a cache -----------------------------------------------------------------------------


def test_greedy_is_the_argmax_loop(tiny_model: Llama) -> None:
    completion = generate(tiny_model, None, PROMPT, max_new_tokens=24, temperature=0)
    assert completion.tokens == _greedy(tiny_model, PROMPT, 24)
    assert len(set(completion.tokens)) > 3, "a text that repeats a token would prove nothing"
    assert (completion.prompt_tokens, completion.finish_reason, completion.text) == (6, "length", "")


def test_log_probabilities_are_the_models_own(tiny_model: Llama) -> None:
    """They are those before temperature and filters, whatever token these chose."""
    completion = generate(tiny_model, None, PROMPT, max_new_tokens=24, temperature=1.7, top_k=50, seed=3)
    expected = _log_softmax(_logits(tiny_model, PROMPT + completion.tokens))
    picked = [expected[len(PROMPT) - 1 + i, token] for i, token in enumerate(completion.tokens)]
    np.testing.assert_allclose(completion.log_probabilities, picked, atol=1e-4)


def test_repetition_penalty_is_the_numpy_loop(tiny_model: Llama) -> None:
    penalized = generate(tiny_model, None, PROMPT, max_new_tokens=24, temperature=0, repetition_penalty=1.5).tokens
    assert penalized == _greedy(tiny_model, PROMPT, 24, penalty=1.5)
    assert penalized != _greedy(tiny_model, PROMPT, 24)


def test_a_row_does_not_depend_on_its_batch(tiny_model: Llama) -> None:
    prompts = _ragged()
    seeds = [7, 7, 8, 9, 10, 11, 12, 4_294_967_295]
    batch = generate(tiny_model, None, prompts, max_new_tokens=12, seed=seeds)
    for prompt, seed, row in zip(prompts, seeds, batch, strict=True):
        alone = generate(tiny_model, None, prompt, max_new_tokens=12, seed=seed)
        assert alone.tokens == row.tokens
        np.testing.assert_allclose(alone.log_probabilities, row.log_probabilities, atol=1e-4)
        assert row.prompt_tokens == len(prompt)


def test_seeds(tiny_model: Llama) -> None:
    rows = generate(tiny_model, None, [PROMPT] * 8, max_new_tokens=12, seed=[0, 0, 1, 2, 3, 4, 5, 6])
    again = generate(tiny_model, None, [PROMPT] * 8, max_new_tokens=12, seed=[0, 0, 1, 2, 3, 4, 5, 6])
    assert [row.tokens for row in rows] == [row.tokens for row in again]
    assert rows[0] == rows[1]
    assert len({tuple(row.tokens) for row in rows}) == 7


def test_knobs_by_row(tiny_model: Llama) -> None:
    """With top_k 1 a row is greedy, whatever the other rows do."""
    rows = generate(tiny_model, None, [PROMPT] * 8, max_new_tokens=12, top_k=[1, 1, 1, 320, 320, 320, 320, 320], seed=2)
    assert rows[0].tokens == rows[2].tokens == _greedy(tiny_model, PROMPT, 12)
    assert rows[3].tokens == rows[7].tokens != rows[0].tokens


def test_prompts_as_text_and_as_ids(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    text = "Once upon a time"
    ids = tiny_tokenizer.encode(text)
    first = generate(tiny_model, tiny_tokenizer, text, max_new_tokens=12, temperature=0)
    for prompt in (ids, np.asarray(ids), tuple(ids)):
        assert generate(tiny_model, tiny_tokenizer, prompt, max_new_tokens=12, temperature=0) == first
    mixed = generate(tiny_model, tiny_tokenizer, [text, ids], max_new_tokens=12, temperature=0)
    assert [row.tokens for row in mixed] == [first.tokens] * 2
    assert first.prompt_tokens == len(ids)
    empty = generate(tiny_model, tiny_tokenizer, "", max_new_tokens=12, temperature=0)
    assert empty == generate(tiny_model, tiny_tokenizer, [1], max_new_tokens=12, temperature=0)


def test_numbers_and_arrays_of_numpy_and_jax(tiny_model: Llama) -> None:
    options = {"max_new_tokens": 8, "temperature": 0.5, "seed": 3}
    expected = generate(tiny_model, None, [PROMPT, PROMPT], **options)
    for kind in (np.asarray, jnp.asarray):
        rows = {"max_new_tokens": np.int64(8), "temperature": kind([0.5, 0.5]), "seed": kind([3, 3])}
        assert generate(tiny_model, None, kind([PROMPT, PROMPT]), **rows) == expected
        assert generate(tiny_model, None, [kind(PROMPT), tuple(kind(PROMPT))], **options) == expected
    scalars = {"max_new_tokens": jnp.asarray(8), "temperature": np.float32(0.5), "seed": np.uint32(3)}
    alone = generate(tiny_model, None, jnp.asarray(PROMPT), **scalars, speculate=np.int64(0))
    assert alone.tokens == expected[0].tokens


def test_a_model_on_the_host(tiny_model: Llama) -> None:
    """A model of NumPy arrays, as `load(..., shardings="host")` gives, does what the model on a device does."""
    host = jax.tree.map(np.asarray, tiny_model)
    for options in ({}, {"speculate": 2}):
        made = generate(host, None, PROMPT, max_new_tokens=8, temperature=0, **options)
        assert made == generate(tiny_model, None, PROMPT, max_new_tokens=8, temperature=0, **options)
    ahead = stream(host, None, PROMPT, max_new_tokens=8, temperature=0)
    ahead.compile()
    list(ahead)
    assert ahead.completions[0].tokens == made.tokens


def test_greedy_rows_beside_sampled_ones(tiny_model: Llama) -> None:
    rows = generate(tiny_model, None, [PROMPT] * 8, max_new_tokens=12, temperature=[0, 0, 0, 1, 1, 1, 1, 1], seed=2)
    assert rows[0].tokens == rows[2].tokens == _greedy(tiny_model, PROMPT, 12)
    assert rows[3].tokens == rows[7].tokens != rows[0].tokens
    assert all(math.isfinite(each) for row in rows for each in row.log_probabilities)


# ---- Logits that are not finite --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(tiny_model: Llama) -> Llama:
    """The tiny model with infinity as the embedding of token 300: rows with this token in the context compute NaN."""
    model = jax.tree.map(lambda leaf: leaf, tiny_model)
    table = np.array(model.embed_VD.get_value())
    table[300] = np.inf
    model.embed_VD.set_value(jnp.asarray(table))
    return model


@pytest.mark.parametrize("speculate", [0, 3])
def test_logits_that_are_not_finite_end_a_request(speculate: int, poisoned: Llama) -> None:
    """The error names the prompt, the new token and its position; the logits of the row before are finite."""
    message = r"^the logits for new token 1 of prompt 2 \(position 6\) are not finite: the weights hold NaN or infinity"
    prompts = [[1, 270, 12, 12, 281], PROMPT]
    with pytest.raises(LlamaJaxError, match=message):
        generate(poisoned, None, prompts, max_new_tokens=6, temperature=0, speculate=speculate)


def test_text_before_logits_that_are_not_finite_comes(poisoned: Llama, tiny_model: Llama) -> None:
    """The head says a poisoned token in the end; tokens before it are in the stream and in `completions`."""
    model = jax.tree.map(lambda leaf: leaf, poisoned)
    made = _greedy(tiny_model, [1, 5], 30)
    last = next(token for i, token in enumerate(made) if i > 3 and token not in made[:i] and token not in (1, 5))
    table = np.array(tiny_model.embed_VD.get_value())
    table[last] = np.nan
    model.embed_VD.set_value(jnp.asarray(table))
    at = made.index(last)
    for smooth in (True, False):
        run = stream(model, None, [1, 5], max_new_tokens=30, temperature=0, smooth=smooth)
        with pytest.raises(
            LlamaJaxError, match=rf"new token {at + 2} of prompt 1 \(position {at + 3}\) are not finite"
        ):
            list(run)
        assert run.completions[0].tokens == made[: at + 1]
        assert np.isfinite(run.completions[0].log_probabilities).all()


def test_an_overflow_of_float16_is_named(tiny_model: Llama) -> None:
    model = jax.tree.map(lambda leaf: (leaf * 3000).astype(jnp.float16), tiny_model)
    with pytest.raises(LlamaJaxError, match="values overflow float16, .*: compute in float32 or bfloat16"):
        generate(model, None, PROMPT, max_new_tokens=6)


def _run_by_hand(model: Llama, state: EngineState, limit: int) -> tuple[EngineState, Made]:
    return jax.jit(step)(model, state, jnp.asarray(limit))


def test_prefill_and_step_by_hand(tiny_model: Llama) -> None:
    """Pure functions under plain `jax.jit`, in two chunks and two calls, give the tokens of `generate`."""
    prompt, plain_prefill = list(range(3, 40)), jax.jit(prefill)
    engine = Engine(tiny_model, 1, 256)
    state = engine.start(engine.empty(), [0], [prompt], [Knobs(80, temperature=0.9, seed=5)])
    cache = dataclasses.replace(state.cache, length_B=jnp.asarray([0]))
    cache = plain_prefill(tiny_model, jnp.asarray([prompt[:16]]), jnp.asarray([16]), cache)
    padded = jnp.asarray([prompt[16:-1] + [0] * 12])
    cache = plain_prefill(tiny_model, padded, jnp.asarray([20]), cache)
    assert cache.length_B.tolist() == [36]
    state = dataclasses.replace(state, cache=cache)
    made: list[int] = []
    for limit in (5, 1000):  # more than a block counts as a block
        state, new = _run_by_hand(tiny_model, state, limit)
        assert new.token_BM.shape == new.log_probability_BM.shape == (1, DECODE_BLOCK)
        assert new.count_B.tolist() == new.pass_B.tolist() == [min(limit, DECODE_BLOCK)]
        made += new.token_BM[0, : int(new.count_B[0])].tolist()
    assert state.cache.length_B.tolist() == [36 + 5 + DECODE_BLOCK]
    assert state.newest_B.tolist() == made[-1:]
    assert state.history_BS[0, : 37 + len(made)].tolist() == prompt + made
    assert state.left_B.tolist() == [80 - len(made)]
    expected = generate(tiny_model, None, prompt, max_new_tokens=len(made), temperature=0.9, seed=5)
    assert made == expected.tokens


def test_a_step_ends_when_every_row_has(tiny_model: Llama) -> None:
    """One row ends by a stop token of its own, the other by its limit."""
    made = _greedy(tiny_model, PROMPT, 8)
    stop = next(token for i, token in enumerate(made) if i > 2 and token not in made[:i])
    engine = Engine(tiny_model, 2, 256)
    state = engine.insert(
        engine.empty(), [0, 1], [PROMPT] * 2, [Knobs(64, temperature=0, stop_ids=(319, stop)), Knobs(8, temperature=0)]
    )
    state, new = _run_by_hand(tiny_model, state, 64)
    assert new.count_B.tolist() == new.pass_B.tolist() == [made.index(stop) + 1, 8]
    assert new.token_BM[0, : made.index(stop) + 1].tolist() == made[: made.index(stop) + 1]
    assert new.token_BM[1, :8].tolist() == made
    assert state.left_B.tolist() == [0, 0]
    assert state.cache.length_B.tolist() == [5 + made.index(stop) + 1, 5 + 8]


# ---- Limits ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tiny_model: Llama) -> Llama:
    """The tiny model with a context of 32 tokens."""
    config = dataclasses.replace(tiny_model.config, context_length=32)
    structure = jax.tree.structure(llamajax.abstract_model(config))
    return jax.tree.unflatten(structure, jax.tree.leaves(tiny_model))


def test_filling_the_context_exactly(short: Llama, tiny_model: Llama) -> None:
    """32 tokens fit, and one more is generated, which is not fed back."""
    completion = generate(short, None, PROMPT, max_new_tokens=27, temperature=0)
    assert completion.tokens == _greedy(tiny_model, PROMPT, 27)
    assert generate(short, None, PROMPT, temperature=0).tokens == completion.tokens
    full = generate(short, None, PROMPT + completion.tokens[:-1], temperature=0)
    assert (full.prompt_tokens, full.tokens) == (32, completion.tokens[-1:])


def test_beyond_the_context(short: Llama) -> None:
    with pytest.raises(LlamaJaxError, match="max_new_tokens is 28: expected at most 27, the room in the context of 32"):
        generate(short, None, PROMPT, max_new_tokens=28)
    with pytest.raises(LlamaJaxError, match="the prompt has 33 tokens, but the model's context only 32"):
        generate(short, None, [[1], [1] * 33], max_new_tokens=1)


@given(st.integers(0, 5000))
@settings(deadline=None, derandomize=True, database=None)
def test_plan_chunks(length: int) -> None:
    """Chunks cover the prompt: largest ones, then one or two of one size, of which none needs less padding."""
    chunks = plan_chunks(length)
    largest = max(PREFILL_BUCKETS)
    assert set(chunks) <= set(PREFILL_BUCKETS) and chunks == sorted(chunks, reverse=True)
    rest = length % largest
    behind = chunks[length // largest :]
    assert chunks[: length // largest] == [largest] * (length // largest)
    assert len(set(behind)) <= 1 and len(behind) <= 2 and (rest > 0) == bool(behind)
    assert 0 <= sum(behind) - rest < max(behind, default=1)
    assert not any(rest <= size < sum(behind) for bucket in PREFILL_BUCKETS for size in (bucket, 2 * bucket))
    assert len(behind) < 2 or sum(behind) not in PREFILL_BUCKETS


# ---- Programs and speed ---------------------------------------------------------------------------------------------


@pytest.fixture
def backend_compilations(monkeypatch: pytest.MonkeyPatch):
    """Counts programs that XLA compiled, as JAX counts them; kept programs of earlier runs are not used."""
    seen: list[str] = []
    monkeypatch.setattr("llamajax.generation.compilation._program_file", lambda description: None)
    jax.monitoring.register_event_duration_secs_listener(lambda name, *args, **kwargs: seen.append(name))
    return lambda: sum("backend_compile" in name for name in seen)


def test_number_of_programs(tiny_model: Llama, tiny_tokenizer: Tokenizer, backend_compilations: Any) -> None:
    """One prefill and one decode program serve every prompt of a bucket and every value of every knob."""
    config = dataclasses.replace(tiny_model.config, context_length=600)  # a config of no other test: no program exists
    model = jax.tree.unflatten(jax.tree.structure(llamajax.abstract_model(config)), jax.tree.leaves(tiny_model))

    def compiled(prompt: list[int], **options: Any) -> int:
        run = stream(model, tiny_tokenizer, prompt, **options)
        list(run)
        return run.speed.compilations

    assert compiled([1] * 2, max_new_tokens=3, temperature=0.5) == 2
    before = backend_compilations()
    assert before >= 2
    for length in (3, 9, 17):
        assert compiled([1] * length, max_new_tokens=3, temperature=0.5) == 0
    assert compiled([1] * 9, max_new_tokens=20, temperature=0.6, seed=4) == 0
    assert compiled([1] * 9, max_new_tokens=70, temperature=1.0, seed=5, stop=["x", "yz"]) == 0
    assert compiled([1], max_new_tokens=3) == 0
    assert backend_compilations() == before
    assert compiled([1] * 34, max_new_tokens=3) == 1  # the next bucket needs another prefill program
    assert compiled([1] * 34, max_new_tokens=3, temperature=0) == 0  # greedy needs no other program
    assert compiled([1] * 34, max_new_tokens=3, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2) == 0
    ahead = stream(jax.eval_shape(lambda: model), None, [1] * 9, max_new_tokens=3, speculate=2)
    ahead.compile()
    ahead.model = model
    before = backend_compilations()
    assert len(list(ahead)) > 0 and len(ahead.completions[0].tokens) == 3
    assert ahead.speed.compilations == 1 and ahead.speed.compile_seconds > 0  # drafts need another program
    assert backend_compilations() == before
    assert compiled([1]) == 1  # room for 512 tokens, the default limit
    assert len(generate(model, None, [1], seed=8).tokens) == 512


def test_speed_adds_up(tiny_model: Llama) -> None:
    prompts = [[1] * 300, [1] * 20]
    run = stream(tiny_model, None, prompts, max_new_tokens=9, temperature=0)
    list(run)
    speed = run.speed
    assert (speed.prefill_tokens, speed.prefill_chunks) == (299 + 19, len(plan_chunks(299)))
    assert (speed.decode_tokens, speed.decode_steps) == (18, 9)
    assert speed.decode_tokens == sum(len(completion.tokens) for completion in run.completions)
    c = tiny_model.config
    slots = 512  # 320 prefilled slots, in multiples of 256
    cache = 2 * c.num_layers * 2 * c.num_kv_heads * slots * c.head_size * 4 + 2 * 4
    assert speed.step_bytes == (c.num_parameters - c.vocab_size * c.width) * 4 + cache  # without the embedding
    assert math.isclose(speed.decode_tokens_per_second, 18 / speed.decode_seconds)
    assert math.isclose(speed.prefill_tokens_per_second, 318 / speed.prefill_seconds)
    assert math.isclose(speed.decode_gigabytes_per_second, speed.step_bytes * 9 / speed.decode_seconds / 1e9)
    assert math.isclose(speed.prefill_gigabytes_per_second, speed.step_bytes * 2 / speed.prefill_seconds / 1e9)


def test_speed_of_nothing() -> None:
    speed = Speed()
    assert speed.prefill_tokens_per_second == speed.decode_tokens_per_second == 0
    assert speed.prefill_gigabytes_per_second == speed.decode_gigabytes_per_second == 0


# ---- Keys of kept programs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized_box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "box"
    model, tokenizer = llamajax.load("box")
    llamajax.save_checkpoint(quantize(model, read_recipe("int4-g32")), folder, tokenizer=tokenizer)
    return folder


_COUNTED = """
import collections, contextlib, io, json, sys
import jax
seen = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: seen.update([event]))
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: seen.update([event]))
import llamajax
from llamajax.cli import main
for argv in json.loads(sys.argv[1]):
    seen.clear()
    llamajax.clear_programs()
    jax.clear_caches()
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(argv) == 0
    for stream in (out, err):
        stream.flush()
    said = err.buffer.getvalue().decode().splitlines()[-1]
    read = seen["/jax/compilation_cache/cache_hits"]  # JAX's event of compiling comes for these too
    compiled = seen["/jax/core/compile/backend_compile_duration"] - read
    print(json.dumps({"text": out.buffer.getvalue().decode(), "said": said, "compiled": compiled, "read": read}))
"""


def test_a_second_process_compiles_nothing(tmp_path: Path, quantized_box: Path) -> None:
    """Nothing is compiled: not a request's two programs, nor small ones such as an empty cache's; packed or not."""
    argvs = [
        ["generate", f"--model={model}", "--prompt=Once upon a time", "--max_new_tokens=8", *options]
        for model, options in (
            ("box", ["--temperature=0.8"]),
            ("box", ["--temperature=0", "--speculate=2"]),
            (quantized_box, ["--temperature=0.7"]),
        )
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = {**kept, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", _COUNTED, json.dumps(argvs)]
    first, second = [], []
    for seen in (first, second):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=900)
        seen += map(json.loads, done.stdout.splitlines())
    assert first[0]["compiled"] > 2 and first[0]["read"] == 0, "the first process must find no programs"
    assert "for 2 programs," in first[0]["said"]
    assert len(first) == len(argvs) and all(each["compiled"] > 0 for each in first), "each has its own programs"
    for before, after in zip(first, second, strict=True):
        assert after["compiled"] == 0 and after["read"] > 0
        assert "for 0 programs and 2 kept by an earlier run" in after["said"]
        assert before["text"] == after["text"] and after["text"].startswith("Once upon a time,")


def test_what_programs_are_found_by_has_no_address(quantized_box: Path) -> None:
    """Kept programs are found by the `repr` of their arguments' structure: addresses would differ per process."""
    box, tokenizer = llamajax.load("box")
    packed, _ = llamajax.load(quantized_box)
    trees: list[Any] = [box, packed, llamajax.prepare(packed)]
    trees += [llamajax.prepare(llamajax.with_activations(packed, kind)) for kind in ("int8", "bfloat16")]
    trees += [
        Engine(box, 2, 64, cache_dtype=dtype, drafts=drafts).empty() for dtype in CACHE_DTYPES for drafts in (0, 2)
    ]
    shown = [repr(jax.tree.structure(tree)) for tree in trees]
    assert len(set(shown[:5])) == 5 and all("Config(" in each for each in shown[:5]), "the repr must show the config"
    assert [each for each in shown if re.search(r"\b0x[0-9a-f]{4,}| object at |<function|<lambda>|\.\.\.", each)] == []


# ---- Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompt was given: expected at least one"),
        ([[1], []], {}, "a prompt has no tokens"),
        ("text", {}, "the model was loaded without a tokenizer: give one, or prompts as lists of ids"),
        ([1, 320], {}, "token 320 in a prompt: expected ids from 0 to 319"),
        ([1, -1], {}, "token -1 in a prompt: expected ids from 0 to 319"),
        ([[1.5]], {}, "1.5"),
        ([["a"]], {}, "'a'"),
        ([1.5, 2], {}, "1.5 in a prompt: expected a text, or a list of whole numbers"),
        (np.ones((2, 2)), {}, "1.0 in a prompt: expected a text, or a list of whole numbers"),
        (b"abc", {}, r"the prompt is b'abc': expected a text, a list of token ids, or a list of either"),
        (5, {}, "the prompt is 5: expected a text, a list of token ids, or a list of either"),
        ([1], {"seed": np.int64(-1)}, "seed is -1: expected a whole number from 0"),
        ([1], {"max_new_tokens": np.float32(3)}, "max_new_tokens is 3.0: expected a whole number, at least 1"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0: expected a whole number, at least 1"),
        ([1], {"max_new_tokens": 2.0}, "max_new_tokens is 2.0: expected a whole number, at least 1"),
        ([1], {"max_new_tokens": True}, "max_new_tokens is True: expected a whole number, at least 1"),
        ([1], {"seed": -1}, "seed is -1: expected a whole number from 0 to 4294967295"),
        ([1], {"seed": 2**32}, "seed is 4294967296: expected a whole number from 0 to 4294967295"),
        ([1], {"seed": True}, "seed is True: expected a whole number from 0 to 4294967295"),
        ([1], {"seed": 1.5}, "seed is 1.5: expected a whole number from 0 to 4294967295"),
        ([1], {"seed": [1, 2]}, "2 seeds were given: expected one, or one for each of 1 prompts"),
        ([[1], [1]], {"temperature": [1.0, 1.0, 1.0]}, "temperature has 3 values: expected one, or one for each of 2"),
        (
            [1],
            {"repetition_penalty": [1.1, 1.2]},
            "repetition_penalty has 2 values: expected one, or one for each of 1",
        ),
        ([1], {"temperature": -0.1}, "temperature is -0.1: expected 0 .greedy. or a finite number of at least 1e-4"),
        ([1], {"temperature": 10**400}, "temperature is .*: expected 0 .greedy. or a finite number of at least 1e-4"),
        ([1], {"top_k": 0}, "top_k is 0: expected a whole number from 1 to"),
        ([1], {"top_p": 0}, "top_p is 0: expected a number above 0, at most 1"),
        ([1], {"min_p": 1.1}, "min_p is 1.1: expected a number from 0 to 1"),
        ([1], {"repetition_penalty": 0}, "repetition_penalty is 0: expected a positive number, 1 for none"),
        ([1], {"stop": "x"}, "stop strings need a tokenizer, and the model was loaded without one"),
        ([1], {"stop": ["x", ""]}, r"stop is \['x', ''\]: expected texts of at least one character"),
        ([1], {"stop": 5}, "stop is 5: expected texts of at least one character"),
    ],
)
def test_refused(prompts: Any, options: dict[str, Any], message: str, tiny_model: Llama) -> None:
    with pytest.raises(LlamaJaxError, match=message):
        stream(tiny_model, None, prompts, **options)


def test_text_that_is_not_unicode(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    """Bytes of the command line that are not UTF-8 reach Python strings as lone surrogates."""
    with pytest.raises(LlamaJaxError, match="not|UTF-8|Unicode"):
        generate(tiny_model, tiny_tokenizer, "caf\udce9", max_new_tokens=1)
