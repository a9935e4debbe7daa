"""The cache of keys and values: an explicit pytree, passed in and returned, never hidden state.

    cache = KVCache.empty(config, batch=2, slots=512)
    logits_BTV, cache = model(tokens_BT, cache)

A cache implements attention. `begin` computes the slots of new tokens and which rows are full, `attend` writes those of
a layer and computes attention, `end` counts the new tokens. All layers share `length_B`. The layers at each position of
a stack's pattern have a part, whose kind `Kind.cache` names in `PARTS`. Rows of different lengths share a batch, and
the lengths suffice for masking: a query at position p sees positions up to p.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from llamajax.caches.attention import PLAIN, Scores, attend_causal
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.parameters import KINDS, path_name

CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8", "int4", "int3")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Where:
    """The positions of the tokens of one call.

    Attributes:
        position_BT: int32; B may be 1 where all rows are alike.
        count_B: int32, how many of the T tokens are real; None for all.
        fits_B: bool, rows that have room for T tokens; None where there is no limit.
        reach: the number of positions of the request, if known; some RoPEs depend on it.
    """

    position_BT: jax.Array
    count_B: jax.Array | None = None
    fits_B: jax.Array | None = None
    reach: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def start_B(self) -> jax.Array:
        """The position of each row's first token."""
        return self.position_BT[:, 0]

    def checked(self, x_BTD: jax.Array) -> jax.Array:
        """The computed values, with NaN in rows that did not fit and overwrote older tokens."""
        return x_BTD if self.fits_B is None else jnp.where(self.fits_B[:, None, None], x_BTD, jnp.nan)


