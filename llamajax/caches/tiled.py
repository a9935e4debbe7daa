"""The KV cache as a CPU reads it best: keys in tiles of 16 slots, and attention of a few queries without a copy.

`dot` needs its operands whole, so a layer's keys and values would be copied out of the stack at every token, in another
type than theirs to be converted too. Written as unrolled sums over slices of the stack they are read once, in their own
type, and XLA compiles the sums to the same kind of loop as the products with packed weights (`quant/kernels/cpu.py`).
For that, the slots of a key's element must lie side by side: hence the tiles.

Dimension key: as in `config.py`, and `R` = T N / K queries that share a key, `U` tiles of `s` slots.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llamajax.caches.dense import MASKED, KVCache, check_cache_dtype
from llamajax.config import Config
from quant import QTensor, start_indices
from quant.kernels.cpu import sum_steps

TILE = 16
# Slots of which one step adds the values; `slots` is a multiple of it.
STEP_SLOTS = 64
# Queries of a key up to which a cache is attended to like this. With more, each key that `dot` is given serves enough
# of them to be worth its copy.
MAX_QUERIES = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiledKVCache(KVCache):
    """A `KVCache` of a float type in tiles; everything but the shapes is as in the class that it stands for.

    Attributes:
        key_LBKSH: [L, B, K, U, H, s], slot 16 u + i being lane i of tile u.
        value_LBKSH: [L, B, K, n, j, H], slot 64 n + j.
        length_B: as in `KVCache`.
    """

    key_LBKSH: jax.Array
    value_LBKSH: jax.Array

    @classmethod
    def empty(cls, config: Config, batch: int, slots: int, dtype: jax.typing.DTypeLike = jnp.float32) -> "KVCache":
        """As `KVCache.empty`, with `slots` a multiple of 64.

        Raises:
            ValueError: for a type or a number of slots that this cache does not have.
        """
        plain = jax.eval_shape(lambda: KVCache.empty(config, batch, slots, dtype))
        if isinstance(plain.key_LBKSH, QTensor) or slots % STEP_SLOTS:
            raise ValueError(
                f"a tiled cache of {slots} slots in {check_cache_dtype(dtype)}: expected a multiple of {STEP_SLOTS} "
                "in a float type; use KVCache"
            )
        L, B, K, S, H = plain.key_LBKSH.shape
        key_LBKUHs = jnp.zeros((L, B, K, S // TILE, H, TILE), plain.key_LBKSH.dtype)
        value_LBKnjH = jnp.zeros((L, B, K, S // STEP_SLOTS, STEP_SLOTS, H), plain.key_LBKSH.dtype)
        return cls(key_LBKUHs, value_LBKnjH, jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """S, the most tokens that a row can hold."""
        return self.value_LBKSH.shape[3] * STEP_SLOTS

    def write(self, layer: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array) -> "KVCache":
        """As `KVCache.write`, token by token: a run of them may begin and end inside a tile."""
        B, T = key_BTKH.shape[:2]

        def write_token(i: jax.Array | int, slots: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            row, token = i // T, i % T
            # As one update of all tokens would be: moved back where it would stick out.
            slot = jnp.clip(self.length_B[row], 0, self.slots - T) + token
            key_K, value_K = (x[row, token].astype(slots[0].dtype)[None, None, :, None] for x in (key_BTKH, value_BTKH))
            at = (layer, row, 0)
            key_at = start_indices(*at, slot // TILE, 0, slot % TILE)
            value_at = start_indices(*at, slot // STEP_SLOTS, slot % STEP_SLOTS, 0)
            return (
                jax.lax.dynamic_update_slice(slots[0], key_K[..., None], key_at),
                jax.lax.dynamic_update_slice(slots[1], value_K[..., None, :], value_at),
            )

        slots = (self.key_LBKSH, self.value_LBKSH)
        slots = write_token(0, slots) if B * T == 1 else jax.lax.fori_loop(0, B * T, write_token, slots)
        return dataclasses.replace(self, key_LBKSH=slots[0], value_LBKSH=slots[1])

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As `KVCache.read`: a copy of one layer."""
        key_BKUHs = jax.lax.dynamic_index_in_dim(self.key_LBKSH, layer, keepdims=False)
        value_BKnjH = jax.lax.dynamic_index_in_dim(self.value_LBKSH, layer, keepdims=False)
        shape = (*value_BKnjH.shape[:2], self.slots, value_BKnjH.shape[-1])
        return jnp.swapaxes(key_BKUHs, -1, -2).reshape(shape), value_BKnjH.reshape(shape)

    def attend(self, layer: jax.Array, query_BTNH: jax.Array, position_BT: jax.Array) -> jax.Array:
        """`model.attend` for a few queries, over the cache itself.

        Args:
            layer: int32 scalar.
            query_BTNH: queries after RoPE.
            position_BT: of the queries; each sees slots 0 to its own.

        Returns:
            [B, T, N, H] in the queries' dtype; scores, softmax and sums in float32.
        """
        B, T, N, H = query_BTNH.shape
        K, S = self.key_LBKSH.shape[2], self.slots
        query_BKRH = query_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, K, T * (N // K), H)
        # Tiles stay an axis of their own until the softmax is done: slot numbers would have to be divided in its loops.
        score_BKRUs = self._scores(layer, query_BKRH.astype(jnp.float32) * H**-0.5)
        visible_BTUs = jnp.arange(S, dtype=jnp.int32).reshape(-1, TILE) <= position_BT[:, :, None, None]
        visible_BRUs = jnp.repeat(visible_BTUs, N // K, axis=1)
        score_BKRUs = jnp.where(visible_BRUs[:, None], score_BKRUs, MASKED)
        weight_BKRUs = jax.nn.softmax(score_BKRUs, axis=(-2, -1))
        mixed_BKRH = self._mix(layer, weight_BKRUs)
        mixed_BTNH = mixed_BKRH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H)
        return mixed_BTNH.astype(query_BTNH.dtype)

    def _scores(self, layer: jax.Array, query_BKRH: jax.Array) -> jax.Array:
        """Products of queries with the keys of all slots, float32 [B, K, R, U, s]."""
        _, B, K, U, H, s = self.key_LBKSH.shape
        sums = [jnp.zeros((), jnp.float32)] * 4
        for h in range(H):
            key_BKUs = jax.lax.dynamic_slice(self.key_LBKSH, start_indices(layer, 0, 0, 0, h, 0), (1, B, K, U, 1, s))[
                0, :, :, :, 0
            ]
            sums[h % 4] += key_BKUs[:, :, None].astype(jnp.float32) * query_BKRH[..., h, None, None]
        return (sums[0] + sums[1]) + (sums[2] + sums[3])

    def _mix(self, layer: jax.Array, weight_BKRUs: jax.Array) -> jax.Array:
        """Sums of values over all slots, float32 [B, K, R, H]."""
        _, B, K, n, _, H = self.value_LBKSH.shape
        weight_BKRnj = weight_BKRUs.reshape(B, K, -1, n, STEP_SLOTS)
        sums = [jnp.zeros((), jnp.float32)] * 4
        for j in range(STEP_SLOTS):
            at = start_indices(layer, 0, 0, 0, j, 0)
            value_BKnH = jax.lax.dynamic_slice(self.value_LBKSH, at, (1, B, K, n, 1, H))[0, ..., 0, :]
            weight_BKnR = jnp.swapaxes(weight_BKRnj[..., j], 2, 3)
            sums[j % 4] += value_BKnH[:, :, :, None].astype(jnp.float32) * weight_BKnR[..., None]
        return sum_steps((sums[0] + sums[1]) + (sums[2] + sums[3]), 2)


def empty_cache(config: Config, batch: int, slots: int, dtype: jax.typing.DTypeLike) -> KVCache:
    """The cache that the default backend reads fastest; arguments and errors as of `KVCache.empty`.

    In tiles on a CPU, but for bfloat16, of which XLA there converts a whole array to update a slice.
    """
    tiled = jax.default_backend() == "cpu" and check_cache_dtype(dtype) in ("float32", "float16")
    return (TiledKVCache if tiled and slots % STEP_SLOTS == 0 else KVCache).empty(config, batch, slots, dtype)
