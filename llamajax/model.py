"""LLaMA, written once: the model as data (`flax.nnx` modules are pytrees) and pure calls.

    model = Llama(config, key=jax.random.key(0))
    logits_BTV, cache = model(tokens_BT, cache)

Nothing is mutated by a call, so `jax.jit`, `grad`, `vmap`, `eval_shape` take the model and its parts directly. The
layers are one `Block` whose weights carry a leading axis L, scanned: compile time does not grow with depth.
Shapes are in the names; the letters are explained in `config.py`. Weights are stored [in, out], so that activations
multiply from the left: `x_BTD @ w_DF`.

Reference implementations: meta-llama/llama (`model.py`) and transformers' `modeling_llama.py`; tests compare with the
second and with an independent float64 NumPy version.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from llamajax.caches.dense import MASKED, KVCache
from llamajax.caches.tiled import MAX_QUERIES, TiledKVCache
from llamajax.config import Config
from llamajax.meshes import on_auto_axes
from quant import einsum, scan_layers, take_rows

# Slots whose scores are held at a time, and queries from which on that is worth a loop: for fewer the scores are small.
SLOT_BLOCK = 256
BLOCK_QUERIES = 64


class RMSNorm(nnx.Module):
    """Root mean square normalization (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float, dtype: jax.typing.DTypeLike):
        """`width` weights, all one."""
        self.eps = eps
        self.weight_D = nnx.Param(jnp.ones(width, dtype))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normalizes the last axis.

        In float32: squares of bfloat16 activations overflow its 8 bits of precision long before its range, and the
        mean of thousands of them would be off in the first digits. Activations whose squares are beyond float32, those
        of 1.8e19 and more, give NaN.
        """
        wide_BTD = x_BTD.astype(jnp.float32)
        mean_square_BT1 = jnp.mean(wide_BTD * wide_BTD, axis=-1, keepdims=True)
        scale_BT1 = jax.lax.rsqrt(mean_square_BT1 + self.eps)
        # Squares that overflow would make it 0, and numbers of it that no check can tell from right ones.
        scale_BT1 = jnp.where(scale_BT1 > 0, scale_BT1, jnp.nan)
        normed_BTD = wide_BTD * scale_BT1
        return normed_BTD.astype(x_BTD.dtype) * self.weight_D[...].astype(x_BTD.dtype)


def rope_frequencies(config: Config) -> jax.Array:
    """Angular frequency of each RoPE pair, radians a token, float32 [H/2] (Su et al. 2021, arXiv:2104.09864)."""
    pair = jnp.arange(config.head_size // 2, dtype=jnp.float32)
    frequency = config.rope_theta ** (-2.0 * pair / config.head_size)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # llama3: turns completed within the original context decide. Many turns: keep; few: slow down; between: blend.
    turns = scaling.original_context_length * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def apply_rope(x_BTNH: jax.Array, position_BT: jax.Array, frequency: jax.Array) -> jax.Array:
    """Rotates pair (i, i + H/2) of each head by position x frequency[i].

    Halves rather than neighbours: the layout of Hugging Face checkpoints; others are permuted once, at load. Angles in
    float32: in bfloat16 whole positions beyond 256 are no longer distinct.
    """
    angle_BT1J = position_BT[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle_BT1J), jnp.sin(angle_BT1J)
    low, high = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x_BTNH.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): G query heads share one K/V head."""

    def __init__(self, config: Config, *, key: jax.Array, dtype: jax.typing.DTypeLike):
        """Random projections; N*H and K*H are stored as one axis each."""
        keys = jax.random.split(key, 4)
        query, shared = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.config = config
        self.query_DQ = _random(keys[0], (config.width, query), dtype)
        self.key_DM = _random(keys[1], (config.width, shared), dtype)
        self.value_DM = _random(keys[2], (config.width, shared), dtype)
        self.out_QD = _random(keys[3], (query, config.width), dtype, config.num_layers)

    def __call__(
        self, x_BTD: jax.Array, position_BT: jax.Array, cache: KVCache | None, layer: jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        """Attends over the new tokens and, where there is a cache, over what it holds of this layer."""
        c, (B, T, _) = self.config, x_BTD.shape
        frequency = rope_frequencies(c)
        query_BTNH = einsum("BTD,DQ->BTQ", x_BTD, self.query_DQ.get_value()).reshape(B, T, c.num_heads, c.head_size)
        key_BTKH = einsum("BTD,DM->BTM", x_BTD, self.key_DM.get_value()).reshape(B, T, c.num_kv_heads, c.head_size)
        value_BTKH = einsum("BTD,DM->BTM", x_BTD, self.value_DM.get_value()).reshape(key_BTKH.shape)
        query_BTNH = apply_rope(query_BTNH, position_BT, frequency)
        key_BTKH = apply_rope(key_BTKH, position_BT, frequency)
        if cache is None:
            mixed_BTNH = attend_causal(query_BTNH, jnp.swapaxes(key_BTKH, 1, 2), jnp.swapaxes(value_BTKH, 1, 2))
        else:
            cache = cache.write(layer, key_BTKH, value_BTKH)
            mixed_BTNH = attend_cached(query_BTNH, cache, layer, position_BT)
        return einsum("BTQ,QD->BTD", mixed_BTNH.reshape(B, T, -1), self.out_QD.get_value()), cache


def attend_cached(query_BTNH: jax.Array, cache: KVCache, layer: jax.Array, position_BT: jax.Array) -> jax.Array:
    """`attend` over one layer of a cache: the place where the way to do it is chosen, by shapes and kind of cache."""
    T, N = query_BTNH.shape[1:3]
    if isinstance(cache, TiledKVCache) and T * N <= MAX_QUERIES * cache.key_LBKSH.shape[2]:
        return cache.attend(layer, query_BTNH, position_BT)
    in_blocks = cache.loops and T >= BLOCK_QUERIES and cache.slots > SLOT_BLOCK and cache.slots % SLOT_BLOCK == 0
    return (attend_blocks if in_blocks else attend)(query_BTNH, *cache.read(layer), position_BT)


def attend(query_BTNH: jax.Array, key_BKSH: jax.Array, value_BKSH: jax.Array, position_BT: jax.Array) -> jax.Array:
    """Softmax attention of each query over slots `0..position`; returns [B, T, N, H] in the query's dtype.

    Scores and softmax in float32: exponentials of bfloat16 scores would be wrong by percents.
    """
    B, T, N, H = query_BTNH.shape
    K, S = key_BKSH.shape[1:3]
    query_BKGTH = _by_shared_head(query_BTNH, K)
    score_BKGTS = einsum("BKGTH,BKSH->BKGTS", query_BKGTH, key_BKSH.astype(query_BTNH.dtype), dtype=jnp.float32)
    visible_BTS = jnp.arange(S, dtype=jnp.int32) <= position_BT[:, :, None]
    score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS * H**-0.5, MASKED)
    weight_BKGTS = jax.nn.softmax(score_BKGTS, axis=-1).astype(query_BTNH.dtype)
    # Heads first, then moved: XLA on CPU has no bfloat16 product with its batch axes in another place.
    mixed_BKGTH = einsum("BKGTS,BKSH->BKGTH", weight_BKGTS, value_BKSH.astype(query_BTNH.dtype))
    return jnp.moveaxis(mixed_BKGTH, 3, 1).reshape(B, T, N, H)


