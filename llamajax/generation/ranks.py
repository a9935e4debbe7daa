"""Finds the largest logits, exactly and without a sort.

The k-th largest logit is the largest number such that k logits are at least as large; the least logit of a nucleus is
the largest number such that the logits at least as large hold the probability. Both are found bit by bit, from the sign
down, with one pass over the logits for each of 32 bits. A pass is a comparison and a sum, which every backend does at
the speed of memory; XLA's sort takes ten to forty times as long on a CPU.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def kth_largest(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """Returns the k-th largest logit of each row; k must be less than V."""

    def enough(least_B1: jax.Array) -> jax.Array:
        return jnp.sum(logits_BV >= least_B1, axis=-1, dtype=jnp.int32) >= top_k_B

    return _largest(enough, logits_BV.shape[0])


def nucleus(
    logits_BC: jax.Array,
    id_BC: jax.Array,
    top_p_B: jax.Array,
    least_B: jax.Array,
    total_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the least logit that top-p keeps of the logits >= `least_B`, and the last id kept with that logit.

    Args:
        logits_BC: float32.
        id_BC: int32, the token ids of the logits.
        top_p_B: the probability to keep.
        least_B: logits below it do not count.
        total_B: the sum of exp(logit - largest logit) to which the probability refers; defaults to the sum over the
            logits >= `least_B`.
    """
    most_B1 = jnp.max(logits_BC, axis=-1, keepdims=True)
    # Probabilities up to a factor per row: no division is rounded, and the likeliest token has weight 1.
    weight_BC = jnp.where(logits_BC >= least_B[:, None], jnp.exp(logits_BC - most_B1), 0)
    target_B = top_p_B * (jnp.sum(weight_BC, axis=-1) if total_B is None else total_B)

    def enough(least_B1: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(logits_BC >= least_B1, weight_BC, 0), axis=-1) >= target_B

    least_B = _largest(enough, logits_BC.shape[0])
    least_B1 = least_B[:, None]
    above_B = jnp.sum(jnp.where(logits_BC > least_B1, weight_BC, 0), axis=-1)
    tied_BC = logits_BC == least_B1
    tied_B = jnp.sum(tied_BC, axis=-1, dtype=jnp.int32)
    each_B = jnp.maximum(jnp.exp(least_B - most_B1[:, 0]), jnp.finfo(jnp.float32).tiny)
    missing_B = jnp.clip((target_B - above_B) / each_B, 1, tied_B.astype(jnp.float32))
    wanted_B = -jnp.floor(-missing_B).astype(jnp.int32)  # rounded up
    everything = jnp.full_like(wanted_B, jnp.iinfo(jnp.int32).max)
    last_B = jax.lax.cond(
        jnp.any(wanted_B < tied_B),
        lambda: jnp.where(wanted_B < tied_B, _nth_id(tied_BC, id_BC, wanted_B), everything),
        lambda: everything,
    )
    return least_B, last_B


def _nth_id(marked_BC: jax.Array, id_BC: jax.Array, count_B: jax.Array) -> jax.Array:
    """The n-th smallest marked id of each row, int32 [B]: the largest number that fewer than n marked ids precede."""

    def fewer(id_B: jax.Array) -> jax.Array:
        return jnp.sum(marked_BC & (id_BC.astype(jnp.uint32) < id_B[:, None]), axis=-1, dtype=jnp.int32) < count_B

    return _bits(fewer, marked_BC.shape[0], 31).astype(jnp.int32)


def _largest(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """The largest float32 of each row for which `holds(float_B1)`; it must hold for all floats up to that one."""
    return _as_float(_bits(lambda bits_B: holds(_as_float(bits_B)[:, None]), rows, 32))


def _bits(holds: Callable[[jax.Array], jax.Array], rows: int, count: int) -> jax.Array:
    """The largest number of `count` bits, uint32 [B], for which `holds(number_B)`; it must hold for all up to that."""

    def add(i: jax.Array, number_B: jax.Array) -> jax.Array:
        candidate_B = number_B | (jnp.uint32(1) << (count - 1 - i).astype(jnp.uint32))
        return jnp.where(holds(candidate_B), candidate_B, number_B)

    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(count), add, jnp.zeros(rows, jnp.uint32))


def _as_float(order_B: jax.Array) -> jax.Array:
    """The float32 at a place in ascending order.

    The bits of floats, with the sign bit flipped, or with all bits flipped for negative floats, ascend as the floats
    do. Places below minus infinity are NaNs of negative sign, for which minus infinity is returned. Places above
    infinity are NaNs, with which no comparison holds.
    """
    sign = jnp.uint32(1 << 31)
    bits_B = jnp.where(order_B >= sign, order_B ^ sign, ~order_B)
    lowest = jnp.uint32(0x007FFFFF)  # the place of minus infinity
    return jnp.where(order_B < lowest, -jnp.inf, jax.lax.bitcast_convert_type(bits_B, jnp.float32))
