"""The device programs of generation: pure functions of rows, for use under `jax.jit`; `Engine` compiles them.

The last token of a prompt is not prefilled: `step` feeds it first. So `extend` needs no head, a prompt of one token
needs no prefill, and one program of `step` serves every request with the same number of rows and slots.
"""

import dataclasses

import jax
import jax.numpy as jnp

from llamajax.caches import KVCache
from llamajax.errors import LlamaJaxError
from llamajax.generation.sampling import Sampler, sample
from llamajax.generation.speculate import draft_tokens
from llamajax.model import Llama
from quant import start_indices

# Chunk sizes of a prompt. Each size is a program; the largest size bounds the memory of a long prompt's scores.
PREFILL_BUCKETS = (16, 32, 64, 256)
# Most tokens that one call of `step` makes in each row, one per forward pass. It costs only a buffer of that many.
DECODE_BLOCK = 64
# Most forward passes of a call with drafts, where each may make several tokens: about as much as a block without.
DRAFT_PASSES = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """The settings of rows, in arrays with one value for each row.

    Attributes:
        left_B: int32, the number of tokens that each row may still make; 0 in a row that has ended or is free.
        key_B: PRNG keys; the choice at position p uses `fold_in(key, p)`.
        sampler: the knobs, none of which is None; a knob that is off has its neutral value.
        stop_BM: int32, ids that end each row, padded with -1.
    """

    left_B: jax.Array
    key_B: jax.Array
    sampler: Sampler
    stop_BM: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EngineState:
    """Rows that generate tokens, each with its own text, cache and knobs.

    A row that has ended keeps its tokens, except the last ones if its cache is full: each forward pass also writes its
    tokens into the slots of waiting rows.

    Attributes:
        cache: the keys and values of all tokens before the newest token of each row.
        history_BS: int32, the ids of each row at their positions, the newest at `cache.length_B`; later columns are
            undefined. It has `drafts` + 2 columns more than the cache has slots, so that every row can be written.
        asked: the settings of each row.
        drafts: k, the number of tokens drafted from the text itself, which each forward pass checks (`speculate.py`);
            static.
    """

    cache: KVCache
    history_BS: jax.Array
    asked: Asked
    drafts: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def rows(self) -> int:
        """B, the number of rows."""
        return self.history_BS.shape[0]

    @property
    def left_B(self) -> jax.Array:
        """The number of tokens that each row may still make."""
        return self.asked.left_B

    @property
    def newest_B(self) -> jax.Array:
        """The newest token of each row, not yet in the cache."""
        return jnp.take_along_axis(self.history_BS, self.cache.length_B[:, None], axis=1)[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Made:
    """The result of a call of `step`.

    Attributes:
        token_BM: int32; the first `count_B` columns of each row are valid, a stop token included.
        log_probability_BM: float32, the log-probabilities of these tokens under the model itself.
        count_B: int32, the number of tokens of each row.
        pass_B: int32, the number of forward passes that each row took part in.
    """

    token_BM: jax.Array
    log_probability_BM: jax.Array
    count_B: jax.Array
    pass_B: jax.Array


def columns(drafts: int) -> int:
    """M, the most tokens that one call of `step` generates in a row."""
    return DRAFT_PASSES * (drafts + 1) if drafts else DECODE_BLOCK


# ---- Rows that come and go -------------------------------------------------------------------------------------------


def prefill(model: Llama, tokens_BT: jax.Array, count_B: jax.Array, cache: KVCache) -> KVCache:
    """Adds one chunk of a prompt to the cache: the first `count_B` of each row's T tokens; the rest is padding."""
    _, cache = model.blocks(model.embed(tokens_BT), cache, count_B)
    return cache


def extend(
    model: Llama,
    cache: KVCache,
    tokens_bT: jax.Array,
    count_b: jax.Array,
    held_b: jax.Array,
    row_b: jax.Array | None = None,
) -> KVCache:
    """Puts a chunk of tokens into some rows of a cache.

    Args:
        model: the model.
        cache: the cache of all rows.
        tokens_bT: int32, padded.
        count_b: int32, how many of the T tokens of each row are not padding.
        held_b: int32, the tokens that each row keeps before the chunk; `held_b + T` must not exceed the slots.
        row_b: int32, distinct rows; if None, all rows in their order, which avoids a copy.
    """
    some = cache if row_b is None else cache.take(row_b).finite()
    some = prefill(model, tokens_bT, count_b, dataclasses.replace(some, length_B=held_b))
    return some if row_b is None else cache.put(row_b, some)


def start(
    state: EngineState, row_b: jax.Array, history_bS: jax.Array, length_b: jax.Array, asked: Asked
) -> EngineState:
    """Starts rows whose caches hold all but the last token.

    Args:
        state: the state of all rows.
        row_b: int32, distinct rows.
        history_bS: int32, the ids of these rows, laid out as `EngineState.history_BS`.
        length_b: int32, the number of tokens in their caches, before the newest token.
        asked: their settings.
    """
    put = lambda whole, new: whole.at[row_b].set(new)  # noqa: E731
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, length_B=put(state.cache.length_B, length_b)),
        history_BS=put(state.history_BS, history_bS),
        asked=jax.tree.map(put, state.asked, asked),
    )


