"""The KV cache: an explicit pytree, passed in and returned, never hidden state.

Slot `s` of a row holds the key and value of that row's token at position `s`. Each row has its own length, so rows of
different length share a batch and nothing else is needed for masking: a query at position `p` sees slots `0..p`.
K and V stay separate arrays, and are written with `dynamic_update_slice` rather than a scatter: under donation XLA then
updates them in place, and other runtimes do not copy the whole cache at every step.

A cache of 8 or 4 bits is not another class: its keys and values are `QTensor` leaves instead of arrays, as quantized
weights are. They are quantized when written and dequantized, one layer at a time, when read, also for the tokens that
wrote them: every token attends to the same codes however a text is cut into pieces, as far as keys and values before
rounding are the same. Those of another cut differ in their last bits, because products of another shape are summed in
another order, and near the middle of two codes that decides between them: logits of stories260K then differ by up to
0.15 with 8 bits and 0.60 with 4.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from quant import SCHEMES, QTensor, Scheme, dequantize, quantize_rtn, start_indices

# Codes have a zero point. Keys have channels that are always large and of one sign (KIVI, Liu et al. 2024,
# arXiv:2402.02750), so that the values of a head seldom lie evenly around 0. Without it the model in the box is off by
# twice the KL divergence at 4 bits and by half as much again at 8; it costs one byte a head and token.
_QUANTIZED = {"int8": SCHEMES["uint8"], "int4": SCHEMES["uint4"]}

# Scores of slots that a query must not see. Finite, because -inf minus -inf is NaN in a row that sees nothing, and
# because some of the runtimes that execute our exported programs do not carry infinities.
MASKED = -1e30

CACHE_DTYPES = ("float32", "bfloat16", "float16", *_QUANTIZED)

# Keys or values of all layers: an array, or quantized along the last axis, a head of a token being one group.
Slots = jax.Array | QTensor


def check_cache_dtype(dtype: jax.typing.DTypeLike) -> str:
    """The name of a dtype that a cache can have, one of `CACHE_DTYPES`.

    Raises:
        LlamaJaxError: for any other.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in CACHE_DTYPES:
        raise LlamaJaxError(f"the cache's dtype is {dtype!r}: expected one of {', '.join(CACHE_DTYPES)}")
    return name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far.

    Attributes:
        key_LBKSH: keys after RoPE, in the cache's dtype. Head before slot, so that one head's keys are contiguous.
            In a cache of 8 or 4 bits a `QTensor` of that shape: codes uint8 [L, B, K, S, H], or [L, B, K, S, H/2] with
            elements h and h + H/2 in one byte, low bits first; scale float32 and zero uint8 [L, B, K, S, 1].
        value_LBKSH: values, likewise.
        length_B: int32, tokens held by each row; more than `slots` for a row that overflowed. Slots from there on are
            read with weight zero: what is in them must be finite.
    """

    key_LBKSH: Slots
    value_LBKSH: Slots
    length_B: jax.Array
    # Whether programs may loop over its rows and blocks of its slots; some runtimes take none with loops.
    loops: ClassVar[bool] = True

    @classmethod
    def empty(cls, config: Config, batch: int, slots: int, dtype: jax.typing.DTypeLike = jnp.float32) -> "KVCache":
        """A cache for `batch` rows of up to `slots` tokens.

        Args:
            config: of the model.
            batch: B.
            slots: S.
            dtype: one of `CACHE_DTYPES`. Of a float type the cache takes 2 L B K S H elements; of "int8" and "int4"
                2 L B K S (H + 5) and 2 L B K S (H/2 + 5) bytes, and what is read is off by at most scale / 2, where
                scale is the range of the H values of a head and token, widened to include 0, over 255 or 15.

        Raises:
            LlamaJaxError: for another dtype.
        """
        shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_size)
        name = check_cache_dtype(dtype)
        return cls(_empty_slots(shape, name), _empty_slots(shape, name), jnp.zeros(batch, jnp.int32))

    @property
    def slots(self) -> int:
        """S, the most tokens that a row can hold."""
        return self.key_LBKSH.shape[3]

    def write(self, layer: jax.Array, key_BTKH: jax.Array, value_BTKH: jax.Array) -> "KVCache":
        """Writes T tokens of one layer behind each row's `length_B`, without advancing it.

        Every row writes T slots, so `length_B + T` must not exceed `slots`: the model turns the outputs of a row for
        which it does into NaN. Slots past the tokens that `advance` then counts are overwritten by the next write.
        In a cache of 8 or 4 bits a head that holds NaN or infinity is read as nothing else.
        """
        return dataclasses.replace(
            self,
            key_LBKSH=_write_rows(self.key_LBKSH, layer, key_BTKH, self.length_B, self.loops),
            value_LBKSH=_write_rows(self.value_LBKSH, layer, value_BTKH, self.length_B, self.loops),
        )

    def read(self, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer: key_BKSH, value_BKSH, in the cache's dtype, or float32 from 8 or 4 bits."""
        return _read_layer(self.key_LBKSH, layer), _read_layer(self.value_LBKSH, layer)

    def advance(self, count_B: jax.Array | int) -> "KVCache":
        """The same cache with `count_B` more tokens in each row."""
        return dataclasses.replace(self, length_B=self.length_B + jnp.asarray(count_B, jnp.int32))