def attend_blocks(
    query_BTNH: jax.Array, key_BKSH: jax.Array, value_BKSH: jax.Array, position_BT: jax.Array
) -> jax.Array:
    """`attend` over one block of slots after the other: scores of T x 256 at a time instead of T x S, for long prompts.

    The softmax is accumulated: a block's exponentials are relative to the largest score so far, and what came before is
    rescaled when that grows (Milakov & Gimelshein 2018, arXiv:1805.02867; FlashAttention, Dao et al. 2022). Blocks that
    no query sees are skipped.
    """
    B, T, N, H = query_BTNH.shape
    K, S = key_BKSH.shape[1:3]
    query_BKGTH = _by_shared_head(query_BTNH, K)
    last = jnp.max(position_BT)

    def one(carry, first):
        def see(carry):
            peak_BKGT1, total_BKGT1, mixed_BKGTH = carry
            take = lambda x_BKSH: jax.lax.dynamic_slice_in_dim(x_BKSH, first, SLOT_BLOCK, 2)  # noqa: E731
            key_BKsH, value_BKsH = (take(x).astype(query_BTNH.dtype) for x in (key_BKSH, value_BKSH))
            score_BKGTS = einsum("BKGTH,BKSH->BKGTS", query_BKGTH, key_BKsH, dtype=jnp.float32) * H**-0.5
            visible_BTS = first + jnp.arange(SLOT_BLOCK, dtype=jnp.int32) <= position_BT[:, :, None]
            score_BKGTS = jnp.where(visible_BTS[:, None, None], score_BKGTS, MASKED)
            new_peak_BKGT1 = jnp.maximum(peak_BKGT1, jnp.max(score_BKGTS, axis=-1, keepdims=True))
            weight_BKGTS = jnp.exp(score_BKGTS - new_peak_BKGT1)
            rescale_BKGT1 = jnp.exp(peak_BKGT1 - new_peak_BKGT1)
            total_BKGT1 = total_BKGT1 * rescale_BKGT1 + jnp.sum(weight_BKGTS, axis=-1, keepdims=True)
            part_BKGTH = einsum(
                "BKGTS,BKSH->BKGTH", weight_BKGTS.astype(query_BTNH.dtype), value_BKsH, dtype=jnp.float32
            )
            return new_peak_BKGT1, total_BKGT1, mixed_BKGTH * rescale_BKGT1 + part_BKGTH

        return jax.lax.cond(first <= last, see, lambda carry: carry, carry), None

    empty_BKGT1 = jnp.zeros((B, K, N // K, T, 1), jnp.float32)
    carry = (empty_BKGT1 + MASKED, empty_BKGT1, jnp.zeros((B, K, N // K, T, H), jnp.float32))
    (_, total_BKGT1, mixed_BKGTH), _ = jax.lax.scan(one, carry, jnp.arange(0, S, SLOT_BLOCK, dtype=jnp.int32))
    return jnp.moveaxis(mixed_BKGTH / total_BKGT1, 3, 1).reshape(B, T, N, H).astype(query_BTNH.dtype)


def _by_shared_head(query_BTNH: jax.Array, K: int) -> jax.Array:
    """Queries as [B, K, G, T, H]: moved before the product, not scores behind it, which XLA would gather one by one."""
    B, T, N, H = query_BTNH.shape
    return jnp.moveaxis(query_BTNH.reshape(B, T, K, N // K, H), 1, 3)


def attend_causal(query_BTNH: jax.Array, key_BKTH: jax.Array, value_BKTH: jax.Array) -> jax.Array:
    """`attend` for a sequence that starts at position 0 and attends only to itself, as in training.

    Queries go in at most 8 blocks (compile time stays bounded), each with just the keys that it can see: nearly half
    the scores are never computed, and those of a block stay in the processor's cache. Training on 2 CPU cores gained a
    quarter.
    """
    B, T = query_BTNH.shape[:2]
    position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    block = max(128, -(-T // 8))
    mixed = []
    for first in range(0, T, block):
        rows, seen = slice(first, first + block), slice(0, first + block)
        mixed.append(attend(query_BTNH[:, rows], key_BKTH[:, :, seen], value_BKTH[:, :, seen], position_BT[:, rows]))
    return jnp.concatenate(mixed, axis=1)


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config, *, key: jax.Array, dtype: jax.typing.DTypeLike):
        """Random projections."""
        keys = jax.random.split(key, 3)
        self.gate_DF = _random(keys[0], (config.width, config.ffn_width), dtype)
        self.up_DF = _random(keys[1], (config.width, config.ffn_width), dtype)
        self.down_FD = _random(keys[2], (config.ffn_width, config.width), dtype, config.num_layers)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        gate_BTF = einsum("BTD,DF->BTF", x_BTD, self.gate_DF.get_value())
        up_BTF = einsum("BTD,DF->BTF", x_BTD, self.up_DF.get_value())
        return einsum("BTF,FD->BTD", jax.nn.silu(gate_BTF) * up_BTF, self.down_FD.get_value())


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: Config, *, key: jax.Array, dtype: jax.typing.DTypeLike):
        """Random weights."""
        attention_key, ffn_key = jax.random.split(key)
        self.attention_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.attention = Attention(config, key=attention_key, dtype=dtype)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.ffn = FeedForward(config, key=ffn_key, dtype=dtype)

    def __call__(
        self, x_BTD: jax.Array, position_BT: jax.Array, cache: KVCache | None, layer: jax.Array
    ) -> tuple[jax.Array, KVCache | None]:
        """[B, T, D] and the cache -> the same."""
        mixed_BTD, cache = self.attention(self.attention_norm(x_BTD), position_BT, cache, layer)
        x_BTD = x_BTD + mixed_BTD
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)), cache


class Llama(nnx.Module):
    """The whole model. A pytree: weights are leaves, `config` is static.

    Attributes:
        config: the architecture.
        embed_VD: token embeddings.
        layers: one `Block` whose leaves carry a leading axis L.
        norm: final RMSNorm.
        head_VD: output embeddings, or None where they are tied to `embed_VD`.
    """

    def __init__(self, config: Config, *, key: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32):
        """Random weights from `key`: normal with standard deviation 0.02, layer outputs scaled by 1/sqrt(2L) (GPT-2).

        Wrap in `jax.eval_shape` for the abstract tree: shapes and dtypes, no memory (see `abstract_model`).
        """
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        self.config = config
        self.embed_VD = _random(embed_key, (config.vocab_size, config.width), dtype)
        self.layers = jax.vmap(lambda key: Block(config, key=key, dtype=dtype))(
            jax.random.split(layers_key, config.num_layers)
        )
        self.norm = RMSNorm(config.width, config.norm_eps, dtype)
        self.head_VD = None if config.tied_embeddings else _random(head_key, (config.vocab_size, config.width), dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Of the activations."""
        return self.norm.weight_D.dtype

    def __call__(
        self, tokens_BT: jax.Array, cache: KVCache | None = None, count_B: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Logits for every token given.

        Args:
            tokens_BT: int token ids in [0, V), padding included. Another id gives NaN logits, not another token's.
            cache: what came before; None for a sequence that starts here and is not continued.
            count_B: how many of the T tokens of each row are real, the rest being padding behind them; T unless given.
                The cache advances by it. Logits of padding mean nothing.

        Returns:
            logits_BTV in float32, and the cache with the tokens in it (None where none was given).

        Raises:
            ValueError: if T exceeds the cache's slots. A row whose `length + T` exceeds them, which is known only at
                run time, gets NaN logits from then on.
        """
        x_BTD, cache = self.trunk(tokens_BT, cache, count_B)
        return self.logits(x_BTD), cache

    def trunk(
        self, tokens_BT: jax.Array, cache: KVCache | None = None, count_B: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache | None]:
        """Everything below the head: `__call__`'s arguments -> normed hidden states [B, T, D] and the cache.

        On a mesh of Explicit axes hidden states are spread as the first axis of `tokens_BT`, the cache as it was.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        return on_auto_axes(
            Llama._trunk, lambda like: (like(tokens_BT, 1), jax.tree.map(like, cache)), self, tokens_BT, cache, count_B
        )

    def _trunk(
        self, tokens_BT: jax.Array, cache: KVCache | None, count_B: jax.Array | None
    ) -> tuple[jax.Array, KVCache | None]:
        B, T = tokens_BT.shape
        if cache is not None and T > cache.slots:
            raise ValueError(f"{T} tokens do not fit a cache of {cache.slots} slots: make the cache larger")
        start_B = jnp.zeros(B, jnp.int32) if cache is None else cache.length_B
        position_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)
        # An id outside the vocabulary gives NaN; a negative one would count from the end.
        inside_BT = jnp.where(tokens_BT < 0, self.config.vocab_size, tokens_BT)
        x_BTD = take_rows(self.embed_VD.get_value(), inside_BT).astype(self.dtype)

        def layer_step(carry, block, layer):
            x_BTD, cache = carry
            return block(x_BTD, position_BT, cache, layer)

        # The cache is carried, not scanned over: as scan input and output it would be copied at every call.
        x_BTD, cache = scan_layers(layer_step, (x_BTD, cache), self.layers)
        if cache is not None:
            # A row that did not fit wrote over its older tokens (XLA moves an update that sticks out): NaN, for good.
            fits_B = cache.length_B + T <= cache.slots
            x_BTD = jnp.where(fits_B[:, None, None], x_BTD, jnp.nan)
            cache = cache.advance(jnp.where(fits_B, T if count_B is None else count_B, cache.slots + 1))
        return self.norm(x_BTD), cache

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """The head: hidden states [..., D] -> float32 logits [..., V], spread as their first axis."""
        return on_auto_axes(Llama._logits, lambda like: like(x_BTD, 1), self, x_BTD)

    def _logits(self, x_BTD: jax.Array) -> jax.Array:
        head_VD = self.embed_VD if self.head_VD is None else self.head_VD
        return einsum("...D,VD->...V", x_BTD, head_VD.get_value(), dtype=jnp.float32)


def abstract_model(config: Config, dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
    """`Llama` with `jax.ShapeDtypeStruct` leaves: the one tree that loading, saving and planning work from."""
    return jax.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=dtype))


def _random(
    key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike, num_layers: int | None = None
) -> nnx.Param:
    """Normal weights, 0.02; with `num_layers`, less: what many layers add to the residual stream must not grow."""
    scale = 0.02 if num_layers is None else 0.02 / math.sqrt(2 * num_layers)
    return nnx.Param((jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype))
