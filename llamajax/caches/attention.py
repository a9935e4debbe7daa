"""Softmax attention over given keys and values: pure functions for use in every cache.

Queries are already scaled. Dimension key as in `config.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Scores of slots that a query must not see. Finite, because -inf minus -inf is NaN in a row that sees nothing, and
# because some of the runtimes that execute our exported programs do not carry infinities.
MASKED = -1e30
# The position of slots that hold nothing: behind every query.
NOWHERE = 1 << 30
# `attend_blocks` holds the scores of SLOT_BLOCK slots at a time. Its loop pays from BLOCK_QUERIES queries on, because
# the scores of fewer queries are small.
SLOT_BLOCK = 256
BLOCK_QUERIES = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The family-specific settings of attention scores.

    Attributes:
        window: a query sees this many positions, up to its own; all earlier ones unless given. A number, or an int32
            scalar (Mistral 7B, Jiang et al. 2023, arXiv:2310.06825).
        chunk: a query sees no position before the last multiple of this (Llama 4).
        soft_cap: scores are capped to -c … c by c tanh(score / c) (Gemma 2, arXiv:2408.00118).
        sinks_N: an extra logit in the softmax of each query head, without a value (gpt-oss).
        see: called with the attention weights, [B, N, T, S] in float32; returns the weights to use.
    """

    window: jax.Array | int | None = None
    chunk: jax.Array | int | None = None
    soft_cap: float | None = None
    sinks_N: jax.Array | None = None
    see: Callable[[jax.Array], jax.Array] | None = None

    @property
    def reach(self) -> int | None:
        """The most positions that a query sees, its own included; None without a known limit."""
        limits = [limit for limit in (self.window, self.chunk) if isinstance(limit, int)]
        return min(limits, default=None)

    def seen(self, position: jax.Array, slot: jax.Array, last: jax.Array | None = None) -> jax.Array:
        """Returns which slots a query at `position`, or any query from `position` to `last`, sees; arrays broadcast."""
        visible = slot <= (position if last is None else last)
        if self.window is not None:
            visible &= slot > position - self.window
        if self.chunk is not None:
            # A division suffices, because positions are not negative; not every runtime has a remainder operation.
            visible &= slot >= jax.lax.div(position, jnp.full_like(position, self.chunk)) * self.chunk
        return visible

    def masked(self, score: jax.Array, position: jax.Array, slot: jax.Array) -> jax.Array:
        """Returns the scores, capped and masked to what queries at `position` see; arrays broadcast to each other."""
        if self.soft_cap is not None:
            score = self.soft_cap * jnp.tanh(score / self.soft_cap)
        return jnp.where(self.seen(position, slot), score, MASKED)

    def weights(self, score: jax.Array, sinks: jax.Array | None, axes: int | tuple[int, ...] = -1) -> jax.Array:
        """Computes the softmax over some axes of the scores and over the sinks, which have the shape of `by_head`."""
        if sinks is None:
            return jax.nn.softmax(score, axis=axes)
        peak = jnp.maximum(jnp.max(score, axis=axes, keepdims=True), sinks)
        part = jnp.exp(score - peak)
        return part / (jnp.sum(part, axis=axes, keepdims=True) + jnp.exp(sinks - peak))

    def by_head(self, K: int) -> jax.Array | None:
        """Returns the sinks as [K, G, 1, 1], float32."""
        return None if self.sinks_N is None else self.sinks_N.astype(jnp.float32).reshape(K, -1, 1, 1)


PLAIN = Scores()