def copy(state: EngineState, row: jax.Array, to_b: jax.Array, asked: Asked) -> EngineState:
    """Copies a row into other rows, which continue its text with their own settings; `row` is an int32 scalar."""
    put = lambda whole, new: whole.at[to_b].set(new)  # noqa: E731
    return dataclasses.replace(
        state,
        cache=state.cache.copy(row, to_b),
        history_BS=put(state.history_BS, state.history_BS[row]),
        asked=jax.tree.map(put, state.asked, asked),
    )


def free(state: EngineState, row_b: jax.Array) -> EngineState:
    """Ends the rows of `row_b`, int32 [b]: they generate nothing until started again; NaN in their caches becomes 0."""
    asked = dataclasses.replace(state.asked, left_B=state.asked.left_B.at[row_b].set(0))
    return dataclasses.replace(state, cache=state.cache.put(row_b, state.cache.take(row_b).finite()), asked=asked)


def grow(state: EngineState, larger: EngineState) -> EngineState:
    """Copies the rows of `state` into `larger`, which has as many rows and more slots."""
    history_BS = jax.lax.dynamic_update_slice(larger.history_BS, state.history_BS, start_indices(0, 0))
    return dataclasses.replace(larger, cache=state.cache.grow(larger.cache), history_BS=history_BS, asked=state.asked)


# ---- Making tokens ---------------------------------------------------------------------------------------------------


