"""Keeps rows after a request, so that the next request reuses their caches."""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llamajax.generation.compilation import Compilations
from llamajax.generation.engine import Chunk, Engine, Knobs, Options, whole_slots
from llamajax.generation.programs import EngineState
from llamajax.model import Llama


class MadeOnHost(NamedTuple):
    """The fields of `Made` as NumPy arrays."""

    token_BM: np.ndarray
    log_probability_BM: np.ndarray
    count_B: np.ndarray
    pass_B: np.ndarray


class Kept:
    """An engine, the state of its rows, and the ids that their caches hold, for later requests.

        kept = Kept()
        first = TextStream(model, tokenizer, "Once upon a time", kept=kept)
        ...
        second = TextStream(model, tokenizer, longer_text, kept=kept)

    The second request prefills only the tokens that its prompt does not share with the cache. Nothing is kept if the
    model, the number of rows, the cache's dtype or the drafts change, or if the request's slots select another RoPE.
    Only one request at a time may use a `Kept`.

    Attributes:
        engine: the engine of the last request; None before the first.
    """

    def __init__(self) -> None:
        """Holds nothing."""
        self.engine: Engine | None = None
        self._texts: list[list[int]] = []  # the ids of each row, the newest included
        self._lengths: list[int] = []  # how many of these ids each row's cache holds
        self._state: EngineState | None = None
        self._given: weakref.ref[Any] | None = None  # the caller's model, from which the engine's model was made

    @property
    def held(self) -> list[list[int]]:
        """The ids in the cache of each row."""
        return [text[:length] for text, length in zip(self._texts, self._lengths, strict=True)]

    def slots(self, model: Llama, rows: int, slots: int, options: Options) -> int:
        """The number of slots of the engine for a request that needs at least `slots`; arguments as in `fit`."""
        engine = self.engine
        if engine is None or not self._suits(engine, model, rows, options):
            return slots
        most = model.config.context_length + engine.drafts
        # The slots at least double, for few sizes: each size needs its own programs.
        found = engine.slots if slots <= engine.slots else max(slots, min(2 * engine.slots, most))
        return found if _same_rope(model, found, slots) else slots

    def fit(self, model: Llama, rows: int, slots: int, options: Options, counted: Compilations) -> Engine:
        """Returns the engine for a request: the kept one, the kept one with more slots, or a new one.

        Args:
            model: the caller's model. The kept engine suits if it was made from this model, or if it is its own.
            rows: B, the number of rows.
            slots: the fewest slots that the request needs.
            options: cache_dtype, drafts and stops of `Engine`.
            counted: the counts to which later compilations are added.
        """
        slots = self.slots(model, rows, slots, options)
        engine = self.engine if self.engine is not None and self._suits(self.engine, model, rows, options) else None
        if engine is None or self._state is None or not _same_rope(model, engine.slots, slots):
            given = weakref.ref(model) if engine is None else self._given
            self.clear()
            engine = Engine(model if engine is None else engine.model, rows, slots, **options, counted=counted)
            self._given, self._state = given, engine.empty()
            self._texts, self._lengths = [[] for _ in range(rows)], [0] * rows
        engine.counted = counted
        if engine.slots < slots:
            engine, self._state = engine.grow(self._state, slots)
        self.engine = engine
        return engine

    def clear(self) -> None:
        """Discards the engine and its rows."""
        self.engine = self._state = self._given = None
        self._texts, self._lengths = [], []

    def _suits(self, engine: Engine, model: Llama, rows: int, options: Options) -> bool:
        known = model is engine.model or (self._given is not None and model is self._given())
        ours = {name: getattr(engine, name) for name in options}
        return known and engine.rows == rows and ours == options

    # ---- The engine's calls: each takes the state and stores the new one ---------------------------------------------

    def shared(self, row: int, text: Sequence[int]) -> int:
        """The number of a text's tokens, without its last, that a row's cache already holds."""
        if not self._texts:
            return 0
        held = self._texts[row]
        most = min(self._lengths[row], len(text) - 1)
        return next((i for i in range(most) if held[i] != text[i]), most)

    def plan(self, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> list[Chunk]:
        """`Engine.plan`, which keeps the tokens that the texts share with the caches of their rows."""
        keep = [self.shared(*each) for each in zip(rows, texts, strict=True)]
        return self._engine.plan(self._held_state, rows, texts, keep)

    def extend(self, rows: Sequence[int], chunk: Chunk) -> None:
        """`Engine.extend` on the kept rows."""
        self._state = self._engine.extend(self._take(), rows, chunk)
        for i, row in enumerate(rows):
            self._texts[row] = [*self._texts[row][: chunk.held_b[i]], *chunk.tokens_bT[i, : chunk.count_b[i]].tolist()]
            self._lengths[row] = len(self._texts[row])

    def start(self, rows: Sequence[int], texts: Sequence[Sequence[int]], knobs: Sequence[Knobs]) -> None:
        """`Engine.start` on the kept rows."""
        self._state = self._engine.start(self._take(), rows, texts, knobs)
        for row, text in zip(rows, texts, strict=True):
            self._texts[row], self._lengths[row] = list(text), len(text) - 1

    def copy(self, row: int, to: Sequence[int], knobs: Sequence[Knobs]) -> None:
        """`Engine.copy` on the kept rows."""
        self._state = self._engine.copy(self._take(), row, to, knobs)
        for other in to:
            self._texts[other], self._lengths[other] = list(self._texts[row]), self._lengths[row]

    def step(self, limit: int) -> MadeOnHost:
        """`Engine.step` on the kept rows."""
        state, made = self._engine.step(self._take(), limit)
        token_BM, log_probability_BM, count_B, pass_B = (
            np.asarray(array) for array in (made.token_BM, made.log_probability_BM, made.count_B, made.pass_B)
        )
        self._state = state
        for row, (tokens, count) in enumerate(zip(token_BM, count_B, strict=True)):
            self._texts[row] += tokens[:count].tolist()
            self._lengths[row] += int(count)
        return MadeOnHost(token_BM, log_probability_BM, count_B, pass_B)

    def free(self, rows: Sequence[int]) -> None:
        """`Engine.free` on the kept rows."""
        self._state = self._engine.free(self._take(), rows)

    def wait(self) -> None:
        """Waits until the device has finished."""
        jax.block_until_ready(self._held_state)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(array.nbytes for array in jax.tree.leaves(self._held_state.cache))

    @property
    def _engine(self) -> Engine:
        assert self.engine is not None, "fit comes first"
        return self.engine

    @property
    def _held_state(self) -> EngineState:
        assert self._state is not None, "fit comes first"
        return self._state

    def _take(self) -> EngineState:
        """Returns the state and forgets it: an interrupted call must not leave a state whose memory it has reused."""
        state, self._state = self._held_state, None
        return state


def _same_rope(model: Llama, slots: int, other: int) -> bool:
    """Whether engines of `slots` and of `other` slots use the same RoPE, so that cached keys are valid in both."""
    choice = model.config.rope_choice
    return choice(whole_slots(slots)) == choice(whole_slots(other))