class Part:
    """Keys and values of some layers, a pytree of arrays [L, B, …]; each kind of cache defines one.

    `slots` is the largest number of tokens that a row can hold, or None if new tokens replace old ones (a ring). A ring
    has `spare` slots beyond the earlier positions that a query sees: one step may write up to `spare` tokens, and a row
    may be shortened by as many.
    """

    slots: int | None
    spare: int = 0

    @property
    def stored(self) -> "Part":
        """The part that holds the arrays: this one, or one that it uses."""
        return self

    def storing(self, part: Any) -> "Part":
        """Returns this part with another `stored`."""
        return part

    def fewest(self, where: Where) -> jax.Array:
        """Returns the fewest tokens that each row can be shortened to after the tokens of this call; int32 [B]."""
        if self.slots is not None:
            return jnp.zeros_like(where.start_B)
        return where.start_B + where.position_BT.shape[1] - self.spare

    def attend(
        self,
        layer: jax.Array | int,
        query_BTNH: jax.Array,
        key_BTKH: jax.Array,
        value_BTKH: jax.Array,
        where: Where,
        scores: Scores,
    ) -> tuple[jax.Array, Self]:
        """Does what `KVCache.attend` does; `layer` is the place of the layer within this part."""
        raise NotImplementedError

    def grow(self, larger: "Part") -> "Part":
        """Does what `KVCache.grow` does, for parts that keep the slots of a row in order, in any arrangement.

        A ring that replaces a smaller part has at least as many slots, so each token keeps its slot.
        """
        corner = lambda whole, new: jax.lax.dynamic_update_slice(whole, new, (0,) * new.ndim)  # noqa: E731
        return larger.storing(jax.tree.map(corner, larger.stored, self.stored))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NoCache:
    """Stores nothing: for a whole sequence that is not continued, as in training; differentiable."""

    slots = None

    def begin(self, T: int, count_B: jax.Array | None = None) -> Where:
        """Does what `KVCache.begin` does; every row starts at 0."""
        return Where(jnp.arange(T, dtype=jnp.int32)[None], count_B, reach=T)

    def attend(
        self,
        part: int,
        layer: jax.Array | int,
        query_BTNH: jax.Array,
        key_BTKH: jax.Array,
        value_BTKH: jax.Array,
        where: Where,
        scores: Scores = PLAIN,
    ) -> tuple[jax.Array, "NoCache"]:
        """Does what `KVCache.attend` does, over the tokens of the call alone."""
        key_BKTH, value_BKTH = jnp.swapaxes(key_BTKH, 1, 2), jnp.swapaxes(value_BTKH, 1, 2)
        return attend_causal(query_BTNH, key_BKTH, value_BKTH, where.position_BT, scores), self

    def end(self, where: Where) -> "NoCache":
        """Returns the cache unchanged."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far.

    Attributes:
        parts: one for each position of each stack's pattern, in their order.
        length_B: int32, tokens held by each row; more than `slots` for a row that overflowed. Slots from there on are
            read with weight zero, so their content must be finite.
        fewest_B: int32, the fewest tokens that each row can be shortened to (or to 0), as rings have overwritten older
            ones; None if no part overwrites any.
        reach: the number of positions of rows: the requested slots, which are known even if all parts are rings.
    """

    parts: tuple[Any, ...]
    length_B: jax.Array
    fewest_B: jax.Array | None = None
    reach: int | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def empty(
        cls,
        config: Config,
        batch: int,
        slots: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        layout: str = "dense",
        reach: int | None = None,
    ) -> "KVCache":
        """Makes an empty cache for `batch` rows of up to `slots` tokens.

        Args:
            config: the model's architecture.
            batch: B.
            slots: S. Layers that see only a part of the text take slots for that part and `ring.AHEAD` tokens.
            dtype: one of `CACHE_DTYPES`. A float cache takes 2 L B K S H elements; "int8" takes 2 L B K S (H + 5),
                "int4" 2 L B K S (H/2 + 5) and "int3" 2 L B K S (3H/8 + 4) bytes. Their keys and values are stored
                rotated (`llamajax.caches.rotated`). Errors of 8 and 4 bits are at most scale / 2, where scale is the
                range of the H rotated values of a head and token, widened to include 0, divided by 255 or 15.
            layout: the form of its programs: "dense"; "straight", without loops; "scatter", which writes all rows at
                once; "tiled", the fastest for CPUs (`llamajax.caches.tiled`).
            reach: the cache's reach if S is symbolic; it determines which layers have rings.

        Raises:
            LlamaJaxError: for an unsupported dtype.
            ValueError: for an unknown layout, or one that does not support these slots or this dtype.
        """
        name = check_cache_dtype(dtype)
        reach = slots if reach is None else reach

        def made(kind: str, layers: int) -> Any:
            part = PARTS[kind](config, layers, batch, reach, name, layout)
            if part.slots is None or isinstance(slots, int):  # a ring is the same for any slots
                return part
            return PARTS[kind](config, layers, batch, slots, name, layout)

        parts = [
            made(KINDS[kind].cache, len(stack.layers(position)))
            for stack in config.stacks
            for position, kind in enumerate(stack.pattern)
        ]
        length_B = jnp.zeros(batch, jnp.int32)
        loses, all_do = (some(part.slots is None for part in parts) for some in (any, all))
        # A program for any S selects its RoPE by S, as long as some part's arrays have S slots.
        return cls(tuple(parts), length_B, jnp.zeros_like(length_B) if loses else None, reach if all_do else slots)

    @property
    def slots(self) -> int | None:
        """S, the most tokens that a row can hold; None without a limit."""
        bounds = [part.slots for part in self.parts if part.slots is not None]
        return min(bounds, default=None)

    @property
    def spare(self) -> int | None:
        """The number of tokens by which rows can always be shortened from their longest; None without a limit."""
        return min((part.spare for part in self.parts if part.slots is None), default=None)

    def bytes_of(self, tokens: int) -> int:
        """Returns the bytes read for a number of tokens of each row; a ring reads at most its slots."""
        total = 0
        for part in self.parts:
            stored = part.stored
            size = sum(array.nbytes for array in jax.tree.leaves(stored))
            total += size if stored.slots is None else size * min(tokens, stored.slots) // stored.slots
        return total

    def begin(self, T: int, count_B: jax.Array | None = None) -> Where:
        """Returns the positions of T new tokens of each row, which begin at `length_B`.

        Args:
            T: tokens of each row, including padding.
            count_B: the number of real tokens of each row; T by default.

        Raises:
            ValueError: if T exceeds the slots.
        """
        position_BT = self.length_B[:, None] + jnp.arange(T, dtype=jnp.int32)
        if self.slots is None:
            return Where(position_BT, count_B, reach=self.reach)
        if T > self.slots:
            raise ValueError(f"{T} tokens do not fit a cache of {self.slots} slots: make the cache larger")
        return Where(position_BT, count_B, self.length_B + T <= self.slots, self.reach)

    def attend(
        self,
        part: int,
        layer: jax.Array | int,
        query_BTNH: jax.Array,
        key_BTKH: jax.Array,
        value_BTKH: jax.Array,
        where: Where,
        scores: Scores = PLAIN,
    ) -> tuple[jax.Array, "KVCache"]:
        """Writes the keys and values of a layer, and computes attention for its queries.

        Args:
            part: number of the part.
            layer: place of the layer within the part, which may be known at run time only.
            query_BTNH: queries, scaled, after RoPE.
            key_BTKH: keys after RoPE.
            value_BTKH: values.
            where: the result of `begin`.
            scores: the family's settings.

        Returns:
            mixed_BTNH in the queries' dtype, and the cache with the tokens in this layer; `end` counts them.
        """
        mixed_BTNH, new = self.parts[part].attend(layer, query_BTNH, key_BTKH, value_BTKH, where, scores)
        return mixed_BTNH, dataclasses.replace(self, parts=(*self.parts[:part], new, *self.parts[part + 1 :]))

    def end(self, where: Where) -> "KVCache":
        """Counts the real tokens after all layers; a row that did not fit keeps a length above `slots`."""
        T = where.position_BT.shape[1]
        count_B = T if where.count_B is None else where.count_B
        if where.fits_B is not None and self.slots is not None:
            count_B = jnp.where(where.fits_B, count_B, self.slots + 1)
        fewest_B = self.fewest_B
        if fewest_B is not None:
            fewest_B = jnp.minimum(fewest_B, where.start_B)  # tokens behind a shorter text are new
            for part in self.parts:
                fewest_B = jnp.maximum(fewest_B, part.fewest(where))
        length_B = self.length_B + jnp.asarray(count_B, jnp.int32)
        return dataclasses.replace(self, length_B=length_B, fewest_B=fewest_B)

    def rewind(self, length_B: jax.Array, at_most: int | None = None) -> "KVCache | None":
        """Shortens rows to fewer tokens.

        Args:
            length_B: int32, new lengths, none larger than before.
            at_most: the largest number of tokens by which a row is shortened, if known.

        Returns:
            The shorter cache, or None if a part may have overwritten tokens that it would need.
        """
        if self.spare is not None and (at_most is None or at_most > self.spare):
            return None
        return dataclasses.replace(self, length_B=length_B)

    def idle(self, idle_B: jax.Array, T: int) -> "KVCache":
        """Returns the cache for a call of T tokens in which some rows, bool [B], wait without running out of slots.

        A waiting row is written too, after its tokens or in its last T slots; the caller restores its length.
        """
        if self.slots is None:
            return self
        waiting_B = jnp.minimum(self.length_B, self.slots - T)
        return dataclasses.replace(self, length_B=jnp.where(idle_B, waiting_B, self.length_B))

    def take(self, rows: jax.Array) -> "KVCache":
        """Returns a cache of the listed rows, int32 [b], in this order and with repetitions."""
        rows = jnp.asarray(rows)
        parts = jax.tree.map(lambda array: jnp.take(array, rows, axis=1), self.parts)
        return self._with(parts, lambda one_B: one_B[rows])

    def put(self, rows: jax.Array, cache: "KVCache") -> "KVCache":
        """Replaces the listed rows, int32 [b], distinct, by the rows of another cache of the same slots."""
        parts = jax.tree.map(lambda whole, new: whole.at[:, rows].set(new), self.parts, cache.parts)
        return self._with(parts, lambda one_B, new_b: one_B.at[rows].set(new_b), cache)

    def copy(self, row: jax.Array, to: jax.Array) -> "KVCache":
        """Copies one row, an int32 scalar, to other rows, int32 [b]."""

        def one(array: jax.Array) -> jax.Array:
            copied = jax.lax.dynamic_slice_in_dim(array, row, 1, axis=1)
            write = lambda i, array: jax.lax.dynamic_update_slice_in_dim(array, copied, to[i], axis=1)  # noqa: E731
            return jax.lax.fori_loop(0, to.shape[0], write, array)

        return self._with(jax.tree.map(one, self.parts), lambda one_B: one_B.at[to].set(one_B[row]))

    def finite(self) -> "KVCache":
        """Replaces NaN and infinity by 0: slots after a row's tokens are read with weight zero."""
        mend = lambda x: jnp.where(jnp.isfinite(x), x, 0) if jnp.issubdtype(x.dtype, jnp.floating) else x  # noqa: E731
        return dataclasses.replace(self, parts=jax.tree.map(mend, self.parts))

    def grow(self, larger: "KVCache") -> "KVCache":
        """Copies the rows into the arrays of a larger cache, which differs only in having more slots."""
        parts = [part.grow(other) for part, other in zip(self.parts, larger.parts, strict=True)]
        # A cache without rings has lost no tokens.
        fewest_B = larger.fewest_B if self.fewest_B is None else self.fewest_B
        return KVCache(tuple(parts), self.length_B, fewest_B, larger.reach)

    def _with(self, parts: Any, numbers: Callable[..., jax.Array], *others: "KVCache") -> "KVCache":
        """Returns a cache with other parts; `numbers` maps the lengths of this and other caches to the new lengths."""
        every = [(cache.length_B, cache.fewest_B) for cache in (self, *others)]
        return dataclasses.replace(self, parts=parts, **dict(zip(_NUMBERS, jax.tree.map(numbers, *every), strict=True)))

    @property
    def state(self) -> dict[str, jax.Array]:
        """The arrays without the lengths, by the names that a bundle's manifest gives them: key, value."""
        named = {}
        for number, part in enumerate(self.parts):
            end = f"_{number}" if len(self.parts) > 1 else ""
            for path, array in jax.tree_util.tree_flatten_with_path(part.stored)[0]:
                first, _, rest = path_name(path).partition(".")
                named[".".join(filter(None, (first.partition("_")[0] + end, rest)))] = array
        return named

    def with_state(self, arrays: Sequence[jax.Array], length_B: jax.Array) -> "KVCache":
        """Returns a cache with other arrays, in the order of `state`, and other lengths."""
        parts = jax.tree.unflatten(jax.tree.structure(self.parts), list(arrays))
        fewest_B = None if self.fewest_B is None else jnp.zeros_like(length_B)
        return dataclasses.replace(self, parts=parts, length_B=length_B, fewest_B=fewest_B)


