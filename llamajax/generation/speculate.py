"""Speculation by prompt lookup: the text itself drafts what comes next, and one forward pass checks the draft.

    completion = generate(model, tokenizer, prompt, temperature=0, speculate=4)

Making one token reads all weights; checking k drafted tokens in the same pass reads them no second time. The draft
needs no second model: it is the k tokens that followed the most recent earlier occurrence of the last few (prompt
lookup decoding, Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding). So it pays where a text repeats
itself or its prompt: code, summaries, dialogues; and costs a wider pass for nothing where it does not.

A drafted token is kept only where it is the one that the model chooses itself, so the text is that of greedy decoding,
token by token. Up to rounding: a product over k + 1 tokens may be summed in another order than over one, and where two
tokens are as good as equally likely the other may win. Sampled text would need drafts accepted by chance (Leviathan et
al. 2023, arXiv:2211.17192) and a repetition penalty other logits behind each draft: both are refused.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.caches import KVCache
from llamajax.errors import LlamaJaxError
from llamajax.generation.compilation import CompiledFunction
from llamajax.generation.sampling import Sampler, plain
from llamajax.model import Llama
from quant import start_indices

# Most tokens that an occurrence must share with the end of the text. More find a better draft more rarely.
MAX_NGRAM = 3
# Most drafted tokens a step: a pass over more is bound by products, no longer by reading weights.
MAX_DRAFTS = 64
# Most forward passes that one call of the program makes. A few tokens each: about one block of plain decoding.
STEPS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LookupState:
    """What the loop carries.

    Attributes:
        cache: everything before the newest token of each row.
        history_BS: int32, each row's tokens at their positions, as many columns as the cache has slots. The newest is
            at `cache.length_B`; what is behind it means nothing.
        left_B: int32, tokens that each row may still make; 0 in a row that has ended: it adds nothing any more.
        drafts: k, drafted tokens a step. Static.
    """

    cache: KVCache
    history_BS: jax.Array
    left_B: jax.Array
    drafts: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def start(cls, cache: KVCache, prompts: list[list[int]], drafts: int) -> "LookupState":
        """The state behind a prefill of all but the last token of each prompt, every row ended: `left_B` is 0.

        Args:
            cache: of at least prompt + new tokens + `drafts` + 1 slots (see `slots_beyond`).
            prompts: ids of each row.
            drafts: k.
        """
        if cache.slots is None:
            raise LlamaJaxError("speculate: the cache has no end, and the text no place: leave speculate out")
        history_BS = np.zeros((len(prompts), cache.slots), np.int32)
        for row, prompt in enumerate(prompts):
            history_BS[row, : len(prompt)] = prompt
        return cls(cache, jax.device_put(history_BS), jax.device_put(np.zeros(len(prompts), np.int32)), drafts)


def slots_beyond(drafts: int) -> int:
    """Slots that a cache needs behind its last token: also a row that has ended writes one step's tokens there."""
    return drafts + 2 if drafts else 0


def check_speculate(drafts: Any, sampler: Sampler) -> int:
    """The number of drafted tokens, checked.

    Raises:
        LlamaJaxError: for a number out of range, or a choice of tokens that drafts are not checked for.
    """
    drafts = plain(drafts)
    if isinstance(drafts, bool) or not isinstance(drafts, int) or not 0 <= drafts <= MAX_DRAFTS:
        raise LlamaJaxError(f"speculate is {drafts!r}: expected a whole number of tokens from 0 (off) to {MAX_DRAFTS}")
    if drafts and sampler.temperature is not None:
        raise LlamaJaxError(
            f"speculate is {drafts} and the temperature not 0: expected greedy choice, drafts are not checked for "
            "another: set temperature to 0, or leave speculate out"
        )
    if drafts and sampler.repetition_penalty is not None:
        raise LlamaJaxError(
            f"speculate is {drafts} and there is a repetition_penalty: expected plain greedy choice, drafts are not "
            "checked for another: leave one of the two out"
        )
    return drafts


def draft_tokens(history_BS: jax.Array, length_B: jax.Array, drafts: int) -> jax.Array:
    """What followed the most recent earlier occurrence of each row's last tokens.

    The longest agreement up to `MAX_NGRAM` tokens wins, the most recent among equals; where not even the newest token
    occurred before, it is drafted again. A draft that reaches the end of the text goes on with its own beginning, as
    copies do in LZ77 (Ziv & Lempel 1977): after "a b a b", "a b a b" and so on.

    Args:
        history_BS: int32, tokens at their positions.
        length_B: int32, the position of each row's newest token.
        drafts: k.

    Returns:
        draft_BK: int32, all of them tokens of the row.
    """
    S = history_BS.shape[1]
    position_S = jnp.arange(S, dtype=jnp.int32)
    earlier_BS = position_S < length_B[:, None]
    agrees_BS, agreed_BS = earlier_BS, jnp.zeros(history_BS.shape, jnp.int32)
    for back in range(MAX_NGRAM):
        # Before the beginning there is -1, which no token equals.
        before_BS = jnp.pad(history_BS, ((0, 0), (back, 0)), constant_values=-1)[:, :S]
        recent_B1 = jnp.take_along_axis(history_BS, jnp.maximum(length_B[:, None] - back, 0), axis=1)
        agrees_BS &= before_BS == recent_B1
        agreed_BS += agrees_BS.astype(jnp.int32)
    best_B = jnp.argmax(jnp.where(earlier_BS, agreed_BS * S + position_S, -1), axis=1).astype(jnp.int32)
    start_B1 = jnp.minimum(best_B + 1, length_B)[:, None]  # The minimum is for a row of one token: nothing is earlier.
    period_B1 = length_B[:, None] + 1 - start_B1
    return jnp.take_along_axis(history_BS, start_B1 + jnp.arange(drafts, dtype=jnp.int32) % period_B1, axis=1)


