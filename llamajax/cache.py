"""The KV cache: an explicit pytree, passed in and returned, never hidden state.

Slot `s` of a row holds the key and value of that row's token at position `s`. Each row has its own length, so rows of
different length share a batch and nothing else is needed for masking: a query at position `p` sees slots `0..p`.
K and V stay separate arrays, and are written with `dynamic_update_slice` rather than a scatter: under donation XLA then
updates them in place, and other runtimes do not copy the whole cache at every step.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llamajax.config import Config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    Attributes:
        key_LBKSH: keys after RoPE, in the cache's dtype. Head before slot, so that one head's keys are contiguous.
        value_LBKSH: values, same shape and dtype.
        length_B: int32, tokens held by each row; more than `slots` for a row that overflowed. Slots from there on are
            read with weight zero: what is in them must be finite.
    """

    key_LBKSH: jax.Array
    value_LBKSH: jax.Array
    length_B: jax.Array

    @classmethod
    def empty(cls, config: Config, batch: int, slots: int, dtype: jax.typing.DTypeLike = jnp.float32) -> "KVCache":
        """A cache for `batch` rows of up to `slots` tokens; 2 L B K S H elements of `dtype`."""
        shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """S, the most tokens that a row can hold."""
        return self.key_LBKSH.shape[3]

    def write(self, layer: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array) -> "KVCache":
        """Writes T tokens of one layer behind each row's `length_B`, without advancing it.

        Every row writes T slots, so `length_B + T` must not exceed `slots`: the model turns the outputs of a row for
        which it does into NaN. Slots past the tokens that `advance` then counts are overwritten by the next write.
        """
        return dataclasses.replace(
            self,
            key_LBKSH=_write_rows(self.key_LBKSH, layer, key_BTKH, self.length_B),
            value_LBKSH=_write_rows(self.value_LBKSH, layer, value_BTKH, self.length_B),
        )

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer: key_BKSH, value_BKSH."""
        take = lambda array: jax.lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)  # noqa: E731
        return take(self.key_LBKSH), take(self.value_LBKSH)

    def advance(self, count_B: jax.Array | int) -> "KVCache":
        """The same cache with `count_B` more tokens in each row."""
        return dataclasses.replace(self, length_B=self.length_B + jnp.asarray(count_B, jnp.int32))


def _write_rows(slots_LBKSH: jax.Array, layer: jax.Array, new_BTKH: jax.Array, start_B: jax.Array) -> jax.Array:
    """Writes `new_BTKH` into one layer, row b from slot `start_B[b]` on, one contiguous update a row."""
    new_BKTH = jnp.swapaxes(new_BTKH, 1, 2).astype(slots_LBKSH.dtype)

    def write_row(row, slots_LBKSH):
        block_1BKTH = jax.lax.dynamic_slice_in_dim(new_BKTH, row, 1, axis=0)[None]
        return jax.lax.dynamic_update_slice(slots_LBKSH, block_1BKTH, (layer, row, 0, start_B[row], 0))

    if new_BKTH.shape[0] == 1:
        return write_row(0, slots_LBKSH)
    return jax.lax.fori_loop(0, new_BKTH.shape[0], write_row, slots_LBKSH)