_NUMBERS = ("length_B", "fewest_B")

# Makes a part: (config, layers, batch, slots, dtype, layout) -> Part, for each kind of cache.
PARTS: dict[str, Callable[[Config, int, int, int, str, str], Any]] = {}


def check_cache_dtype(dtype: jax.typing.DTypeLike) -> str:
    """Returns the name of a cache's dtype, one of `CACHE_DTYPES`.

    Raises:
        LlamaJaxError: for any other dtype.
    """
    try:
        # NumPy has no int3.
        name = dtype if isinstance(dtype, str) and dtype in CACHE_DTYPES else jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in CACHE_DTYPES:
        raise LlamaJaxError(f"the cache's dtype is {dtype!r}: expected one of {', '.join(CACHE_DTYPES)}")
    return name


def empty_cache(config: Config, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> KVCache:
    """Makes an empty cache that the default backend reads fastest; arguments and errors as in `KVCache.empty`.

    On a CPU the cache is tiled, except for bfloat16, where XLA converts a whole array to update a slice. On a GPU all
    rows are written at once: a loop over them takes two launches for each row and layer, 13 us on an H200.
    """
    backend = jax.default_backend()
    tiled = backend == "cpu" and check_cache_dtype(dtype) in ("float32", "float16") and slots % STEP_SLOTS == 0
    layout = "tiled" if tiled else "scatter" if backend == "gpu" else "dense"
    return KVCache.empty(config, batch, slots, dtype, layout=layout)


# The number of slots whose values one step of a tiled cache adds; its slots are a multiple of it.
STEP_SLOTS = 64