def verify(model: Llama, state: LookupState, stop_M: jax.Array) -> tuple[LookupState, jax.Array, jax.Array, jax.Array]:
    """One forward pass over the newest token and its draft: T = k + 1 tokens a row.

    Args:
        model: the model.
        state: where the rows are.
        stop_M: int32, ids that end a row.

    Returns:
        The state behind the tokens made; token_BT, int32, and log_probability_BT, float32, what the model chooses
        behind each token that it was given; and count_B, int32, how many of them the row has made: behind the draft's
        first wrong token, a stop token or the last of `left_B` they mean nothing. 0 in a row that has ended.
    """
    length_B, T = state.cache.length_B, state.drafts + 1
    newest_B1 = jnp.take_along_axis(state.history_BS, length_B[:, None], axis=1)
    draft_BK = draft_tokens(state.history_BS, length_B, state.drafts)
    # What of this stays is known only afterwards: the cache goes back to it.
    logits_BTV, cache = model(jnp.concatenate([newest_B1, draft_BK], axis=1), state.cache)
    token_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
    log_probability_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    log_probability_BT = jnp.take_along_axis(log_probability_BTV, token_BT[:, :, None], axis=-1)[:, :, 0]
    # A token counts if all of the draft before it was right and none before it ended the row.
    stops_BT = jnp.any(token_BT[:, :, None] == stop_M, axis=-1)
    follows_BK = (draft_BK == token_BT[:, :-1]) & ~stops_BT[:, :-1]
    reached_BT = jnp.cumprod(jnp.pad(follows_BK, ((0, 0), (1, 0)), constant_values=True), axis=1, dtype=jnp.int32)
    counted_BT = (reached_BT == 1) & (jnp.arange(T, dtype=jnp.int32) < state.left_B[:, None])
    count_B = jnp.sum(counted_BT, axis=1, dtype=jnp.int32)
    left_B = jnp.where(jnp.any(counted_BT & stops_BT, axis=1), 0, state.left_B - count_B)
    history_BS = _write_rows(state.history_BS, token_BT, length_B + 1)
    kept_B = length_B + count_B
    if cache.slots is not None:  # A row that did not fit stays too long.
        kept_B = jnp.where(cache.length_B > cache.slots, cache.length_B, kept_B)
    cache = rewound(cache, kept_B, T)
    return LookupState(cache, history_BS, left_B, state.drafts), token_BT, log_probability_BT, count_B


def rewound(cache: KVCache, length_B: jax.Array, at_most: int) -> KVCache:
    """The cache with the tokens that stay, of at most so many more.

    Raises:
        LlamaJaxError: for a cache that cannot go back.
    """
    shorter = cache.rewind(length_B, at_most)
    if shorter is None:
        raise LlamaJaxError(
            f"speculate: the cache cannot forget {at_most} tokens, as it drops old ones to make room: expected fewer "
            "drafts, or none"
        )
    return shorter


def decode_by_lookup(
    model: Llama, state: LookupState, stop_M: jax.Array, limit: jax.Array
) -> tuple[LookupState, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Makes tokens for up to `limit` forward passes, on the device, until every row has ended.

    Args:
        model: the model.
        state: where the rows are; each ends when it has made `left_B` tokens. The cache must have `slots_beyond` more
            slots than the longest row will then have tokens: logits of a row that overflows are NaN.
        stop_M: int32, ids that end a row.
        limit: int32 scalar, at most `STEPS`; not static, so that one program serves every number.

    Returns:
        The state behind the last tokens; token_BM, int32, and log_probability_BM, float32, with `STEPS` (k + 1)
        columns; made_B, int32, how many of these columns each row filled, a stop token included; and step_B, int32, in
        how many passes it did.
    """
    B, M = state.left_B.shape[0], STEPS * (state.drafts + 1)
    token_BM = jnp.zeros((B, M), jnp.int32)
    log_probability_BM = jnp.zeros((B, M), jnp.float32)

    def more(carry):
        state, *_, step_B = carry
        # Rows end but never begin again: one that still runs took part in every pass.
        return (jnp.max(step_B) < jnp.minimum(limit, STEPS)) & jnp.any(state.left_B > 0)

    def one(carry):
        state, token_BM, log_probability_BM, made_B, step_B = carry
        state, token_BT, log_probability_BT, count_B = verify(model, state, stop_M)
        token_BM = _write_rows(token_BM, token_BT, made_B)
        log_probability_BM = _write_rows(log_probability_BM, log_probability_BT, made_B)
        return state, token_BM, log_probability_BM, made_B + count_B, step_B + (count_B > 0).astype(jnp.int32)

    none_B = jnp.zeros(B, jnp.int32)
    return jax.lax.while_loop(more, one, (state, token_BM, log_probability_BM, none_B, none_B))


compiled_lookup = CompiledFunction(decode_by_lookup, donate_argnames=("state",))


def _write_rows(whole_BS: jax.Array, new_BT: jax.Array, start_B: jax.Array) -> jax.Array:
    """Writes row b of `new_BT` from column `start_B[b]` on, one contiguous update a row as in the cache."""

    def write_row(row, whole_BS):
        new_1T = jax.lax.dynamic_slice_in_dim(new_BT, row, 1, axis=0)
        return jax.lax.dynamic_update_slice(whole_BS, new_1T, start_indices(row, start_B[row]))

    return jax.lax.fori_loop(0, new_BT.shape[0], write_row, whole_BS)
