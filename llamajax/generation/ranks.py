"""Which logits are among the largest, exactly and without a sort.

The k-th largest logit, or the least that a nucleus keeps, is the largest number from which on logits still hold enough:
as many as k, or so much probability. It is found bit by bit, from its sign down, with one pass over the logits for each
of 32. A pass is a comparison and a sum, which every backend does at the speed of memory; XLA's sort takes ten to forty
times as long on a CPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def kth_largest(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """The k-th largest logit of each row, whose k is less than V."""

    def enough(least_B1: jax.Array) -> jax.Array:
        return jnp.sum(logits_BV >= least_B1, axis=-1, dtype=jnp.int32) >= top_k_B

    return _largest(enough, logits_BV.shape[0])


def nucleus(logits_BV: jax.Array, top_p_B: jax.Array, least_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least logit that top-p keeps of the logits from `least_B` on, and the last id that it keeps with it."""
    B, V = logits_BV.shape
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    # Probabilities up to a factor, the same in a row: no division is rounded, the likeliest is 1.
    weight_BV = jnp.where(logits_BV >= least_B[:, None], jnp.exp(logits_BV - most_B1), 0)
    target_B = top_p_B * jnp.sum(weight_BV, axis=-1)

    def enough(least_B1: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(logits_BV >= least_B1, weight_BV, 0), axis=-1) >= target_B

    least_B = _largest(enough, B)
    least_B1 = least_B[:, None]
    above_B = jnp.sum(jnp.where(logits_BV > least_B1, weight_BV, 0), axis=-1)
    tied_BV = logits_BV == least_B1
    tied_B = jnp.sum(tied_BV, axis=-1, dtype=jnp.int32)
    each_B = jnp.maximum(jnp.exp(least_B - most_B1[:, 0]), jnp.finfo(jnp.float32).tiny)
    missing_B = jnp.clip((target_B - above_B) / each_B, 1, tied_B.astype(jnp.float32))
    wanted_B = -jnp.floor(-missing_B).astype(jnp.int32)  # rounded up
    everything = jnp.full(B, V, jnp.int32)
    last_B = jax.lax.cond(
        jnp.any(wanted_B < tied_B),
        lambda: jnp.where(wanted_B < tied_B, _nth_id(tied_BV, wanted_B), everything),
        lambda: everything,
    )
    return least_B, last_B


def _nth_id(marked_BV: jax.Array, count_B: jax.Array) -> jax.Array:
    """The id of the n-th marked token of each row, int32 [B]: the largest that fewer than n marked ones precede."""
    id_V = jnp.arange(marked_BV.shape[-1], dtype=jnp.uint32)

    def fewer(id_B: jax.Array) -> jax.Array:
        return jnp.sum(marked_BV & (id_V < id_B[:, None]), axis=-1, dtype=jnp.int32) < count_B

    return _bits(fewer, marked_BV.shape[0], (marked_BV.shape[-1] - 1).bit_length()).astype(jnp.int32)


def _largest(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """The largest float32 of each row for which `holds(float_B1)`, which holds for minus infinity and all up to it."""
    return _as_float(_bits(lambda bits_B: holds(_as_float(bits_B)[:, None]), rows, 32))


def _bits(holds: Callable[[jax.Array], jax.Array], rows: int, count: int) -> jax.Array:
    """The largest number of `count` bits, uint32 [B], for which `holds(number_B)`: as it does for all up to it."""

    def add(i: jax.Array, number_B: jax.Array) -> jax.Array:
        candidate_B = number_B | (jnp.uint32(1) << (count - 1 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate_B), candidate_B, number_B)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), add, jnp.zeros(rows, jnp.uint32))


def _as_float(order_B: jax.Array) -> jax.Array:
    """The float32 at a place in their order: with the sign bit flipped, or all bits of a negative one, they ascend.

    Below minus infinity are NaNs of negative sign: minus infinity is given for them. No comparison with those above
    infinity holds.
    """
    sign = jnp.uint32(1 << 31)
    bits_B = jnp.where(order_B >= sign, order_B ^ sign, ~order_B)
    lowest = jnp.uint32(0x007FFFFF)  # the place of minus infinity
    return jnp.where(order_B < lowest, -jnp.inf, jax.lax.bitcast_convert_type(bits_B, jnp.float32))
