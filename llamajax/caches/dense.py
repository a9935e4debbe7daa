"""KV cache of a float type, without codes: it works on every backend and in every exported program.

Slot `s` of a row holds the key and value of that row's token at position `s`. K and V stay separate arrays, and are
written with `dynamic_update_slice` rather than a scatter: under donation XLA then updates them in place, and other
runtimes do not copy the whole cache at every step.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from llamajax.caches.attention import Scores, attend, attend_blocks, by_blocks
from llamajax.caches.cache import Part, Where
from llamajax.config import Config
from quant import start_indices

Writes = Literal["dense", "straight", "scatter"]
# A ring is written token by token for up to this many tokens, as in a step with drafts.
FEW = 8


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key_LBKSH", "value_LBKSH"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class DensePart(Part):
    """Keys and values of some layers.

    Attributes:
        key_LBKSH: keys after RoPE, in the cache's dtype. Head before slot, so that one head's keys are contiguous.
        value_LBKSH: values, likewise.
        layout: "dense": programs loop over rows, and over blocks of slots; "straight": they have no loops, which some
            runtimes do not take; "scatter": all rows are written by one operation.
    """

    key_LBKSH: jax.Array
    value_LBKSH: jax.Array
    layout: Writes = "dense"

    @classmethod
    def empty(cls, config: Config, layers: int, batch: int, slots: int, dtype: str, layout: Writes) -> Self:
        """Makes a part of zeros."""
        shape = (layers, batch, config.num_kv_heads, slots, config.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), layout)

    @property
    def slots(self) -> int:  # type: ignore[override]
        """S."""
        return self.key_LBKSH.shape[3]

    def attend(
        self,
        layer: jax.Array | int,
        query_BTNH: jax.Array,
        key_BTKH: jax.Array,
        value_BTKH: jax.Array,
        where: Where,
        scores: Scores,
    ) -> tuple[jax.Array, Self]:
        """Does what `Part.attend` does."""
        part = self.write(layer, key_BTKH, value_BTKH, where.start_B)
        return part.mix(layer, query_BTNH, where.position_BT, scores), part

    def encode(self, x_BTKH: jax.Array) -> Any:
        """Converts keys or values to their stored form, with the same axes."""
        return x_BTKH.astype(self.key_LBKSH.dtype)

    def decode(self, stored: Any) -> jax.Array:
        """Converts stored keys or values back, for reading: the inverse of `encode`."""
        return stored

    def write(self, layer: Any, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array) -> Self:
        """Writes T tokens of one layer from each row's slot `start_B` on; `start_B + T` must not exceed the slots.

        Slots past the tokens that `KVCache.end` then counts are overwritten by the next write.
        """
        new = (self.encode(key_BTKH), self.encode(value_BTKH))
        return self._with(write_rows(self._planes, new, layer=layer, start_B=start_B, layout=self.layout))

    def write_around(
        self, layer: Any, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array, count_B: jax.Array
    ) -> Self:
        """Writes the first `count_B` of T tokens, or the last of them that fit, as in a ring.

        The token at position p goes to slot p modulo the slots, the first being at `start_B`. Up to `FEW` tokens are
        all written, whatever `count_B` says.
        """
        new = (self.encode(key_BTKH), self.encode(value_BTKH))
        around = functools.partial(write_around, layer=layer, start_B=start_B, count_B=count_B, layout=self.layout)
        return self._with(around(self._planes, new))

    @property
    def _planes(self) -> Any:
        return self.key_LBKSH, self.value_LBKSH

    def _with(self, planes: Any) -> Self:
        return dataclasses.replace(self, key_LBKSH=planes[0], value_LBKSH=planes[1])

    def mix(
        self,
        layer: Any,
        query_BTNH: jax.Array,
        position_BT: jax.Array,
        scores: Scores,
        slot_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Computes attention over one layer. Slot s holds position s, unless `slot_BS` gives the positions."""
        in_blocks = self.layout != "straight" and by_blocks(query_BTNH.shape[1], self.slots, scores)
        return (attend_blocks if in_blocks else attend)(query_BTNH, *self.read(layer), position_BT, scores, slot_BS)

    def read(self, layer: Any) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values of one layer: key_BKSH, value_BKSH, in the cache's dtype."""
        take = lambda plane: jax.lax.dynamic_index_in_dim(plane, layer, axis=0, keepdims=False)  # noqa: E731
        return self.decode(jax.tree.map(take, self.key_LBKSH)), self.decode(jax.tree.map(take, self.value_LBKSH))