def _empty_slots(shape: tuple[int, ...], dtype: str) -> Slots:
    """Zeros [L, B, K, S, H]."""
    if dtype not in _QUANTIZED:
        return jnp.zeros(shape, dtype)
    quantize = functools.partial(_quantize, scheme=_QUANTIZED[dtype])
    abstract = jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, jnp.float32))
    return jax.tree.map(lambda plane: jnp.zeros(plane.shape, plane.dtype), abstract)


def _write_rows(slots: Slots, layer: jax.Array, new_BTKH: jax.Array, start_B: jax.Array, loop: bool) -> Slots:
    """Writes `new_BTKH` into one layer, row b from slot `start_B[b]` on, one contiguous update a row and plane."""
    new = _quantize(new_BTKH, slots.scheme) if isinstance(slots, QTensor) else new_BTKH.astype(slots.dtype)

    def write_row(row, slots):
        def write_plane(plane_LBKSX, new_BTKX):
            block_1BKTX = jax.lax.dynamic_slice_in_dim(jnp.swapaxes(new_BTKX, 1, 2), row, 1, axis=0)[None]
            return jax.lax.dynamic_update_slice(plane_LBKSX, block_1BKTX, start_indices(layer, row, 0, start_B[row], 0))

        return jax.tree.map(write_plane, slots, new)

    B = new_BTKH.shape[0]
    if not isinstance(B, int) or (loop and B != 1):  # a symbolic B, of an exported program, is no int
        return jax.lax.fori_loop(0, B, write_row, slots)
    for row in range(B):
        slots = write_row(row, slots)
    return slots


def _read_layer(slots: Slots, layer: jax.Array) -> jax.Array:
    """[B, K, S, H] of one layer."""
    take = lambda plane: jax.lax.dynamic_index_in_dim(plane, layer, axis=0, keepdims=False)  # noqa: E731
    taken = jax.tree.map(take, slots)
    return dequantize(taken) if isinstance(taken, QTensor) else taken


@functools.partial(jax.jit, static_argnames="scheme")
def _quantize(x: jax.Array, scheme: Scheme) -> QTensor:
    """[..., H] in codes, each H with a scale and a zero point of its own.

    Scales in float32, although their bytes count: rounded to bfloat16 they would leave the ends of the range of 8 bits
    off by a step, float16 does not hold every scale, and XLA on CPU converts a whole bfloat16 array to update a slice.
    Compiled even where `write` is not, because outside jit `quantize_rtn` refuses NaN, which here must stay NaN: it
    marks what a model must not believe, such as the logits behind an unknown token.
    """
    x = x.astype(jnp.float32)
    return quantize_rtn(x, scheme, group_size=x.shape[-1], axis=-1, scale_dtype=jnp.float32)