def _einsum(equation: str, x: jax.Array, y: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Does what `jnp.einsum` does, with float32 sums for all inputs, and float32 products of float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(equation, x, y, precision=precision, preferred_element_type=jnp.float32).astype(dtype)


def attend(
    query_BTNH: jax.Array,
    key_BKSH: jax.Array,
    value_BKSH: jax.Array,
    position_BT: jax.Array,
    scores: Scores = PLAIN,
    slot_S: jax.Array | None = None,
) -> jax.Array:
    """Computes softmax attention of each query over the slots with positions up to its own.

    Scores and softmax are float32: exponentials of bfloat16 scores would be wrong by percents.

    Args:
        query_BTNH: queries, scaled, after RoPE.
        key_BKSH: the key in each slot.
        value_BKSH: the value in each slot.
        position_BT: the position of each query; B may be 1 for equal rows.
        scores: family-specific settings.
        slot_S: the position of each slot, [S] or [B, S]; by default, slot s holds position s.

    Returns:
        [B, T, N, H] in the query's dtype.
    """
    B, T, N, H = query_BTNH.shape
    K, S = key_BKSH.shape[1:3]
    query_BKGTH = _by_shared_head(query_BTNH, K)
    score_BKGTS = _einsum("BKGTH,BKSH->BKGTS", query_BKGTH, key_BKSH.astype(query_BTNH.dtype), jnp.float32)
    slot_BTS = jnp.arange(S, dtype=jnp.int32) if slot_S is None else slot_S[..., None, :]
    slot_BKGTS = slot_BTS if slot_BTS.ndim == 1 else slot_BTS[..., None, None, :, :]
    score_BKGTS = scores.masked(score_BKGTS, position_BT[:, None, None, :, None], slot_BKGTS)
    weight_BKGTS = scores.weights(score_BKGTS, scores.by_head(K))
    if scores.see is not None:
        weight_BKGTS = scores.see(weight_BKGTS.reshape(B, N, T, S)).reshape(weight_BKGTS.shape)
    # The product has heads first, and its result is moved: XLA on CPU has no bfloat16 product with other batch axes.
    value_BKSH = value_BKSH.astype(query_BTNH.dtype)
    mixed_BKGTH = _einsum("BKGTS,BKSH->BKGTH", weight_BKGTS.astype(query_BTNH.dtype), value_BKSH, query_BTNH.dtype)
    return jnp.moveaxis(mixed_BKGTH, 3, 1).reshape(B, T, N, -1)


def attend_blocks(
    query_BTNH: jax.Array,
    key_BKSH: jax.Array,
    value_BKSH: jax.Array,
    position_BT: jax.Array,
    scores: Scores = PLAIN,
    slot_S: jax.Array | None = None,
) -> jax.Array:
    """Does what `attend` does, block by block: it holds T x 256 scores instead of T x S, for long prompts.

    The softmax is accumulated: exponentials of a block are relative to the largest score so far, and earlier sums are
    rescaled (Milakov & Gimelshein 2018, arXiv:1805.02867; FlashAttention, Dao et al. 2022). Blocks that no query sees
    are skipped, including those before a window. S must be at least 256.
    """
    B, T, N, H = query_BTNH.shape
    K, S = key_BKSH.shape[1:3]
    query_BKGTH = _by_shared_head(query_BTNH, K)
    slot_S = jnp.arange(S, dtype=jnp.int32) if slot_S is None else slot_S
    slot_bS = slot_S.reshape(-1, S)
    first_position, last_position = jnp.min(position_BT), jnp.max(position_BT)

    def one(carry, first):
        # The last block begins earlier if S is no multiple of 256; slots of the block before it are then masked.
        start = jnp.minimum(first, S - SLOT_BLOCK)
        slot_bs = jax.lax.dynamic_slice_in_dim(slot_bS, start, SLOT_BLOCK, 1)
        is_new_s = start + jnp.arange(SLOT_BLOCK, dtype=jnp.int32) >= first
        slot_bs = jnp.where(is_new_s, slot_bs, NOWHERE)

        def see(carry):
            peak_BKGT1, total_BKGT1, mixed_BKGTH = carry
            take = lambda x_BKSH: jax.lax.dynamic_slice_in_dim(x_BKSH, start, SLOT_BLOCK, 2)  # noqa: E731
            key_BKsH, value_BKsH = (take(x).astype(query_BTNH.dtype) for x in (key_BKSH, value_BKSH))
            score_BKGTS = _einsum("BKGTH,BKSH->BKGTS", query_BKGTH, key_BKsH, jnp.float32)
            slot_bKGTS = slot_bs[:, None, None, None, :]
            score_BKGTS = scores.masked(score_BKGTS, position_BT[:, None, None, :, None], slot_bKGTS)
            new_peak_BKGT1 = jnp.maximum(peak_BKGT1, jnp.max(score_BKGTS, axis=-1, keepdims=True))
            weight_BKGTS = jnp.exp(score_BKGTS - new_peak_BKGT1)
            rescale_BKGT1 = jnp.exp(peak_BKGT1 - new_peak_BKGT1)
            total_BKGT1 = total_BKGT1 * rescale_BKGT1 + jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
            part_BKGTH = _einsum("BKGTS,BKSH->BKGTH", weight_BKGTS.astype(query_BTNH.dtype), value_BKsH, jnp.float32)
            return new_peak_BKGT1, total_BKGT1, mixed_BKGTH * rescale_BKGT1 + part_BKGTH

        is_seen = jnp.any(scores.seen(first_position, slot_bs, last_position))
        return jax.lax.cond(is_seen, see, lambda carry: carry, carry), None

    empty_BKGT1 = jnp.zeros((B, K, N // K, T, 1), jnp.float32)
    peak_BKGT1, total_BKGT1 = empty_BKGT1 + MASKED, empty_BKGT1
    if (sinks := scores.by_head(K)) is not None:
        peak_BKGT1, total_BKGT1 = empty_BKGT1 + sinks, empty_BKGT1 + 1
    carry = (peak_BKGT1, total_BKGT1, jnp.zeros((B, K, N // K, T, value_BKSH.shape[-1]), jnp.float32))
    (_, total_BKGT1, mixed_BKGTH), _ = jax.lax.scan(one, carry, jnp.arange(0, S, SLOT_BLOCK, dtype=jnp.int32))
    total_BKGT1 = jnp.where(total_BKGT1 > 0, total_BKGT1, 1)  # 0 only for padding, which may see no block
    return jnp.moveaxis(mixed_BKGTH / total_BKGT1, 3, 1).reshape(B, T, N, -1).astype(query_BTNH.dtype)


def by_blocks(T: int, S: int, scores: Scores) -> bool:
    """Whether `attend_blocks` suits T queries over S slots; False for symbolic shapes."""
    numbers = isinstance(T, int) and isinstance(S, int)
    return numbers and T >= BLOCK_QUERIES and S > SLOT_BLOCK and scores.see is None


class Before(NamedTuple):
    """Keys and values of slots [B, K, R, H] before those of a sequence, and their positions [B, R]."""

    key_BKRH: jax.Array
    value_BKRH: jax.Array
    slot_BR: jax.Array


def attend_causal(
    query_BTNH: jax.Array,
    key_BKTH: jax.Array,
    value_BKTH: jax.Array,
    position_BT: jax.Array,
    scores: Scores = PLAIN,
    before: Before | None = None,
    loops: bool = False,
) -> jax.Array:
    """Does what `attend` does for a sequence that attends to itself, as in training, and to some slots before it.

    Queries are divided into at most 8 blocks (so that compile time is bounded), each with only the keys that it can
    see. Nearly half the scores are never computed, with a window most of them, and the scores of a block stay in the
    processor's cache. This made training on 2 CPU cores a quarter faster.

    Args:
        query_BTNH: queries, scaled, after RoPE.
        key_BKTH: keys of the sequence, a slot for each query.
        value_BKTH: values of the sequence.
        position_BT: positions of both queries and slots.
        scores: family-specific settings.
        before: slots before the sequence; a mask must hide the invalid ones.
        loops: whether `attend_blocks` may be used.
    """
    T, reach = query_BTNH.shape[1], scores.reach
    whole = scores.see is not None or not isinstance(T, int)
    block = max(128, -(-T // 8)) if not whole else T
    mixed = []
    for first in (0,) if whole else range(0, T, block):
        oldest = 0 if reach is None else max(0, first - (reach - 1))
        rows, seen = (slice(None),) * 2 if whole else (slice(first, first + block), slice(oldest, first + block))
        key_BKSH, value_BKSH = key_BKTH[:, :, seen], value_BKTH[:, :, seen]
        slot_BS: jax.Array | None = position_BT[:, seen]
        if before is not None and (reach is None or first < reach - 1):
            key_BKSH = jnp.concatenate([before.key_BKRH.astype(key_BKSH.dtype), key_BKSH], axis=2)
            value_BKSH = jnp.concatenate([before.value_BKRH.astype(value_BKSH.dtype), value_BKSH], axis=2)
            slot_BS = jnp.concatenate([before.slot_BR, position_BT[:, seen]], axis=1)
        elif before is None and not oldest:
            slot_BS = None  # slot s holds position s
        query_BtNH, S = query_BTNH[:, rows], key_BKSH.shape[2]
        how = attend_blocks if loops and by_blocks(query_BtNH.shape[1], S, scores) else attend
        mixed.append(how(query_BtNH, key_BKSH, value_BKSH, position_BT[:, rows], scores, slot_BS))
    return jnp.concatenate(mixed, axis=1)


def _by_shared_head(query_BTNH: jax.Array, K: int) -> jax.Array:
    """Returns queries as [B, K, G, T, H]. Moving scores after the product would make XLA gather them one by one."""
    B, T, N, H = query_BTNH.shape
    return jnp.moveaxis(query_BTNH.reshape(B, T, K, N // K, H), 1, 3)
