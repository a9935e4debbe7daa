"""Text from a model, whole or as it comes.

    completion = generate(model, tokenizer, "Once upon a time", max_new_tokens=100, temperature=0.8, seed=1)
    for piece in stream(model, tokenizer, "Once upon a time"):
        print(piece, end="", flush=True)

A request checks and encodes its prompts, prefills a cache in buckets, and calls the decode program (`programs.py`), or
that of speculation (`speculate.py`), until every row has ended.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from llamajax.caches import KVCache, check_cache_dtype, empty_cache
from llamajax.errors import LlamaJaxError
from llamajax.generation.programs import (
    DECODE_BLOCK,
    SLOT_MULTIPLE,
    DecodeState,
    compiled_decode,
    compiled_prefill,
    plan_chunks,
)
from llamajax.generation.request import (
    Completion,
    Prompt,
    Row,
    as_prompts,
    check_knobs,
    encode_prompts,
    new_token_limit,
    row_keys,
    stop_strings,
)
from llamajax.generation.sampling import make_sampler
from llamajax.generation.speculate import LookupState, check_speculate, compiled_lookup, slots_beyond
from llamajax.generation.speed import Speed
from llamajax.meshes import auto_mesh, with_auto_axes
from llamajax.model import Llama
from llamajax.parameters import step_bytes
from llamajax.tokenizer import Tokenizer
from llamajax.workers import workers

# How often streamed text should appear.
_UPDATE_SECONDS = 0.05


def generate(
    model: Llama, tokenizer: Tokenizer | None, prompts: Prompt | Sequence[Prompt], **options: Any
) -> Completion | list[Completion]:
    """Continues one prompt or a batch of prompts of any lengths.

    Numbers may be Python's, NumPy's or JAX's; lists of them arrays.

    A row's result depends on its prompt, its seed and the options only, not on the rest of the batch (up to rounding:
    products of another shape may be summed in another order).

    Args:
        model: the model.
        tokenizer: its tokenizer; may be None if all prompts are ids and there are no stop strings: `text` is then "".
        prompts: a text (a BOS is put before it), or ids (a list or an array, taken as they are), or a list of
            either; or an array [B, T] of ids.
        **options: as of `TextStream`: max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop,
            cache_dtype, speculate. Their defaults do not depend on the checkpoint: what it asks for is in
            `tokenizer.words.sampling`, to be passed on as `**tokenizer.words.sampling`.

    Returns:
        A `Completion`, or a list of them if `prompts` is a list of prompts.

    Raises:
        LlamaJaxError: for an option out of range, a prompt that does not fit the context, or logits that are not
            finite: the message names the token and the row.
    """
    run = TextStream(model, tokenizer, prompts, smooth=False, **options)
    for _ in run:
        pass
    return run.completions[0] if run.single else run.completions


def stream(
    model: Llama, tokenizer: Tokenizer | None, prompts: Prompt | Sequence[Prompt], **options: Any
) -> "TextStream":
    """Like `generate`, but an iterator over the new text as it comes: strings, or lists of them for a batch."""
    return TextStream(model, tokenizer, prompts, **options)


class TextStream:
    """One request, running while it is iterated over.

    Attributes:
        model: what runs. Its leaves may be abstract (`jax.ShapeDtypeStruct`) until the iteration begins, for `compile`.
        completions: one a row; complete once the iteration has ended.
        speed: what it took so far.
        single: whether one prompt was given rather than a list.
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
        stop: str | Sequence[str] | None = None,
        cache_dtype: jax.typing.DTypeLike | None = None,
        speculate: int = 0,
        smooth: bool = True,
        least_slots: int = 0,
    ):
        """Checks and encodes; nothing runs yet.

        Args:
            model: the model, or its shapes: see the attribute.
            tokenizer: its tokenizer, or None (see `generate`).
            prompts: see `generate`.
            max_new_tokens: most new tokens a row; 512, or as many as the context still holds, unless given.
            temperature: 0 is greedy. This and the knobs behind it, each one value or one a row: see
                `sampling.Sampler`.
            top_k: see `sampling.Sampler`; None is off.
            top_p: likewise.
            min_p: likewise.
            repetition_penalty: likewise.
            seed: whole number from 0 to 2**32 - 1; the same for every row, or one a row.
            stop: texts at which a row ends; they are not part of its text.
            cache_dtype: of keys and values, one of `cache.CACHE_DTYPES`; the model's unless given. "int8" and "int4"
                keep them in a half and a quarter of a 16-bit float, and a little for scales.
            speculate: tokens that the text itself drafts for each forward pass to check (see `speculate.py`); 0 is off.
                Greedy choice only. The text is the same up to rounding: a product over more tokens may be summed in
                another order.
            smooth: whether text should come every 50 ms rather than 64 tokens at a time.
            least_slots: of the cache, more of which are made where the request needs them: requests with as many share
                their programs.
        """
        each, self.single = as_prompts(prompts)
        self.model, self._tokenizer, self._smooth = model, tokenizer, smooth
        self._prompts = encode_prompts(tokenizer, each, model.config)
        self._limit = new_token_limit(self._prompts, max_new_tokens, model.config)
        with auto_mesh():
            self._sampler = make_sampler(
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
            )
            self._key_B = row_keys(seed, len(self._prompts))
            self._stop_M = jax.device_put(np.asarray(tokenizer.stop_ids if tokenizer else (), np.int32))
        check_knobs(self._sampler, len(self._prompts))
        self._drafts = check_speculate(speculate, self._sampler)
        self._program = compiled_lookup if self._drafts else compiled_decode
        self._cache_dtype = check_cache_dtype(model.dtype if cache_dtype is None else cache_dtype)
        stops = stop_strings(stop, tokenizer)
        self._rows = [Row(prompt, tokenizer, stops) for prompt in self._prompts]
        self._length = max(len(prompt) for prompt in self._prompts) - 1  # to prefill
        self._least_slots = least_slots
        self._compiled_before: tuple[int, int, float] | None = None
        self.speed = Speed()

    @property
    def completions(self) -> list[Completion]:
        """Results so far, in the order of the prompts."""
        return [row.completion() for row in self._rows]

    @auto_mesh()
    def compile(self) -> None:
        """Makes the programs of this request ready; without, each is when it is first used."""
        self._count_compilations()
        cache = jax.eval_shape(self._empty_cache)
        for chunk in sorted(set(plan_chunks(self._length))):
            compiled_prefill.compile(self.model, *_chunk(self._prompts, 0, chunk), cache)
        self._program.compile(self.model, *self._arguments(self._first_state(cache), 1))

    def compile_while(self, read: Callable[[], Llama]) -> None:
        """`compile` while `read`, in a thread of its own, makes the model that then runs."""
        with workers(1) as reader:
            reading = reader.submit(read)
            self.compile()
            self.model = reading.result()

    def __iter__(self) -> Iterator[Any]:
        """Runs the request; each item is the text that has become certain: a string, or a list of one a row.

        Raises:
            LlamaJaxError: where logits are not finite, behind the text before them.
        """
        self._count_compilations()
        state = self._start()
        block = 1 if self._smooth else DECODE_BLOCK
        while not all(row.finish_reason for row in self._rows):
            start = time.perf_counter()
            before = self._program.compile_seconds
            state, tokens, log_probabilities, made_B, step_B = self._decode(state, block)
            seconds = time.perf_counter() - start - (self._program.compile_seconds - before)
            pieces = [
                row.take(tokens[i, :made], log_probabilities[i, :made], len(row.tokens) + made == self._limit)
                for i, (row, made) in enumerate(zip(self._rows, made_B, strict=True))
            ]
            self._account(step_B, seconds, sum(count for _, count in pieces))
            if self._smooth:
                block = int(np.clip(_UPDATE_SECONDS * step_B.max() / max(seconds, 1e-9), 1, DECODE_BLOCK))
            yield pieces[0][0] if self.single else [text for text, _ in pieces]
            self._check_finite()

    def _check_finite(self) -> None:
        """Refuses to go on where a row's logits are not finite: every token behind them would be the same."""
        for number, row in enumerate(self._rows, 1):
            if row.not_finite:
                half = "float16" in (str(self.model.dtype), self._cache_dtype)
                raise LlamaJaxError(
                    f"the logits for new token {len(row.tokens) + 1} of prompt {number} (position "
                    f"{row.prompt_tokens + len(row.tokens)}) are not finite: "
                    + (
                        "values overflow float16, or the weights hold NaN or infinity: compute in float32 or bfloat16, "
                        "or check the checkpoint"
                        if half
                        else f"the weights hold NaN or infinity, or values overflow {self.model.dtype}: check the "
                        "checkpoint"
                    )
                )

    @auto_mesh()
    def _decode(
        self, state: DecodeState | LookupState, block: int
    ) -> tuple[DecodeState | LookupState, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """One call of the decode program, of up to `block` forward passes.

        Returns:
            The state behind it; tokens and log-probabilities, [B, M]; how many of M each row made; in how many passes.
        """
        state, *made = self._program(self.model, *self._arguments(state, block))
        if isinstance(state, LookupState):
            tokens, log_probabilities, made_B, step_B = (np.asarray(array) for array in made)
            return state, tokens, log_probabilities, made_B, step_B
        token_BM, log_probability_BM, steps = made
        step_B = np.full(len(self._rows), int(steps))
        return state, np.asarray(token_BM), np.asarray(log_probability_BM), step_B, step_B

    def _arguments(self, state: DecodeState | LookupState, block: int) -> tuple[Any, ...]:
        """What the decode program takes behind the model, for up to `block` forward passes."""
        left_B = np.asarray([0 if row.finish_reason else self._limit - len(row.tokens) for row in self._rows], np.int32)
        if isinstance(state, LookupState):
            state = dataclasses.replace(state, left_B=jax.device_put(left_B))
            return state, self._stop_M, jax.device_put(np.int32(block))
        state = dataclasses.replace(state, done_B=jax.device_put(left_B == 0))
        return state, self._sampler, self._stop_M, jax.device_put(np.int32(min(block, left_B.max())))

    def _empty_cache(self) -> KVCache:
        """The cache of this request."""
        needed = self._length + self._limit + slots_beyond(self._drafts)
        room = max(sum(plan_chunks(self._length)), needed, self._least_slots)
        return empty_cache(self.model.config, len(self._prompts), _round_up(room, SLOT_MULTIPLE), self._cache_dtype)

    @auto_mesh()
    def _start(self) -> DecodeState | LookupState:
        """Prefills all but the last token of each prompt."""
        # Leaves may be NumPy arrays: moved once, not at every call. Those on a device stay where they are.
        self.model = model = with_auto_axes(jax.device_put(self.model))
        cache = self._empty_cache()
        self.speed.step_bytes = step_bytes(model) + sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        chunks = plan_chunks(self._length)
        start, before, first = time.perf_counter(), compiled_prefill.compile_seconds, 0
        for chunk in chunks:
            tokens_BT, count_B = _chunk(self._prompts, first, chunk)
            cache = compiled_prefill(model, tokens_BT, count_B, cache)
            first += chunk
        jax.block_until_ready(cache)
        self.speed.prefill_tokens = sum(len(prompt) - 1 for prompt in self._prompts)
        self.speed.prefill_chunks = len(chunks)
        if chunks:
            compiling = compiled_prefill.compile_seconds - before
            self.speed.prefill_seconds = time.perf_counter() - start - compiling
        return self._first_state(cache)

    def _first_state(self, cache: KVCache) -> DecodeState | LookupState:
        """The state behind the prefill."""
        if self._drafts:
            return LookupState.start(cache, self._prompts, self._drafts)
        seen_BV = None
        if self._sampler.repetition_penalty is not None:
            seen = np.zeros((len(self._prompts), self.model.config.vocab_size), bool)
            for row, prompt in enumerate(self._prompts):
                seen[row, prompt] = True
            seen_BV = jax.device_put(seen)
        last_B = jax.device_put(np.asarray([prompt[-1] for prompt in self._prompts], np.int32))
        return DecodeState(cache, last_B, self._key_B, jax.device_put(np.zeros(len(last_B), bool)), seen_BV)

    def _count_compilations(self) -> None:
        """Remembers what had been compiled before this request, once."""
        self._compiled_before = self._compiled_before or self._compiled()

    def _compiled(self) -> tuple[int, int, float]:
        """Compilations, loads and seconds so far, of the programs that this request uses."""
        first, second = compiled_prefill, self._program
        return (
            first.compilations + second.compilations,
            first.loads + second.loads,
            first.compile_seconds + second.compile_seconds,
        )

    def _account(self, step_B: np.ndarray, seconds: float, tokens: int) -> None:
        self.speed.decode_steps += int(step_B.max())
        self.speed.row_steps += int(step_B.sum()) if self._drafts else 0
        self.speed.decode_seconds += seconds
        self.speed.decode_tokens += tokens
        before = self._compiled_before or (0, 0, 0.0)
        compilations, loads, compile_seconds = self._compiled()
        self.speed.compilations, self.speed.loads = compilations - before[0], loads - before[1]
        self.speed.compile_seconds = compile_seconds - before[2]


def _chunk(prompts: list[list[int]], first: int, size: int) -> tuple[jax.Array, jax.Array]:
    """Tokens `first` to `first + size` of all but the last token of each prompt: tokens_BT padded with 0, count_B."""
    tokens_BT = np.zeros((len(prompts), size), np.int32)
    count_B = np.zeros(len(prompts), np.int32)
    for row, prompt in enumerate(prompts):
        part = prompt[:-1][first : first + size]
        tokens_BT[row, : len(part)] = part
        count_B[row] = len(part)
    return jax.device_put(tokens_BT), jax.device_put(count_B)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
