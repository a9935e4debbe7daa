"""Generates text, whole or streamed.

    completion = generate(model, tokenizer, "Once upon a time", max_new_tokens=100, temperature=0.8, seed=1)
    for piece in stream(model, tokenizer, "Once upon a time"):
        print(piece, end="", flush=True)

A request checks and encodes its prompts, prefills rows of an engine (`engine.py`) and runs them until each row has
ended.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llamajax.caches import check_cache_dtype
from llamajax.errors import LlamaJaxError
from llamajax.generation.engine import STOPS, Engine, Knobs, Options
from llamajax.generation.kept import Kept, MadeOnHost
from llamajax.generation.programs import DECODE_BLOCK
from llamajax.generation.request import (
    Completion,
    Prompt,
    Row,
    as_prompts,
    by_prompt,
    check_ids,
    check_knobs,
    check_samples,
    encode_prompts,
    new_token_limit,
    row_seeds,
    stop_strings,
)
from llamajax.generation.speculate import check_speculate
from llamajax.generation.speed import Speed
from llamajax.model import Llama
from llamajax.parameters import step_bytes
from llamajax.tokenizer import Tokenizer
from llamajax.words import SAMPLING
from llamajax.workers import workers

# The time between two updates of streamed text that the stream aims at.
_UPDATE_SECONDS = 0.05


def generate(model: Llama, tokenizer: Tokenizer | None, prompts: Prompt | Sequence[Prompt], **options: Any) -> Any:
    """Continues one prompt or a batch of prompts of any lengths.

    Numbers may be Python's, NumPy's or JAX's; arrays may replace lists.

    The result of a row depends only on its prompt, its seed and the options, not on the rest of the batch (up to
    rounding: matrix products of another shape may be summed in another order).

    Args:
        model: the model.
        tokenizer: the model's tokenizer. It may be None if all prompts are ids and there are no stop strings; `text`
            is then "".
        prompts: a text (a BOS is put before it), ids (a list or an array, used unchanged), a list of either, or an
            array [B, T] of ids.
        **options: the options of `TextStream`: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty,
            seed, samples, stop, stop_ids, cache_dtype, speculate, kept. Their defaults do not depend on the checkpoint:
            pass `**tokenizer.words.sampling` for its sampling settings.

    Returns:
        A `Completion`, or a list of them if `prompts` is a list of prompts. With `samples`, a list of completions for
        one prompt, and a list of such lists for several prompts.

    Raises:
        LlamaJaxError: for an option out of range, a prompt that does not fit the context, or logits that are not
            finite: the message names the token and the row.
    """
    run = TextStream(model, tokenizer, prompts, smooth=False, **options)
    for _ in run:
        pass
    if run.single:
        return run.completions[0]
    _, one_prompt = as_prompts(prompts)
    return run.completions if options.get("samples") is None or one_prompt else run.by_prompt


def stream(
    model: Llama, tokenizer: Tokenizer | None, prompts: Prompt | Sequence[Prompt], **options: Any
) -> "TextStream":
    """Like `generate`, but returns an iterator over the text as it is generated: strings, or lists for a batch."""
    return TextStream(model, tokenizer, prompts, **options)


class TextStream:
    """One running request; iterating over it generates its text.

    Attributes:
        model: the model; for `compile`, its leaves may be abstract (`jax.ShapeDtypeStruct`) until the iteration begins.
        completions: one completion for each row; final once the iteration has ended.
        speed: the cost of the request so far.
        single: whether the request generates one text (one prompt, one sample) rather than a list.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer | None,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        min_p: float | Sequence[float] | None = None,
        repetition_penalty: float | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        samples: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_ids: Sequence[int] | None = None,
        cache_dtype: jax.typing.DTypeLike | None = None,
        speculate: int = 0,
        smooth: bool = True,
        least_slots: int = 0,
        kept: Kept | None = None,
    ):
        """Checks the options and encodes the prompts; runs nothing yet.

        Args:
            model: the model, or its shapes (see the attribute).
            tokenizer: the model's tokenizer, or None (see `generate`).
            prompts: see `generate`.
            max_new_tokens: the most new tokens of a row; defaults to 512, or to the room in the context if that is
                less.
            temperature: 0 is greedy. This and the next knobs have one value for all prompts, or one for each prompt:
                see `sampling.Sampler`.
            top_k: see `sampling.Sampler`; None is off.
            top_p: likewise.
            min_p: likewise.
            repetition_penalty: likewise.
            seed: a whole number from 0 to 2**32 - 1; one for all prompts, or one for each.
            samples: the number of texts for each prompt, which share one prefill. The first is the text that the seed
                gives without `samples`; the others use other draws. `completions` has those of the first prompt first.
            stop: texts at which a row ends; they are not part of its text.
            stop_ids: ids at which a row ends; defaults to the tokenizer's.
            cache_dtype: the dtype of keys and values, one of `caches.CACHE_DTYPES`; defaults to the model's dtype.
            speculate: the number of drafted tokens that each forward pass checks (see `speculate.py`); 0 is off. The
                text is the same up to rounding: a product over more tokens may be summed in another order.
            smooth: whether text should come every 50 ms rather than 64 tokens at a time.
            least_slots: the fewest slots of the cache; a request that needs more gets more. Requests with the same
                number of slots share their programs.
            kept: the rows of earlier requests. This request reuses the cached tokens that its prompts share with them,
                and leaves its own rows there.
        """
        each, single = as_prompts(prompts)
        self.single = single and samples is None
        self._samples = check_samples(samples)
        self.model, self._smooth = model, smooth
        self._prompts = encode_prompts(tokenizer, each, model.config)
        self._limit = new_token_limit(self._prompts, max_new_tokens, model.config)
        knobs = dict(zip(SAMPLING, (temperature, top_k, top_p, min_p, repetition_penalty), strict=True))
        ends = tuple(tokenizer.stop_ids if tokenizer else ()) if stop_ids is None else check_ids(stop_ids, model.config)
        self._knobs = _knobs_of_rows(knobs, seed, len(self._prompts), self._samples, self._limit, ends)
        cache_dtype = check_cache_dtype(model.dtype if cache_dtype is None else cache_dtype)
        self._options = Options(cache_dtype=cache_dtype, drafts=check_speculate(speculate), stops=max(STOPS, len(ends)))
        stops = stop_strings(stop, tokenizer)
        self._rows = [Row(prompt, tokenizer, stops, ends) for prompt in self._prompts for _ in range(self._samples)]
        self._least_slots = least_slots
        self._kept = Kept() if kept is None else kept
        self._stopped = False
        self.speed = Speed()

    @property
    def completions(self) -> list[Completion]:
        """The results so far, in the order of the prompts, and for each prompt in the order of its samples."""
        return [row.completion() for row in self._rows]

    @property
    def by_prompt(self) -> list[list[Completion]]:
        """The samples of each prompt."""
        n, completions = self._samples, self.completions
        return [completions[i : i + n] for i in range(0, len(completions), n)]

    def stop(self) -> None:
        """Ends the request after the forward passes in progress; rows that still run get the reason "stopped".

        It only sets a flag, so that a signal handler or another thread may call it.
        """
        self._stopped = True

    def compile(self) -> None:
        """Compiles or loads the programs of this request; without this call, that happens at their first use."""
        slots = self._kept.slots(self.model, len(self._rows), self._slots(), self._options)
        engine = Engine(self.model, len(self._rows), slots, **self._options, counted=self.speed)
        engine.compile(max(map(len, self._prompts)), self._sources(), self._samples - 1)

    def compile_while(self, read: Callable[[], Llama]) -> None:
        """Runs `compile` while another thread calls `read`, which returns the model to run."""
        with workers(1) as reader:
            reading = reader.submit(read)
            self.compile()
            self.model = reading.result()

    def __iter__(self) -> Iterator[Any]:
        """Runs the request; each item is the text that has become final: a string, or a list with one for each row.

        Raises:
            LlamaJaxError: if logits are not finite; the text before them is yielded first.
        """
        engine = self._kept.fit(self.model, len(self._rows), self._slots(), self._options, self.speed)
        self.model = engine.model
        self.speed.step_bytes = step_bytes(engine.model) + self._kept.nbytes
        self._prefill()
        block, ended = 1 if self._smooth else DECODE_BLOCK, set[int]()
        while not self._stopped and not all(row.finish_reason for row in self._rows):
            now = {i for i, row in enumerate(self._rows) if row.cut}
            if now - ended:  # a stop string ended these rows, and the engine does not see stop strings
                self._kept.free(sorted(now - ended))
            ended = now
            start, before = time.perf_counter(), self.speed.compile_seconds
            made = self._kept.step(block)
            seconds = time.perf_counter() - start - (self.speed.compile_seconds - before)
            taken = [
                row.take(tokens[:count], log_probabilities[:count], len(row.tokens) + count == self._limit)
                for row, tokens, log_probabilities, count in zip(
                    self._rows, made.token_BM, made.log_probability_BM, made.count_B, strict=True
                )
            ]
            self._account(made, seconds, sum(count for _, count in taken))
            if self._smooth:
                passes = made.pass_B.max()
                block = int(np.clip(_UPDATE_SECONDS * passes / max(seconds, 1e-9), 1, DECODE_BLOCK))
            yield self._piece([text for text, _ in taken])
            self._check_finite()
        rest = [row.stop() for row in self._rows]
        if any(rest):
            yield self._piece(rest)

    def _piece(self, texts: list[str]) -> Any:
        return texts[0] if self.single else texts

    def _check_finite(self) -> None:
        """Raises `LlamaJaxError` if a row's logits are not finite: all its later tokens would be the same."""
        for number, row in enumerate(self._rows):
            if row.not_finite:
                self._kept.clear()
                half = "float16" in (str(self.model.dtype), self._options["cache_dtype"])
                raise LlamaJaxError(
                    f"the logits for new token {len(row.tokens) + 1} of prompt {number // self._samples + 1} (position "
                    f"{row.prompt_tokens + len(row.tokens)}) are not finite: "
                    + (
                        "values overflow float16, or the weights hold NaN or infinity: compute in float32 or bfloat16, "
                        "or check the checkpoint"
                        if half
                        else f"the weights hold NaN or infinity, or values overflow {self.model.dtype}: check the "
                        "checkpoint"
                    )
                )

    def _slots(self) -> int:
        """The number of slots that this request needs in the cache."""
        longest = max(map(len, self._prompts))
        return max(longest + self._limit - 1 + self._options["drafts"], self._least_slots)

    def _sources(self) -> list[int]:
        """For each prompt, the row to prefill: that of its samples' rows whose cache holds most of the prompt."""
        n = self._samples
        sources = []
        for i, prompt in enumerate(self._prompts):
            shared = [self._kept.shared(row, prompt) for row in range(i * n, (i + 1) * n)]
            sources.append(i * n + shared.index(max(shared)))
        return sources

    def _prefill(self) -> None:
        """Puts all but the last token of each prompt into the rows; returns early if the request is stopped."""
        kept, sources = self._kept, self._sources()
        start, before = time.perf_counter(), self.speed.compile_seconds
        chunks = kept.plan(sources, self._prompts)
        held = chunks[0].held_b.tolist() if chunks else [len(prompt) - 1 for prompt in self._prompts]
        self.speed.reused_tokens = sum(held)
        for chunk in chunks:
            if self._stopped:
                return
            kept.extend(sources, chunk)
            self.speed.prefill_chunks += 1
            self.speed.prefill_tokens += int(chunk.count_b.sum())
        kept.start(sources, self._prompts, [self._knobs[row] for row in sources])
        for i, source in enumerate(sources):
            others = [row for row in range(i * self._samples, (i + 1) * self._samples) if row != source]
            if others:
                kept.copy(source, others, [self._knobs[row] for row in others])
        kept.wait()
        if chunks:
            self.speed.prefill_seconds = time.perf_counter() - start - (self.speed.compile_seconds - before)

    def _account(self, made: MadeOnHost, seconds: float, tokens: int) -> None:
        self.speed.decode_steps += int(made.pass_B.max())
        self.speed.row_steps += int(made.pass_B.sum()) if self._options["drafts"] else 0
        self.speed.decode_seconds += seconds
        self.speed.decode_tokens += tokens


def _knobs_of_rows(
    knobs: dict[str, Any], seed: Any, prompts: int, samples: int, limit: int, ends: tuple[int, ...]
) -> list[Knobs]:
    """The `Knobs` of each row, the samples of the first prompt first; a knob has one value, or one for each prompt."""
    check_knobs(knobs, prompts)
    each = by_prompt(knobs | {"seed": row_seeds(seed, prompts)}, prompts)
    return [Knobs(limit, **one, sample=sample, stop_ids=ends) for one in each for sample in range(samples)]
