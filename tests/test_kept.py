"""Rows kept from request to request, stopped requests, and samples: what is prefilled, and the same text."""

import threading
from typing import Any

import jax
import numpy as np
import pytest

from llamajax import Kept, Knobs, Llama, LlamaJaxError, Tokenizer, generate, stream
from llamajax.generation.compilation import Compilations, CompiledFunction
from tests.test_engine import Alone, Request

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
FIRST = [1, *range(10, 30)]


def _run(model: Llama, prompt: Any, **options: Any) -> Any:
    run = stream(model, None, prompt, **{**GREEDY, **options})
    list(run)
    return run


def test_a_second_turn_prefills_only_what_is_new(tiny_model: Llama) -> None:
    """Generated tokens are kept, too, except the newest one; so are tokens of a cache that had to grow."""
    kept = Kept()
    first = _run(tiny_model, FIRST, kept=kept)
    assert (first.speed.prefill_tokens, first.speed.reused_tokens) == (20, 0)
    made = first.completions[0].tokens
    assert kept.held == [[*FIRST, *made[:-1]]]
    text = [*FIRST, *made, *range(60, 70)]
    second = _run(first.model, text, kept=kept)
    assert (second.speed.prefill_tokens, second.speed.reused_tokens) == (len(text) - 1 - 32, 32)
    assert second.completions[0].tokens == generate(tiny_model, None, text, **GREEDY).tokens
    longer = _run(tiny_model, text, kept=kept, max_new_tokens=250)
    assert longer.speed.reused_tokens == len(text) - 1 and longer.speed.prefill_chunks == 0
    assert kept.engine is not None and kept.engine.slots == 512
    assert longer.completions[0].tokens[:12] == second.completions[0].tokens
    other = [*FIRST[:7], 99, 98]
    third = _run(tiny_model, other, kept=kept)
    assert (third.speed.prefill_tokens, third.speed.reused_tokens) == (1, 7)
    assert third.completions[0].tokens == generate(tiny_model, None, other, **GREEDY).tokens
    again = _run(jax.tree.map(lambda leaf: leaf * 2, tiny_model), other, kept=kept)
    assert again.speed.reused_tokens == 0, "tokens of another model must not be reused"


def test_what_is_given_up_or_stopped_stays_of_use(tiny_model: Llama) -> None:
    kept = Kept()
    for piece in stream(tiny_model, None, FIRST, kept=kept, **GREEDY):
        assert piece == ""
        break
    assert kept.held == [FIRST], "the one generated token is the newest, which is not kept"
    stopped = stream(tiny_model, None, [*FIRST, 5, 6], kept=kept, **GREEDY)
    for _ in stopped:
        stopped.stop()
    (completion,) = stopped.completions
    assert completion.finish_reason == "stopped" and 1 <= len(completion.tokens) < 12
    assert stopped.speed.reused_tokens == len(FIRST)
    text = [*FIRST, 5, 6, 7]
    last = _run(tiny_model, text, kept=kept)
    assert last.speed.reused_tokens == len(text) - 1 - last.speed.prefill_tokens >= len(FIRST) + 1
    assert last.completions[0].tokens == generate(tiny_model, None, text, **GREEDY).tokens


def test_stopped_between_chunks_of_a_prompt(tiny_model: Llama) -> None:
    """Tokens that were prefilled before the stop are kept."""
    kept, prompt = Kept(), [1, *range(3, 303)]
    run = stream(tiny_model, None, prompt, kept=kept, **GREEDY)
    extend = Kept.extend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kept, "extend", lambda *args: (extend(*args), run.stop())[0])
        assert list(run) == []
    assert [row.finish_reason for row in run.completions] == ["stopped"] and run.completions[0].tokens == []
    assert kept.held == [prompt[:256]] and run.speed.prefill_tokens == 256
    assert _run(tiny_model, prompt, kept=kept).speed.reused_tokens == 256


def test_samples_share_a_prefill(tiny_model: Llama, tiny_tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": [3, 4]}
    run = stream(tiny_model, tiny_tokenizer, [FIRST, [1, 5]], samples=3, **options)
    pieces = list(run)
    assert run.speed.prefill_tokens == 20 + 1 and not run.single
    alone = Alone(tiny_model)
    for i, (prompt, seed) in enumerate([(FIRST, 3), ([1, 5], 4)]):
        expected = [
            alone.run(Request(prompt, Knobs(12, seed=seed, sample=sample, stop_ids=tiny_tokenizer.stop_ids))).made
            for sample in range(3)
        ]
        texts = [row.tokens for row in run.completions[3 * i : 3 * i + 3]]
        assert texts == [[token for token in made if token not in tiny_tokenizer.stop_ids] for made in expected]
        assert len(set(map(tuple, texts))) == 3
    assert ["".join(row) for row in zip(*pieces, strict=True)] == [row.text for row in run.completions]
    grouped = generate(tiny_model, tiny_tokenizer, [FIRST, [1, 5]], samples=3, **options)
    assert grouped == [run.completions[:3], run.completions[3:]]
    of_one = generate(tiny_model, tiny_tokenizer, FIRST, samples=3, **{**options, "seed": 3})
    assert [row.tokens for row in of_one] == [row.tokens for row in run.completions[:3]]


@pytest.mark.parametrize("samples", [0, True, 2.0])
def test_samples_refused(samples: Any, tiny_model: Llama) -> None:
    with pytest.raises(LlamaJaxError, match=f"samples is {samples}: expected a whole number, at least 1"):
        stream(tiny_model, None, [1], samples=samples)


def test_stop_ids(tiny_model: Llama) -> None:
    made = generate(tiny_model, None, FIRST, **GREEDY).tokens
    ended = generate(tiny_model, None, FIRST, stop_ids=[319, made[4]], **GREEDY)
    assert ended.tokens == made[: made.index(made[4])] and ended.finish_reason == "stop"
    with pytest.raises(LlamaJaxError, match="320 in stop_ids: expected whole numbers from 0 to 319"):
        stream(tiny_model, None, FIRST, stop_ids=[320])


def test_threads_compile_a_program_once_and_count_their_own() -> None:
    """Eight threads want one of two programs; a thread that waited counts the time, but no program."""
    gate, traced = threading.Barrier(8), []

    def double(x: jax.Array) -> jax.Array:
        traced.append(x.shape)
        return x * 2

    program, counts = CompiledFunction(double), [Compilations() for _ in range(8)]
    results: list[Any] = [None] * 8

    def work(i: int) -> None:
        gate.wait()
        results[i] = program(np.full(3 + i % 2, i, np.float32), counted=counts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.tolist() for result in results] == [[2.0 * i] * (3 + i % 2) for i in range(8)]
    assert sorted(traced) == [(3,), (4,)] or program.total.loads
    assert program.total.compilations + program.total.loads == 2
    assert sum(each.compilations + each.loads for each in counts) == 2
    assert all(each.compilations + each.loads <= 1 for each in counts)
