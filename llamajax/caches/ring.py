"""A KV cache of constant size, for layers whose queries see only a part of the text: new tokens replace old ones.

    config = Config(…, layer_kinds=("window", "full"), window=512)
    cache = KVCache.empty(config, batch=1, slots=32768)  # 576 slots in layers with a window

A ring of R slots uses a part that keeps every token, with its layouts, dtypes and attention, and writes the token at
position p to slot p modulo R. The position in a slot follows from the number of tokens, so that only keys and values
are stored.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp

from llamajax.caches.attention import NOWHERE, Before, Scores, attend_causal
from llamajax.caches.cache import STEP_SLOTS, Part, Where
from llamajax.caches.dense import FEW, newest

# Slots beyond the positions that a query sees; the sum is rounded up to whole steps of a tiled cache. One call may
# write this many tokens, including drafts that are rejected, and a conversation can be shortened by as many.
AHEAD = 64


@functools.partial(jax.tree_util.register_dataclass, data_fields=["held"], meta_fields=["seen"])
@dataclasses.dataclass(frozen=True)
class RingPart(Part):
    """Keys and values that the layers of a window or of chunks still see.

    Attributes:
        held: a part that keeps every token, of R slots. Slot s holds the newest position that is s modulo R.
        seen: positions that a query sees at most, its own included. The masks of the scores hide older tokens in slots.
    """

    held: Any
    seen: int
    slots = None

    @property
    def stored(self) -> Part:
        """The part that holds the arrays."""
        return self.held

    @property
    def spare(self) -> int:  # type: ignore[override]
        """Tokens that one call may write before its queries read."""
        return self.held.slots - (self.seen - 1)

    def storing(self, part: Any) -> Self:
        """Returns this ring with another `held`."""
        return dataclasses.replace(self, held=part)

    def fewest(self, where: Where) -> jax.Array:
        """Does what `Part.fewest` does; the result is 0 until slots are overwritten."""
        end_B = where.start_B + self._written(where)
        return jnp.where(end_B > self.held.slots, end_B - self.spare, 0)

    def _written(self, where: Where) -> jax.Array:
        """Returns the number of tokens that a call writes, int32 [B]; it writes padding only if T is at most `FEW`."""
        T = where.position_BT.shape[1]
        every = where.count_B is None or (isinstance(T, int) and T <= FEW)
        return jnp.full_like(where.start_B, T) if every else jnp.asarray(where.count_B, jnp.int32)

    def attend(
        self,
        layer: jax.Array | int,
        query_BTNH: jax.Array,
        key_BTKH: jax.Array,
        value_BTKH: jax.Array,
        where: Where,
        scores: Scores,
    ) -> tuple[jax.Array, Self]:
        """Does what `Part.attend` does, for any number of tokens.

        Up to `spare` tokens overwrite nothing that a query sees, so queries read only the slots. For more tokens,
        queries read the slots as they were before the write, and the keys and values of the call itself.
        """
        T, count_B = query_BTNH.shape[1], self._written(where)
        held = self.held.write_around(layer, key_BTKH, value_BTKH, where.start_B, count_B)
        part = self.storing(held)
        if isinstance(T, int) and T <= self.spare:
            slot_BR = self._positions(where.start_B + count_B)
            return held.mix(layer, query_BTNH, where.position_BT, scores, slot_BR), part
        key_BKTH, value_BKTH = (
            jnp.swapaxes(self.held.decode(self.held.encode(x)), 1, 2) for x in (key_BTKH, value_BTKH)
        )
        key_BKRH, value_BKRH = self.held.read(layer)
        before = Before(key_BKRH, value_BKRH, self._positions(where.start_B))
        causal = functools.partial(attend_causal, before=before, loops=self.held.layout != "straight")
        return causal(query_BTNH, key_BKTH, value_BKTH, where.position_BT, scores), part

    def _positions(self, end_B: jax.Array) -> jax.Array:
        """Returns the position that each slot holds after `end_B` tokens, int32 [B, R]."""
        newest_BR = newest(end_B, self.held.slots)
        return jnp.where(newest_BR < 0, NOWHERE, newest_BR)


def ring_slots(seen: int) -> int:
    """Returns the number of slots of a ring whose queries see `seen` positions."""
    return -(-(seen + AHEAD) // STEP_SLOTS) * STEP_SLOTS
