"""The two programs of every request: prefill in buckets, and a decode loop on the device.

`prefill` and `decode` are pure functions of pytrees, for use under `jax.jit` as they are. A prompt's last token is not
prefilled: it is the first that the decode loop feeds. So prefill needs no head, a prompt of one token no prefill, and
one decode program serves every request of the same batch and cache size.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llamajax.caches import KVCache
from llamajax.generation.compilation import CompiledFunction
from llamajax.generation.sampling import Sampler, sample
from llamajax.model import Llama
from quant import start_indices

# Chunks of a prompt. Three sizes are three programs at most; the largest bounds the memory of a long prompt's scores.
PREFILL_BUCKETS = (16, 64, 256)
# Most tokens that one call of the decode program makes. A buffer of that many is all it costs.
DECODE_BLOCK = 64
# Cache sizes are multiples of this, so that prompts of similar length share their programs.
SLOT_MULTIPLE = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the decode loop carries.

    Attributes:
        cache: everything before `token_B`.
        token_B: int32, the newest token of each row, not yet in the cache.
        key_B: one PRNG key a row; the choice at position p uses `fold_in(key, p)`.
        done_B: bool, rows that have ended: they add nothing to their cache any more.
        seen_BV: bool, tokens that each row holds, or None without a repetition penalty.
    """

    cache: KVCache
    token_B: jax.Array
    key_B: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None


def prefill(model: Llama, tokens_BT: jax.Array, count_B: jax.Array, cache: KVCache) -> KVCache:
    """The cache with one chunk of a prompt in it: of each row's T tokens the first `count_B`, the rest is padding."""
    _, cache = model.blocks(model.embed(tokens_BT), cache, count_B)
    return cache


def decode(
    model: Llama, state: DecodeState, sampler: Sampler, stop_M: jax.Array, limit: jax.Array
) -> tuple[DecodeState, jax.Array, jax.Array, jax.Array]:
    """Makes up to `limit` tokens a row, on the device, until every row has ended.

    Args:
        model: the model.
        state: where the rows are.
        sampler: how tokens are chosen.
        stop_M: int32, ids that end a row.
        limit: int32 scalar, at most `DECODE_BLOCK`; not static, so that one program serves every number.

    Returns:
        The state behind the last token; token_BM and log_probability_BM with `DECODE_BLOCK` columns; and the number of
        columns that were filled. In a row that ended, what follows its stop token means nothing.
    """
    B = state.token_B.shape[0]
    token_BM = jnp.zeros((B, DECODE_BLOCK), jnp.int32)
    log_probability_BM = jnp.zeros((B, DECODE_BLOCK), jnp.float32)

    def more(carry):
        step, state, _, _ = carry
        return (step < jnp.minimum(limit, DECODE_BLOCK)) & ~jnp.all(state.done_B)

    def one(carry):
        step, state, token_BM, log_probability_BM = carry
        count_B = jnp.where(state.done_B, 0, 1)
        key_B = jax.vmap(jax.random.fold_in)(state.key_B, state.cache.length_B)
        x_BTD, cache = model.blocks(model.embed(state.token_B[:, None]), state.cache, count_B)
        token_B, log_probability_B = sample(model.head(x_BTD[:, 0]), key_B, sampler, state.seen_BV)
        token_BM = jax.lax.dynamic_update_slice(token_BM, token_B[:, None], start_indices(0, step))
        log_probability_BM = jax.lax.dynamic_update_slice(
            log_probability_BM, log_probability_B[:, None], start_indices(0, step)
        )
        seen_BV = state.seen_BV
        if seen_BV is not None:
            seen_BV |= jnp.arange(seen_BV.shape[1], dtype=jnp.int32) == token_B[:, None]
        done_B = state.done_B | jnp.any(token_B[:, None] == stop_M, axis=1)
        state = DecodeState(cache, jnp.where(state.done_B, state.token_B, token_B), state.key_B, done_B, seen_BV)
        return step + 1, state, token_BM, log_probability_BM

    step, state, token_BM, log_probability_BM = jax.lax.while_loop(
        more, one, (jnp.zeros((), jnp.int32), state, token_BM, log_probability_BM)
    )
    return state, token_BM, log_probability_BM, step


compiled_prefill = CompiledFunction(prefill, donate_argnames=("cache",))
compiled_decode = CompiledFunction(decode, donate_argnames=("state",))


def plan_chunks(length: int) -> list[int]:
    """Bucket sizes that cover a prompt of `length` tokens: full largest buckets, then one or two that hold the rest.

    Two of a size take less time than one of the next, which is four times as large.

    >>> plan_chunks(300), plan_chunks(128)
    ([256, 64], [64, 64])
    """
    largest = PREFILL_BUCKETS[-1]
    full, rest = divmod(length, largest)
    bucket = next(bucket for bucket in PREFILL_BUCKETS if rest <= 2 * bucket)
    return [largest] * full + [bucket] * -(-rest // bucket)
