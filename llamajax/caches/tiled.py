"""The fastest KV cache on a CPU: keys in tiles of 16 slots, and attention of a few queries without a copy.

`dot` needs whole operands, so a layer's keys and values would be copied out of the stack at every token, and converted
if their type differs. Unrolled sums over slices of the stack read them once, in their own type, and XLA compiles the
sums to the same kind of loop as the products with packed weights (`quant/kernels/cpu_sums.py`). This needs tiles, in
which the slots of a key's element are adjacent.

Dimension key: as in `config.py`, and `R` = T N / K queries that share a key, `U` tiles of `s` slots.
"""

import dataclasses
import functools
from typing import Any, Self

import jax
import jax.numpy as jnp

from llamajax.caches.attention import Scores
from llamajax.caches.cache import STEP_SLOTS
from llamajax.caches.dense import DensePart, Writes, rest
from llamajax.config import Config
from quant import start_indices, sum_steps

TILE = 16
# The largest number of queries per key for which unrolled sums are used. With more, each key serves enough queries for
# `dot` to be worth its copy.
MAX_QUERIES = 64


@functools.partial(jax.tree_util.register_dataclass, data_fields=["key_LBKSH", "value_LBKSH"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class TiledPart(DensePart):
    """Keys and values of some layers, of a float type, in tiles.

    Attributes:
        key_LBKSH: [L, B, K, U, H, s], slot 16 u + i being lane i of tile u.
        value_LBKSH: [L, B, K, n, j, H], slot 64 n + j.
    """

    @classmethod
    def empty(cls, config: Config, layers: int, batch: int, slots: int, dtype: str, layout: Writes) -> Self:
        """Makes a part of zeros.

        Raises:
            ValueError: if the number of slots is no multiple of `STEP_SLOTS`.
        """
        if slots % STEP_SLOTS:
            raise ValueError(f"a tiled cache of {slots} slots: expected a multiple of {STEP_SLOTS}, or a dense cache")
        lead, H = (layers, batch, config.num_kv_heads), config.head_size
        key_LBKUHs = jnp.zeros((*lead, slots // TILE, H, TILE), dtype)
        return cls(key_LBKUHs, jnp.zeros((*lead, slots // STEP_SLOTS, STEP_SLOTS, H), dtype))

    @property
    def slots(self) -> int:  # type: ignore[override]
        """S."""
        return self.value_LBKSH.shape[3] * STEP_SLOTS

    def write(self, layer: Any, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array) -> Self:
        """Does what `DensePart.write` does, token by token, because a run of tokens may begin and end inside a tile."""
        B, T = key_BTKH.shape[:2]
        # The slots are moved back if they would exceed S, as one `dynamic_update_slice` of all tokens would do.
        first_B = jnp.clip(start_B, 0, self.slots - T)

        def write_token(i: jax.Array | int, planes: Any) -> Any:
            row, token = i // T, i % T
            return self._written(planes, layer, row, token, first_B[row] + token, key_BTKH, value_BTKH)

        planes = self._planes
        return self._with(write_token(0, planes) if B * T == 1 else jax.lax.fori_loop(0, B * T, write_token, planes))

    def write_around(
        self, layer: Any, key_BTKH: jax.Array, value_BTKH: jax.Array, start_B: jax.Array, count_B: jax.Array
    ) -> Self:
        """Does what `DensePart.write_around` does, token by token."""
        B, T = key_BTKH.shape[:2]
        if T == 1:
            return self.write(layer, key_BTKH, value_BTKH, rest(start_B, self.slots))
        first_B = rest(start_B, self.slots)

        def write_row(row: Any, planes: Any) -> Any:
            def write_token(token: Any, planes: Any) -> Any:
                slot = rest(first_B[row] + token, self.slots)
                return self._written(planes, layer, row, token, slot, key_BTKH, value_BTKH)

            most = count_B[row]
            return jax.lax.fori_loop(jnp.maximum(most - self.slots, 0), most, write_token, planes)

        return self._with(jax.lax.fori_loop(0, B, write_row, self._planes))

    def _written(
        self, planes: Any, layer: Any, row: Any, token: Any, slot: Any, key_BTKH: jax.Array, value_BTKH: jax.Array
    ) -> Any:
        """Returns the arrays of keys and values with one token of a row written into its slot."""
        key_K, value_K = (x[row, token].astype(planes[0].dtype)[None, None, :, None] for x in (key_BTKH, value_BTKH))
        at = (layer, row, 0)
        key_at = start_indices(*at, slot // TILE, 0, slot % TILE)
        value_at = start_indices(*at, slot // STEP_SLOTS, slot % STEP_SLOTS, 0)
        return (
            jax.lax.dynamic_update_slice(planes[0], key_K[..., None], key_at),
            jax.lax.dynamic_update_slice(planes[1], value_K[..., None, :], value_at),
        )

    def read(self, layer: Any) -> tuple[jax.Array, jax.Array]:
        """Does what `DensePart.read` does; the result is a copy of one layer."""
        key_BKUHs = jax.lax.dynamic_index_in_dim(self.key_LBKSH, layer, keepdims=False)
        value_BKnjH = jax.lax.dynamic_index_in_dim(self.value_LBKSH, layer, keepdims=False)
        shape = (*value_BKnjH.shape[:2], self.slots, value_BKnjH.shape[-1])
        return jnp.swapaxes(key_BKUHs, -1, -2).reshape(shape), value_BKnjH.reshape(shape)

    def mix(
        self,
        layer: Any,
        query_BTNH: jax.Array,
        position_BT: jax.Array,
        scores: Scores,
        slot_BS: jax.Array | None = None,
    ) -> jax.Array:
        """Computes attention over one layer; for few queries without a copy, and with float32 scores and sums."""
        if query_BTNH.shape[1] * query_BTNH.shape[2] > MAX_QUERIES * self.key_LBKSH.shape[2] or scores.see is not None:
            return super().mix(layer, query_BTNH, position_BT, scores, slot_BS)
        B, T, N, H = query_BTNH.shape
        K, S = self.key_LBKSH.shape[2], self.slots
        query_BKRH = query_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, T * (N // K), H)
        # Tiles stay a separate axis until the softmax is done; otherwise its loops would have to divide slot numbers.
        score_BKRUs = self._scores(layer, query_BKRH.astype(jnp.float32))
        position_BR = jnp.repeat(position_BT, N // K, axis=1)
        slot_BS = jnp.arange(S, dtype=jnp.int32)[None] if slot_BS is None else slot_BS
        slot_BKRUs = slot_BS.reshape(-1, 1, 1, S // TILE, TILE)
        score_BKRUs = scores.masked(score_BKRUs, position_BR[:, None, :, None, None], slot_BKRUs)
        sinks_KG11 = scores.by_head(K)
        sinks = None if sinks_KG11 is None else jnp.tile(sinks_KG11, (1, T, 1, 1))
        weight_BKRUs = scores.weights(score_BKRUs, sinks, axes=(-2, -1))
        mixed_BKRH = self._mix(layer, weight_BKRUs)
        mixed_BTNH = mixed_BKRH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H)
        return mixed_BTNH.astype(query_BTNH.dtype)

    def _scores(self, layer: Any, query_BKRH: jax.Array) -> jax.Array:
        """Multiplies queries with the keys of all slots, float32 [B, K, R, U, s]."""
        _, B, K, U, H, s = self.key_LBKSH.shape
        sums = [jnp.zeros((), jnp.float32)] * 4
        for h in range(H):
            key_BKUs = jax.lax.dynamic_slice(self.key_LBKSH, start_indices(layer, 0, 0, 0, h, 0), (1, B, K, U, 1, s))[
                0, :, :, :, 0
            ]
            sums[h % 4] += key_BKUs[:, :, None].astype(jnp.float32) * query_BKRH[..., h, None, None]
        return (sums[0] + sums[1]) + (sums[2] + sums[3])

    def _mix(self, layer: Any, weight_BKRUs: jax.Array) -> jax.Array:
        """Computes weighted sums of the values of all slots, float32 [B, K, R, H]."""
        _, B, K, n, _, H = self.value_LBKSH.shape
        weight_BKRnj = weight_BKRUs.reshape(B, K, -1, n, STEP_SLOTS)
        sums = [jnp.zeros((), jnp.float32)] * 4
        for j in range(STEP_SLOTS):
            at = start_indices(layer, 0, 0, 0, j, 0)
            value_BKnH = jax.lax.dynamic_slice(self.value_LBKSH, at, (1, B, K, n, 1, H))[0, ..., 0, :]
            weight_BKnR = jnp.swapaxes(weight_BKRnj[..., j], 2, 3)
            sums[j % 4] += value_BKnH[:, :, :, None].astype(jnp.float32) * weight_BKnR[..., None]
        return sum_steps((sums[0] + sums[1]) + (sums[2] + sums[3]), 2)