def step(model: Llama, state: EngineState, limit: jax.Array) -> tuple[EngineState, Made]:
    """Generates tokens in up to `limit` forward passes, on the device, until every row has ended.

    A forward pass takes T = `drafts` + 1 tokens of each row: its newest and the draft. After each of them a token is
    chosen by the row's knobs, with the key of its position; the draft counts up to its first token that differs from
    the choice. So the text is the same as without drafts, greedy or sampled.

    Args:
        model: the model.
        state: the rows; a running row whose `length + T` exceeds the slots gets logits of NaN.
        limit: int32 scalar; not static, so that one program serves every number. It is capped to the passes that fit
            into `columns`.
    """
    B, T, M = state.rows, state.drafts + 1, columns(state.drafts)
    none_B = jnp.zeros(B, jnp.int32)
    made = Made(jnp.zeros((B, M), jnp.int32), jnp.zeros((B, M), jnp.float32), none_B, none_B)

    def more(carry):
        state, made = carry
        # Within this loop rows end but never restart, so a row that still runs took part in every pass.
        return (jnp.max(made.pass_B) < jnp.minimum(limit, M // T)) & jnp.any(state.asked.left_B > 0)

    def one(carry):
        state, made = carry
        state, token_BT, log_probability_BT, count_B = forward(model, state)
        # Without drafts all running rows fill the same column; what ended rows write there is ignored.
        write = _write_rows if T > 1 else _write_columns
        at_B = made.count_B if T > 1 else jnp.max(made.count_B)
        return state, Made(
            write(made.token_BM, token_BT, at_B),
            write(made.log_probability_BM, log_probability_BT, at_B),
            made.count_B + count_B,
            made.pass_B + (count_B > 0).astype(jnp.int32),
        )

    return jax.lax.while_loop(more, one, (state, made))


def forward(model: Llama, state: EngineState) -> tuple[EngineState, jax.Array, jax.Array, jax.Array]:
    """One forward pass of all rows.

    Returns:
        The state after the new tokens; token_BT, int32, and log_probability_BT, float32, the choice after each token
        that the model was given; and count_B, int32, the number of valid choices, 0 in a row that has ended. Choices
        after the draft's first wrong token, after a stop token or beyond `left_B` are not valid.
    """
    asked, length_B, B, T = state.asked, state.cache.length_B, state.rows, state.drafts + 1
    runs_B = asked.left_B > 0
    token_BT = state.newest_B[:, None]
    if T > 1:
        token_BT = jnp.concatenate([token_BT, draft_tokens(state.history_BS, length_B, T - 1)], axis=1)
    draft_BK = token_BT[:, 1:]
    # With drafts, the number of tokens that stay is known only after the pass: the cache is then rewound to them.
    added_B = runs_B.astype(jnp.int32) if T == 1 else None
    x_BTD, cache = model.blocks(model.embed(token_BT), state.cache.idle(~runs_B, T), added_B)
    position_BT = length_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    token_BT, log_probability_BT = _choose(model.head(x_BTD.reshape(B * T, -1)), state, draft_BK, position_BT)
    # A token counts if all of the draft before it was right and none before it ended the row.
    stops_BT = jnp.any(token_BT[:, :, None] == asked.stop_BM[:, None], axis=-1)
    follows_BK = (draft_BK == token_BT[:, :-1]) & ~stops_BT[:, :-1]
    reached_BT = jnp.cumprod(jnp.pad(follows_BK, ((0, 0), (1, 0)), constant_values=True), axis=1, dtype=jnp.int32)
    counted_BT = (reached_BT == 1) & (jnp.arange(T, dtype=jnp.int32) < asked.left_B[:, None])
    count_B = jnp.sum(counted_BT, axis=1, dtype=jnp.int32)
    left_B = jnp.where(jnp.any(counted_BT & stops_BT, axis=1), 0, asked.left_B - count_B)
    if T > 1:
        cache = _rewound(cache, length_B + count_B, T)
    state = EngineState(
        dataclasses.replace(cache, length_B=jnp.where(runs_B, cache.length_B, length_B)),
        _write_rows(state.history_BS, token_BT, length_B + 1),
        dataclasses.replace(asked, left_B=left_B),
        state.drafts,
    )
    return state, token_BT, log_probability_BT, count_B


def _choose(
    logits_RV: jax.Array, state: EngineState, draft_BK: jax.Array, position_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Chooses tokens by each row's knobs; returns them and their log-probabilities, [B, T], from logits [B T, V]."""
    B, T = position_BT.shape
    sampler = jax.tree.map(lambda knob_B: jnp.repeat(knob_B, T), state.asked.sampler)
    key_R = jax.vmap(jax.random.fold_in)(jnp.repeat(state.asked.key_B, T), position_BT.reshape(-1))
    seen_RV = jax.lax.cond(
        sampler.penalizes,
        lambda: _seen(state, draft_BK, logits_RV.shape[1]).reshape(logits_RV.shape),
        lambda: jnp.zeros(logits_RV.shape, bool),
    )
    token_R, log_probability_R = sample(logits_RV, key_R, sampler, seen_RV)
    return token_R.reshape(B, T), log_probability_R.reshape(B, T)


def _seen(state: EngineState, draft_BK: jax.Array, V: int) -> jax.Array:
    """Marks each row's tokens up to each of the T positions of a pass, drafts included: bool [B, T, V]."""
    position_S = jnp.arange(state.history_BS.shape[1], dtype=jnp.int32)
    held_BS = jnp.where(position_S <= state.cache.length_B[:, None], state.history_BS, V)
    row_B1 = jnp.arange(state.rows, dtype=jnp.int32)[:, None]
    seen_BV = jnp.zeros((state.rows, V), bool).at[row_B1, held_BS].set(True, mode="drop")
    seen_BTV = [seen_BV]
    for draft_B in draft_BK.T:
        seen_BTV.append(seen_BTV[-1] | (jnp.arange(V, dtype=jnp.int32) == draft_B[:, None]))
    return jnp.stack(seen_BTV, axis=1)


def _rewound(cache: KVCache, length_B: jax.Array, at_most: int) -> KVCache:
    """Rewinds the cache to `length_B` tokens, by at most `at_most`; a row that exceeds its slots is not rewound.

    Raises:
        LlamaJaxError: for a cache that cannot go back.
    """
    if cache.slots is not None:
        length_B = jnp.where(cache.length_B > cache.slots, cache.length_B, length_B)
    shorter = cache.rewind(length_B, at_most)
    if shorter is None:
        raise LlamaJaxError(
            f"speculate: the cache cannot remove {at_most} tokens, as it overwrites old ones: expected fewer "
            "drafts, or none"
        )
    return shorter


def _write_columns(whole_BM: jax.Array, new_BT: jax.Array, start: jax.Array) -> jax.Array:
    """Writes `new_BT` into all rows, from column `start` on."""
    return jax.lax.dynamic_update_slice(whole_BM, new_BT, start_indices(0, start))


def _write_rows(whole_BS: jax.Array, new_BT: jax.Array, start_B: jax.Array) -> jax.Array:
    """Writes row b of `new_BT` from column `start_B[b]` on, one contiguous update per row as in the cache."""

    def write_row(row, whole_BS):
        new_1T = jax.lax.dynamic_slice_in_dim(new_BT, row, 1, axis=0)
        return jax.lax.dynamic_update_slice(whole_BS, new_1T, start_indices(row, start_B[row]))

    return jax.lax.fori_loop(0, new_BT.shape[0], write_row, whole_BS)


def plan_chunks(length: int) -> list[int]:
    """Bucket sizes that cover `length` tokens: full buckets of the largest size, then one or two that hold the rest.

    These one or two have the size that needs the fewest padding tokens; of two choices with equal padding, one bucket.

    >>> plan_chunks(300), plan_chunks(128), plan_chunks(20)
    ([256, 64], [64, 64], [32])
    """
    largest = PREFILL_BUCKETS[-1]
    full, rest = divmod(length, largest)
    counts = [(bucket, -(-rest // bucket)) for bucket in PREFILL_BUCKETS if rest <= 2 * bucket]
    bucket, count = min(counts, key=lambda each: (each[0] * each[1], each[1]))
    return [largest] * full + [bucket] * count
