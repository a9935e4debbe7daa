"""Speculates by prompt lookup: drafts are taken from the text itself, and one forward pass checks them.

    completion = generate(model, tokenizer, prompt, speculate=4)

Generating one token reads all weights; checking k drafted tokens in the same pass does not read them again. The draft
needs no second model: it is the k tokens that followed the most recent earlier occurrence of the last few tokens
(prompt lookup decoding, Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding). So generation is faster if
a text repeats itself or its prompt (code, summaries, dialogues); otherwise speculation only costs wider passes.

A drafted token is kept only if the model chooses the same: after each of the k + 1 tokens one token is drawn by the
row's knobs with the key of its position, as without drafts, and the draft counts up to the first difference. A draft
gives its token the probability 1, and for such a draft this is the acceptance of speculative sampling (Leviathan et al.
2023, arXiv:2211.17192): the token is accepted with the probability that the model gives it, and its replacement follows
the rest of the distribution. So the text is the same as without drafts, greedy or sampled, up to rounding: a product
over k + 1 tokens may be summed in another order than over one, and of two nearly equal tokens the other may win.
"""

from typing import Any

import jax
import jax.numpy as jnp

from llamajax.errors import LlamaJaxError
from llamajax.generation.sampling import plain

# Most tokens at the end of the text that are compared with earlier ones. A longer match gives a better draft, but is
# rarer.
MAX_NGRAM = 3
# Most drafted tokens per step: a pass over more tokens is bound by matrix products rather than by reading weights.
MAX_DRAFTS = 64


def check_speculate(drafts: Any) -> int:
    """Checks and returns the number of drafted tokens.

    Raises:
        LlamaJaxError: for a number out of range.
    """
    drafts = plain(drafts)
    if isinstance(drafts, bool) or not isinstance(drafts, int) or not 0 <= drafts <= MAX_DRAFTS:
        raise LlamaJaxError(f"speculate is {drafts!r}: expected a whole number of tokens from 0 (off) to {MAX_DRAFTS}")
    return drafts


def draft_tokens(history_BS: jax.Array, length_B: jax.Array, drafts: int) -> jax.Array:
    """Returns the tokens that followed the most recent earlier occurrence of each row's last tokens.

    The longest match of up to `MAX_NGRAM` tokens wins, the most recent among equals; if not even the newest token
    occurred before, it is drafted again. A draft that reaches the end of the text continues with its own beginning, as
    in LZ77 (Ziv & Lempel 1977): after "a b a b", "a b a b" and so on.

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
        # Positions before the beginning hold -1, which equals no token.
        before_BS = jnp.pad(history_BS, ((0, 0), (back, 0)), constant_values=-1)[:, :S]
        recent_B1 = jnp.take_along_axis(history_BS, jnp.maximum(length_B[:, None] - back, 0), axis=1)
        agrees_BS &= before_BS == recent_B1
        agreed_BS += agrees_BS.astype(jnp.int32)
    best_B = jnp.argmax(jnp.where(earlier_BS, agreed_BS * S + position_S, -1), axis=1).astype(jnp.int32)
    start_B1 = jnp.minimum(best_B + 1, length_B)[:, None]  # the minimum matters for a row of one token
    period_B1 = length_B[:, None] + 1 - start_B1
    return jnp.take_along_axis(history_BS, start_B1 + jnp.arange(drafts, dtype=jnp.int32) % period_B1, axis=1)
