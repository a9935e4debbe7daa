"""Keys and values of a float type as they come: what every backend and every exported program has.

Slot `s` of a row holds the key and value of that row's token at position `s`. K and V stay separate arrays, and are
written with `dynamic_update_slice` rather than a scatter: under donation XLA then updates them in place, and other
runtimes do not copy the whole cache at every step.
"""

import dataclasses
import functools
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from llamajax.caches.attention import BLOCK_QUERIES, SLOT_BLOCK, Scores, attend, attend_blocks
from llamajax.caches.cache import Part, Where
from llamajax.config import Config
from quant import start_indices

Writes = Literal["dense", "straight", "scatter"]


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
        """Of zeros."""
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
        """As of every `Part`."""
        part = self.write(layer, key_BTKH, value_BTKH, where.start_B)
        return part.mix(layer, query_BTNH, where.position_BT, scores), part

    def write(self, layer: Any, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array) -> Self:
        """Writes T tokens of one layer from each row's slot `start_B` on; `start_B + T` must not exceed the slots.

        Slots past the tokens that `KVCache.end` then counts are overwritten by the next write.
        """
        new = [x.astype(self.key_LBKSH.dtype) for x in (key_BTKH, value_BTKH)]
        write = functools.partial(write_rows, layer=layer, start_B=start_B, layout=self.layout)
        return dataclasses.replace(
            self, key_LBKSH=write(self.key_LBKSH, new[0]), value_LBKSH=write(self.value_LBKSH, new[1])
        )

    def mix(self, layer: Any, query_BTNH: jax.Array, position_BT: jax.Array, scores: Scores) -> jax.Array:
        """Attention over one layer."""
        in_blocks = self.layout != "straight" and query_BTNH.shape[1] >= BLOCK_QUERIES and scores.see is None
        in_blocks = in_blocks and self.slots > SLOT_BLOCK and self.slots % SLOT_BLOCK == 0
        return (attend_blocks if in_blocks else attend)(query_BTNH, *self.read(layer), position_BT, scores)

    def read(self, layer: Any) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer: key_BKSH, value_BKSH, in the cache's dtype."""
        take = lambda plane: jax.lax.dynamic_index_in_dim(plane, layer, axis=0, keepdims=False)  # noqa: E731
        return take(self.key_LBKSH), take(self.value_LBKSH)


def write_rows(slots: Any, new: Any, *, layer: Any, start_B: jax.Array, layout: Writes) -> Any:
    """Writes [B, T, K, X] into one layer of [L, B, K, S, X], row b from slot `start_B[b]` on; or pytrees of such.

    One contiguous update a row and plane, or one scatter for all rows.
    """
    B, T = jax.tree.leaves(new)[0].shape[:2]
    if layout == "scatter" and isinstance(B, int):
        S = jax.tree.leaves(slots)[0].shape[3]
        # As an update would be: moved back where it would stick out.
        slot_BT = jnp.clip(start_B, 0, S - T)[:, None] + jnp.arange(T, dtype=jnp.int32)
        row_B1 = jnp.arange(B, dtype=jnp.int32)[:, None]
        at = functools.partial(_scattered, layer=layer, row_B1=row_B1, slot_BT=slot_BT)
        return jax.tree.map(at, slots, new)

    def write_row(row: Any, slots: Any) -> Any:
        def write_plane(plane_LBKSX: jax.Array, new_BTKX: jax.Array) -> jax.Array:
            block_1BKTX = jax.lax.dynamic_slice_in_dim(jnp.swapaxes(new_BTKX, 1, 2), row, 1, axis=0)[None]
            return jax.lax.dynamic_update_slice(plane_LBKSX, block_1BKTX, start_indices(layer, row, 0, start_B[row], 0))

        return jax.tree.map(write_plane, slots, new)

    if not isinstance(B, int) or (layout != "straight" and B != 1):  # a symbolic B, of an exported program, is no int
        return jax.lax.fori_loop(0, B, write_row, slots)
    for row in range(B):
        slots = write_row(row, slots)
    return slots


def _scattered(plane_LBKSX: jax.Array, new_BTKX: jax.Array, layer: Any, row_B1: Any, slot_BT: Any) -> jax.Array:
    place = plane_LBKSX.at[layer, row_B1, :, slot_BT]
    return place.set(new_BTKX, unique_indices=True, mode="promise_in_bounds")
