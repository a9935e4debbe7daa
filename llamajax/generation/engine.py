"""The engine of generation: rows are inserted, generate tokens and are freed, independently of each other.

    engine = Engine(model, rows=8, slots=1024)
    state = engine.empty()
    state = engine.insert(state, 3, ids, Knobs(max_new_tokens=100, temperature=0.8, seed=1))
    state, made = engine.step(state)
    ids += np.asarray(made.token_BM[3, : made.count_B[3]]).tolist()
    state = engine.free(state, 3)

It works on ids, not text. Each call reuses the memory of its argument state: afterwards, only the returned state is
valid.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from llamajax.caches import KVCache, check_cache_dtype, empty_cache
from llamajax.errors import LlamaJaxError
from llamajax.generation import programs
from llamajax.generation.compilation import Compilations, CompiledFunction
from llamajax.generation.programs import DECODE_BLOCK, Asked, EngineState, Made, plan_chunks
from llamajax.generation.request import row_keys, row_seeds
from llamajax.generation.sampling import NEUTRAL, Sampler, make_sampler
from llamajax.generation.speculate import check_speculate
from llamajax.meshes import auto_mesh, with_auto_axes
from llamajax.model import Llama

# The number of slots is a multiple of this, so that requests of similar length share their programs.
SLOT_MULTIPLE = 256
# The most stop ids of a row, unless an engine is made for more.
STOPS = 8

compiled_extend = CompiledFunction(programs.extend, donate_argnames=("cache",))
compiled_start = CompiledFunction(programs.start, donate_argnames=("state",))
compiled_copy = CompiledFunction(programs.copy, donate_argnames=("state",))
compiled_step = CompiledFunction(programs.step, donate_argnames=("state",))
compiled_free = CompiledFunction(programs.free, donate_argnames=("state",))
compiled_grow = CompiledFunction(programs.grow, donate_argnames=("larger",))


@dataclasses.dataclass(frozen=True)
class Knobs:
    """The settings of one row.

    Attributes:
        max_new_tokens: the most tokens to generate.
        temperature: 0 is greedy. For this and the following knobs see `sampling.Sampler`; None turns a knob off.
        top_k: likewise.
        top_p: likewise.
        min_p: likewise.
        repetition_penalty: likewise.
        seed: a whole number from 0 to 2**32 - 1.
        sample: the number of this sample among several with the same seed; 0 gives the result of the seed alone.
        stop_ids: the row ends after any of these ids.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    sample: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens that one forward pass puts into the cache; for the arrays see `programs.extend`."""

    tokens_bT: np.ndarray
    count_b: np.ndarray
    held_b: np.ndarray


class Options(TypedDict):
    """Options of an engine besides its model, rows and slots; they are attributes of `Engine`."""

    cache_dtype: str
    drafts: int
    stops: int


class Engine:
    """Compiles the programs that rows need, and checks requests.

    Attributes:
        rows: B, the number of rows.
        slots: S, the most tokens that a row's cache holds.
        cache_dtype: the name of one of `caches.CACHE_DTYPES`.
        drafts: k, the number of tokens drafted from the text itself for each forward pass (`speculate.py`); 0 is none.
        stops: the most stop ids of a row.
        counted: the counts of compilations.
    """

    def __init__(
        self,
        model: Llama,
        rows: int,
        slots: int,
        *,
        cache_dtype: jax.typing.DTypeLike | None = None,
        drafts: int = 0,
        stops: int = STOPS,
        counted: Compilations | None = None,
    ):
        """Stores the settings; does not move the model to the device yet, and compiles nothing.

        Args:
            model: the model; if only `compile` is called, its leaves may be abstract (`jax.ShapeDtypeStruct`).
            rows: see the attributes.
            slots: see the attributes; rounded up to a multiple of `SLOT_MULTIPLE`. A row of P tokens that generates at
                most n more needs P + n - 1 + `drafts` slots.
            cache_dtype: see the attributes; defaults to the model's dtype.
            drafts: see the attributes.
            stops: see the attributes.
            counted: the object in which compilations are counted; defaults to a new one.
        """
        self._given = model
        self.rows, self.slots = rows, whole_slots(slots)
        self.cache_dtype = check_cache_dtype(model.dtype if cache_dtype is None else cache_dtype)
        self.drafts, self.stops = check_speculate(drafts), stops
        self.counted = Compilations() if counted is None else counted

    @functools.cached_property
    @auto_mesh()
    def model(self) -> Llama:
        """The model on the device. NumPy leaves are moved once, not at every call; other leaves stay where they are."""
        self._given = with_auto_axes(jax.device_put(self._given))
        return self._given

    @auto_mesh()
    def empty(self) -> EngineState:
        """A state whose rows are all free."""
        return self._state(self._cache(), [()] * self.rows, [Knobs(0)] * self.rows)

    @auto_mesh()
    def compile(self, length: int, rows: Sequence[int] | None = None, copies: int = 0) -> None:
        """Compiles or loads programs.

        Args:
            length: the length of the longest text to insert.
            rows: the rows that are inserted together; defaults to all rows.
            copies: the number of target rows in a call of `copy`; 0 if `copy` is not called.
        """
        every = list(range(self.rows))
        rows = every if rows is None else rows
        state = self._shapes()
        ready = functools.partial(CompiledFunction.compile, counted=self.counted)
        for size in sorted(set(plan_chunks(length - 1))):
            chunk = _chunk([[0] * length] * len(rows), [0] * len(rows), size)
            ready(compiled_extend, self._given, state.cache, *_on_device(chunk), *self._places(rows))
        if list(rows) != every:
            ready(
                compiled_start, state, _ids(rows), *self._history([()] * len(rows)), self._asked([Knobs(0)] * len(rows))
            )
        if copies:
            ready(compiled_copy, state, _scalar(0), _ids(every[:copies]), self._asked([Knobs(0)] * copies))
        ready(compiled_step, self._given, state, _scalar(1))

    def insert(
        self,
        state: EngineState,
        row: int | Sequence[int],
        tokens: Sequence[int] | Sequence[Sequence[int]],
        knobs: Knobs | Sequence[Knobs],
        *,
        keep: int | Sequence[int] = 0,
    ) -> EngineState:
        """Inserts a text into a row, or one text into each of several rows, which then continue it.

        Args:
            state: the state of all rows.
            row: one row or several distinct ones; their content is discarded.
            tokens: the ids of the whole text; for several rows, one list for each row.
            knobs: the settings of the row; for several rows, one value for all or one for each.
            keep: how many of the first `tokens` the row's cache already holds; some of them may be computed again. For
                several rows, one value for all or one for each.

        Raises:
            LlamaJaxError: for a row that does not exist, a text that does not fit, or knobs out of range.
        """
        rows, texts, asked, keeps = _each(row, tokens, knobs, keep)
        for chunk in self.plan(state, rows, texts, keeps):
            state = self.extend(state, rows, chunk)
        return self.start(state, rows, texts, asked)

    def plan(
        self, state: EngineState, rows: Sequence[int], texts: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> list[Chunk]:
        """Returns the chunks that `insert` passes to `extend`; arguments and errors are those of `insert`."""
        self._check_rows(rows)
        for row, text in zip(rows, texts, strict=True):
            if not 1 <= len(text) <= self.slots + 1:
                raise LlamaJaxError(
                    f"{len(text)} tokens for row {row}: expected at least 1, and at most 1 more than its {self.slots} "
                    "slots"
                )
        keeps = self._keeps(state, rows, texts, keep)
        longest = max(len(text) - 1 - kept for text, kept in zip(texts, keeps, strict=True))
        chunks = []
        for size in plan_chunks(longest):
            chunk = _chunk(texts, keeps, size)
            chunks.append(chunk)
            keeps = (chunk.held_b + chunk.count_b).tolist()
        return chunks

    @auto_mesh()
    def extend(self, state: EngineState, rows: Sequence[int], chunk: Chunk) -> EngineState:
        """Puts a chunk of `plan` into its rows."""
        cache = self._run(compiled_extend, self.model, state.cache, *_on_device(chunk), *self._places(rows))
        return dataclasses.replace(state, cache=cache)

    @auto_mesh()
    def start(
        self, state: EngineState, rows: Sequence[int], texts: Sequence[Sequence[int]], knobs: Sequence[Knobs]
    ) -> EngineState:
        """Starts rows whose caches hold all but the last token of their texts.

        Raises:
            LlamaJaxError: if a row has too few slots for its text and `max_new_tokens`.
        """
        for row, text, asked in zip(rows, texts, knobs, strict=True):
            needed = len(text) + asked.max_new_tokens - 1 + self.drafts
            if asked.max_new_tokens < 0 or needed > self.slots:
                raise LlamaJaxError(
                    f"max_new_tokens is {asked.max_new_tokens} in row {row}: expected from 0 to "
                    f"{self.slots - len(text) + 1 - self.drafts}, the room in its {self.slots} slots after {len(text)} "
                    "tokens: ask for fewer, or make the engine with more slots"
                )
        if self._is_all(rows):
            return self._state(state.cache, texts, knobs)
        history_bS, length_b = self._history(texts)
        return self._run(compiled_start, state, _ids(rows), history_bS, length_b, self._asked(knobs))

    @auto_mesh()
    def copy(
        self, state: EngineState, row: int, to: int | Sequence[int], knobs: Knobs | Sequence[Knobs]
    ) -> EngineState:
        """Copies a row into one or several other rows, which continue its text with their own settings.

        Raises:
            LlamaJaxError: for a row that does not exist, or knobs out of range.
        """
        rows = [to] if isinstance(to, int) else list(to)
        self._check_rows([row, *rows])
        asked = [knobs] * len(rows) if isinstance(knobs, Knobs) else knobs
        return self._run(compiled_copy, state, _scalar(row), _ids(rows), self._asked(asked))

    @auto_mesh()
    def step(self, state: EngineState, limit: int = DECODE_BLOCK) -> tuple[EngineState, Made]:
        """Generates tokens in every running row, in up to `limit` forward passes; see `programs.step`."""
        return self._run(compiled_step, self.model, state, _scalar(limit))

    @auto_mesh()
    def free(self, state: EngineState, row: int | Sequence[int]) -> EngineState:
        """Ends one row or several; a freed row generates nothing until a text is inserted into it.

        A row whose logits were not finite must be freed; otherwise its NaN may reach the next text inserted there.
        """
        rows = [row] if isinstance(row, int) else list(row)
        self._check_rows(rows)
        return self._run(compiled_free, state, _ids(rows))

    @auto_mesh()
    def grow(self, state: EngineState, slots: int) -> tuple["Engine", EngineState]:
        """Returns an engine with more slots, and its state with the same rows; the given state stays valid, too.

        Raises:
            LlamaJaxError: if the RoPE of this model depends on the number of slots and would change.
        """
        config = self._given.config
        if config.rope_choice(self.slots) != config.rope_choice(whole_slots(slots)):
            raise LlamaJaxError(
                f"{self.slots} slots cannot grow to {whole_slots(slots)}: the number of slots determines this model's "
                "RoPE, and the cached keys would be wrong: make an engine of that size, and insert the texts again"
            )
        larger = Engine(
            self.model,
            self.rows,
            max(slots, self.slots),
            cache_dtype=self.cache_dtype,
            drafts=self.drafts,
            stops=self.stops,
            counted=self.counted,
        )
        return larger, self._run(compiled_grow, state, larger.empty())

    def _run(self, program: CompiledFunction, *args: Any) -> Any:
        return program(*args, counted=self.counted)

    def _places(self, rows: Sequence[int]) -> tuple[jax.Array, ...]:
        """The last argument of `extend`: row indices, or no argument if `rows` are all rows."""
        return () if self._is_all(rows) else (_ids(rows),)

    def _cache(self) -> KVCache:
        return empty_cache(self._given.config, self.rows, self.slots, self.cache_dtype)

    def _state(self, cache: KVCache, texts: Sequence[Sequence[int]], knobs: Sequence[Knobs]) -> EngineState:
        """A state in which every row has its text and its knobs."""
        history_BS, length_B = self._history(texts)
        cache = dataclasses.replace(cache, length_B=length_B)
        return EngineState(cache, history_BS, self._asked(knobs), self.drafts)

    def _shapes(self) -> EngineState:
        """The shapes of the state, for compiling: nothing is computed or moved to the device."""
        shape: Any = lambda dtype, *more: jax.ShapeDtypeStruct((self.rows, *more), dtype)  # noqa: E731
        asked = Asked(
            shape(np.int32),
            shape(jax.eval_shape(lambda: jax.random.key(0)).dtype),
            Sampler(**{name: shape(off.dtype) for name, off in NEUTRAL.items()}),
            shape(np.int32, self.stops),
        )
        return EngineState(jax.eval_shape(self._cache), shape(np.int32, self._columns), asked, self.drafts)

    @property
    def _columns(self) -> int:
        """The number of columns of the history."""
        return self.slots + self.drafts + 2

    def _history(self, texts: Sequence[Sequence[int]]) -> tuple[jax.Array, jax.Array]:
        """The ids of each text at their positions, and the position of the last id of each text."""
        history_bS = np.zeros((len(texts), self._columns), np.int32)
        for ids, text in zip(history_bS, texts, strict=True):
            ids[: len(text)] = text
        length_b = np.asarray([max(len(text) - 1, 0) for text in texts], np.int32)
        return jax.device_put(history_bS), jax.device_put(length_b)

    def _asked(self, knobs: Sequence[Knobs]) -> Asked:
        """Checks the knobs and returns them as arrays; knobs that are off get their neutral values."""
        stop_bM = np.full((len(knobs), self.stops), -1, np.int32)
        for ids, each in zip(stop_bM, knobs, strict=True):
            if len(each.stop_ids) > self.stops:
                raise LlamaJaxError(
                    f"{len(each.stop_ids)} stop ids: expected at most {self.stops}, the limit of this engine"
                )
            ids[: len(each.stop_ids)] = each.stop_ids
        seeds = row_seeds([each.seed for each in knobs], len(knobs))
        key_b = row_keys(seeds, [each.sample for each in knobs])
        left_b = jax.device_put(np.asarray([each.max_new_tokens for each in knobs], np.int32))
        return Asked(left_b, key_b, full_sampler(knobs), jax.device_put(stop_bM))

    def _keeps(
        self, state: EngineState, rows: Sequence[int], texts: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> list[int]:
        """The number of tokens that each row can keep, at most `keep`.

        The cache must be able to go back to that length, and the chunks after the kept tokens must fit into the slots.
        """
        if not any(keep):
            return [0] * len(rows)
        held = [int(length) for length in np.asarray(state.cache.length_B)[list(rows)]]
        for row, holds, kept, text in zip(rows, held, keep, texts, strict=True):
            if not 0 <= kept <= min(holds, len(text)):
                raise LlamaJaxError(f"keep is {kept} in row {row}: expected from 0 to {min(holds, len(text))} tokens")
        # `step` feeds the last token. The last drafts + 1 slots are not kept: `step` writes there in waiting rows.
        most = [min(kept, len(text) - 1, self.slots - self.drafts - 1) for kept, text in zip(keep, texts, strict=True)]
        lost_B = state.cache.fewest_B
        fewest = [0] * len(rows) if lost_B is None else np.asarray(lost_B)[list(rows)].tolist()
        for unit in (1, 64, 256):
            whole = [each // unit * unit for each in most]
            whole = [each if each >= few else 0 for each, few in zip(whole, fewest, strict=True)]
            rest = max(len(text) - 1 - each for text, each in zip(texts, whole, strict=True))
            if max(whole) + sum(plan_chunks(rest)) <= self.slots:
                return whole
        return [0] * len(rows)

    def _is_all(self, rows: Sequence[int]) -> bool:
        return list(rows) == list(range(self.rows))

    def _check_rows(self, rows: Sequence[int]) -> None:
        for row in rows:
            if not 0 <= row < self.rows:
                raise LlamaJaxError(f"row {row}: expected from 0 to {self.rows - 1}, the engine's rows")
        if len(set(rows)) != len(rows):
            raise LlamaJaxError(f"rows {list(rows)}: expected each at most once")


def whole_slots(slots: int) -> int:
    """The number of slots rounded up to a multiple of `SLOT_MULTIPLE`."""
    return -(-slots // SLOT_MULTIPLE) * SLOT_MULTIPLE


def full_sampler(knobs: Sequence[Knobs]) -> Sampler:
    """Returns a sampler with a value of every knob for every row; a knob that is None gets its neutral value.

    Raises:
        LlamaJaxError: for a value out of its range.
    """
    values: dict[str, Any] = {
        name: [off.item() if (value := getattr(each, name)) is None else value for each in knobs]
        for name, off in NEUTRAL.items()
    }
    make_sampler(**values)
    return Sampler(**jax.device_put({name: np.asarray(each, NEUTRAL[name].dtype) for name, each in values.items()}))


def _each(row: Any, tokens: Any, knobs: Any, keep: Any) -> tuple[list[int], list[list[int]], list[Knobs], list[int]]:
    """The arguments of `insert` as lists with one item for each row."""
    if isinstance(row, int):
        return [row], [list(tokens)], [knobs], [keep]
    rows = list(row)
    asked = [knobs] * len(rows) if isinstance(knobs, Knobs) else list(knobs)
    return rows, [list(text) for text in tokens], asked, [keep] * len(rows) if isinstance(keep, int) else list(keep)


def _chunk(texts: Sequence[Sequence[int]], held: Sequence[int], size: int) -> Chunk:
    """The next `size` tokens of each text after the `held` ones, without the text's last token, padded with 0."""
    tokens_bT = np.zeros((len(texts), size), np.int32)
    count_b = np.zeros(len(texts), np.int32)
    for row, (text, first) in enumerate(zip(texts, held, strict=True)):
        part = text[first : min(first + size, len(text) - 1)]
        tokens_bT[row, : len(part)] = part
        count_b[row] = len(part)
    return Chunk(tokens_bT, count_b, np.asarray(held, np.int32))


def _on_device(chunk: Chunk) -> tuple[jax.Array, ...]:
    return jax.device_put(chunk.tokens_bT), jax.device_put(chunk.count_b), jax.device_put(chunk.held_b)


def _ids(rows: Sequence[int]) -> jax.Array:
    return jax.device_put(np.asarray(rows, np.int32))


def _scalar(number: int) -> jax.Array:
    return jax.device_put(np.int32(number))