def write_rows(slots: Any, new: Any, *, layer: Any, start_B: jax.Array, layout: Writes) -> Any:
    """Writes [B, T, K, X] into one layer of [L, B, K, S, X], row b from slot `start_B[b]` on; or pytrees of such.

    There is one contiguous update for each row and array, or one scatter for all rows.
    """
    B, T = jax.tree.leaves(new)[0].shape[:2]
    if layout == "scatter" and isinstance(B, int):
        S = jax.tree.leaves(slots)[0].shape[3]
        # The slots are moved back if they would exceed S, as `dynamic_update_slice` does.
        slot_BT = jnp.clip(start_B, 0, S - T)[:, None] + jnp.arange(T, dtype=jnp.int32)
        row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
        at = functools.partial(_scattered, layer=layer, row_B1=row_B1, slot_BT=slot_BT)
        return jax.tree.map(at, slots, new)

    def write_row(row: Any, slots: Any) -> Any:
        def write_plane(plane_LBKSX: jax.Array, new_BTKX: jax.Array) -> jax.Array:
            block_1BKTX = jax.lax.dynamic_slice_in_dim(jnp.swapaxes(new_BTKX, 1, 2), row, 1, axis=0)[None]
            return jax.lax.dynamic_update_slice(plane_LBKSX, block_1BKTX, start_indices(layer, row, 0, start_B[row], 0))

        return jax.tree.map(write_plane, slots, new)

    return _each_row(B, layout, write_row, slots)


def write_around(slots: Any, new: Any, *, layer: Any, start_B: jax.Array, count_B: jax.Array, layout: Writes) -> Any:
    """Does what `DensePart.write_around` does, for [B, T, K, X] and one layer of [L, B, K, S, X], or pytrees of such.

    Few tokens are written one by one. For more, all slots of a row's layer are written, each with its newest token or
    its old content: one update for each row and array, for any T. The layout "scatter" has one scatter for all rows.
    """
    B, T = jax.tree.leaves(new)[0].shape[:2]
    S = jax.tree.leaves(slots)[0].shape[3]
    if layout == "scatter" and isinstance(B, int):
        token_T = jnp.arange(T, dtype=jnp.int32)
        is_last_BT = (token_T < count_B[:, None]) & (token_T >= count_B[:, None] - S)
        slot_BT = jnp.where(is_last_BT, rest(start_B[:, None] + token_T, S), S + token_T)  # beyond: dropped
        row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
        at = functools.partial(_scattered, layer=layer, row_B1=row_B1, slot_BT=slot_BT, mode="drop")
        return jax.tree.map(at, slots, new)
    if isinstance(T, int) and T <= FEW:
        for token in range(T):
            one = jax.tree.map(lambda x_BTKX, token=token: x_BTKX[:, token : token + 1], new)
            slots = write_rows(slots, one, layer=layer, start_B=rest(start_B + token, S), layout=layout)
        return slots
    # The index of the token that each slot gets; negative for a slot that keeps its content.
    token_BS = newest(start_B + count_B, S) - start_B[:, None]

    def write_row(row: Any, slots: Any) -> Any:
        token_S = token_BS[row]

        def write_plane(plane_LBKSX: jax.Array, new_BTKX: jax.Array) -> jax.Array:
            at = start_indices(layer, row, 0, 0, 0)
            old_11KSX = jax.lax.dynamic_slice(plane_LBKSX, at, (1, 1, *plane_LBKSX.shape[2:]))
            new_TKX = jax.lax.dynamic_index_in_dim(new_BTKX, row, keepdims=False)
            new_SKX = jnp.take(new_TKX, jnp.maximum(token_S, 0), axis=0, mode="clip")
            new_KSX = jnp.where((token_S >= 0)[:, None], jnp.swapaxes(new_SKX, 0, 1), old_11KSX[0, 0])
            return jax.lax.dynamic_update_slice(plane_LBKSX, new_KSX[None, None], at)

        return jax.tree.map(write_plane, slots, new)

    return _each_row(B, layout, write_row, slots)


def _each_row(B: Any, layout: Writes, write_row: Callable[[Any, Any], Any], slots: Any) -> Any:
    """Applies `write_row` row by row, in a loop; for one row, or in the layout "straight", without a loop."""
    if not isinstance(B, int) or (layout != "straight" and B != 1):  # a symbolic B, of an exported program, is no int
        return jax.lax.fori_loop(0, B, write_row, slots)
    for row in range(B):
        slots = write_row(row, slots)
    return slots


def rest(x: jax.Array, by: int) -> jax.Array:
    """Returns the remainder of dividing a non-negative int32, by operations that every runtime has."""
    return x - jax.lax.div(x, jnp.full_like(x, by)) * by


def newest(end_B: jax.Array, S: int) -> jax.Array:
    """Returns the newest position before `end_B` that each of S slots may hold, int32 [B, S]; negative for none."""
    last_B1 = end_B[:, None] - 1
    turned_B1 = rest(jnp.maximum(last_B1, 0), S)
    slot_S = jnp.arange(S, dtype=jnp.int32)
    return last_B1 - turned_B1 + slot_S - jnp.where(slot_S > turned_B1, S, 0)


def _scattered(
    plane_LBKSX: jax.Array, new_BTKX: jax.Array, layer: Any, row_B1: Any, slot_BT: Any, mode: Any = "promise_in_bounds"
) -> jax.Array:
    place = plane_LBKSX.at[layer, row_B1, :, slot_BT]
    return place.set(new_BTKX, unique_indices=True, mode=mode)
