"""The LLaMA model as data (`flax.nnx` modules are pytrees) with pure calls.

    model = Llama(config, key=jax.random.key(0))
    logits_BTV, cache = model(tokens_BT, cache)

A call mutates nothing, so `jax.jit`, `grad`, `vmap`, `eval_shape` take the model and its parts directly. A call is
`head(blocks(embed(tokens)))`. Layers are stacked and scanned: compile time does not grow with depth. Names contain
shapes; `config.py` explains the letters. `parameters.py` declares the weights; matrices are stored [in, out], so that
activations multiply from the left: `x_BTD @ w_DF`. The cache computes attention (`caches/`).

Reference implementations: meta-llama/llama (`model.py`) and transformers' `modeling_llama.py`; tests compare with the
second and with an independent float64 NumPy version.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llamajax.caches import NoCache, Scores, Where
from llamajax.config import Config, LayerKind
from llamajax.errors import LlamaJaxError
from llamajax.layer import NO_HOOKS, Hooks, Layer, check_shown, in_order, layers_of, varying
from llamajax.layer_weights import layer_specs, optional, params
from llamajax.meshes import on_auto_axes
from llamajax.norm import RMSNorm, rms_norm
from llamajax.parameters import (
    KINDS,
    Kind,
    Stack,
    begin,
    locate,
    named_weights,
    names_in_tree_order,
    whole_specs,
)
from llamajax.rope import apply_rope, rope_attention_factor, rope_frequencies
from quant import is_weight, product, rows, scan_layers, schemes, view, with_layer

NO_CACHE = NoCache()


def matmul(x: jax.Array, weight: nnx.Param, bias: nnx.Param | None = None) -> jax.Array:
    """Multiplies activations with a weight [in, out], quantized or not, and adds a bias, in the activations' dtype."""
    made = product(x, weight.get_value())
    return made if bias is None else made + bias[...].astype(made.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): G query heads share one K/V head."""

    query_bias_Q: nnx.Param | None
    key_bias_M: nnx.Param | None
    value_bias_M: nnx.Param | None
    out_bias_D: nnx.Param | None
    query_norm_H: nnx.Param | None
    key_norm_H: nnx.Param | None
    query_norm_Q: nnx.Param | None
    key_norm_M: nnx.Param | None
    sinks_N: nnx.Param | None
    sub_norm_Q: nnx.Param | None

    def __init__(self, config: Config, *, kind: LayerKind, key: jax.Array, dtype: jax.typing.DTypeLike):
        """Random projections; N*H and K*H are stored as one axis each."""
        self.config, self.kind = config, kind
        names = ("query_DQ", "key_DM", "value_DM", "out_QD")
        self.query_DQ, self.key_DM, self.value_DM, self.out_QD = params("attention", names, config, key, dtype)
        optional(self, "attention", config, dtype)

    def __call__(self, x_BTD: jax.Array, where: Where, cache: Any, at: Layer) -> tuple[jax.Array, Any]:
        """Attends over the new tokens and over this layer's keys and values in the cache."""
        c, (B, T, _) = self.config, x_BTD.shape
        query_BTQ = matmul(x_BTD, self.query_DQ, self.query_bias_Q)
        key_BTM = matmul(x_BTD, self.key_DM, self.key_bias_M)
        value_BTM = matmul(x_BTD, self.value_DM, self.value_bias_M)
        if c.query_key_norm == "width":
            query_BTQ, key_BTM = self._normed(query_BTQ, self.query_norm_Q), self._normed(key_BTM, self.key_norm_M)
        query_BTNH = query_BTQ.reshape(B, T, c.num_heads, c.head_size)
        key_BTKH = key_BTM.reshape(B, T, c.num_kv_heads, c.head_size)
        if c.query_key_norm == "head":
            query_BTNH, key_BTKH = self._normed(query_BTNH, self.query_norm_H), self._normed(key_BTKH, self.key_norm_H)
        query_BTNH, key_BTKH = self._turned(query_BTNH, key_BTKH, where)
        value_BTKH = value_BTM.reshape(key_BTKH.shape)
        mixed_BTNH, cache = at.attend(cache, query_BTNH, key_BTKH, value_BTKH, where, self._scores())
        mixed_BTQ = mixed_BTNH.reshape(B, T, -1)
        if c.sub_norms:
            mixed_BTQ = self._normed(mixed_BTQ, self.sub_norm_Q)
        return matmul(mixed_BTQ, self.out_QD, self.out_bias_D), cache

    def _normed(self, x: jax.Array, weight: nnx.Param | None) -> jax.Array:
        return rms_norm(x, self.config.norm_eps, None if weight is None else weight[...], self.config.norm_offset)

    def _turned(self, query_BTNH: jax.Array, key_BTKH: jax.Array, where: Where) -> tuple[jax.Array, jax.Array]:
        """Returns scaled queries and keys, both rotated by their positions."""
        c, rope = self.config, self.config.rope(self.kind)
        scale: jax.Array | float = c.score_scale
        if c.query_temperature is not None and (self.kind == "nope" or not c.query_temperature.only_nope):
            scale = scale * c.query_temperature.factor(where.position_BT)[:, :, None, None]
        after = c.query_key_norm == "l2" and rope is not None  # Llama 4's, of layers with RoPE
        if rope is not None:
            frequency = rope_frequencies(rope, c.rotated_size, where.reach)
            factor = rope_attention_factor(rope)
            query_scale = None if after else scale
            query_BTNH = apply_rope(query_BTNH, where.position_BT, frequency, query_scale, factor)
            key_BTKH = apply_rope(key_BTKH, where.position_BT, frequency, factor=factor)
        if after:
            query_BTNH, key_BTKH = self._normed(query_BTNH, None), self._normed(key_BTKH, None)
        if after or rope is None:
            query_BTNH = (query_BTNH.astype(jnp.float32) * scale).astype(query_BTNH.dtype)
        return query_BTNH, key_BTKH

    def _scores(self) -> Scores | None:
        """Returns the settings of attention scores; None if they are a LLaMA's."""
        c = self.config
        window = c.window if self.kind == "window" else None
        chunk = c.chunk if self.kind == "chunk" else None
        sinks_N = None if self.sinks_N is None else self.sinks_N[...]
        if window is None and chunk is None and c.score_cap is None and sinks_N is None:
            return None
        return Scores(window=window, chunk=chunk, soft_cap=c.score_cap, sinks_N=sinks_N)


# Activations of the gate: SiLU (Shazeer 2020, arXiv:2002.05202), GELU by tanh (Hendrycks & Gimpel 2016,
# arXiv:1606.08415), and the square of ReLU (So et al. 2021, arXiv:2109.08668).
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu_squared": lambda x: jax.nn.relu(x) * jax.nn.relu(x),  # some runtimes lack the operation `square`
}


class FeedForward(nnx.Module):
    """A gated feed-forward network (Shazeer 2020, arXiv:2002.05202): down(activation(gate(x)) * up(x))."""

    gate_bias_F: nnx.Param | None
    up_bias_F: nnx.Param | None
    down_bias_D: nnx.Param | None
    sub_norm_F: nnx.Param | None

    def __init__(self, config: Config, *, key: jax.Array, dtype: jax.typing.DTypeLike):
        """Random projections."""
        self.config = config
        self.gate_DF, self.up_DF, self.down_FD = params("ffn", ("gate_DF", "up_DF", "down_FD"), config, key, dtype)
        optional(self, "ffn", config, dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c = self.config
        gate_BTF = _ACTIVATIONS[c.activation](matmul(x_BTD, self.gate_DF, self.gate_bias_F))
        wide_BTF = gate_BTF * matmul(x_BTD, self.up_DF, self.up_bias_F)
        if self.sub_norm_F is not None:
            wide_BTF = rms_norm(wide_BTF, c.norm_eps, self.sub_norm_F[...], c.norm_offset)
        return matmul(wide_BTF, self.down_FD, self.down_bias_D)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each between its norms and added to the residual stream."""

    def __init__(self, config: Config, *, kind: LayerKind = "full", key: jax.Array, dtype: jax.typing.DTypeLike):
        """Random weights."""
        attention_key, ffn_key = jax.random.split(key)
        norm = functools.partial(RMSNorm, config.width, config.norm_eps, dtype, config.norm_offset)
        before, after = config.norms != "after", config.norms != "before"
        self.residual_scale = config.residual_scale
        self.attention_norm = norm() if before else None
        self.attention = Attention(config, kind=kind, key=attention_key, dtype=dtype)
        self.attention_after_norm = norm() if after else None
        self.ffn_norm = norm() if before else None
        self.ffn = FeedForward(config, key=ffn_key, dtype=dtype)
        self.ffn_after_norm = norm() if after else None

    def __call__(self, x_BTD: jax.Array, where: Where, cache: Any, at: Layer) -> tuple[jax.Array, Any]:
        """[B, T, D] and the cache -> the same."""
        mixed_BTD, cache = self.attention(_maybe(self.attention_norm, x_BTD), where, cache, at)
        x_BTD = x_BTD + at.see("attention_out", self._out(self.attention_after_norm, mixed_BTD))
        ffn_BTD = self.ffn(_maybe(self.ffn_norm, x_BTD))
        return x_BTD + at.see("ffn_out", self._out(self.ffn_after_norm, ffn_BTD)), cache

    def _out(self, norm: RMSNorm | None, x_BTD: jax.Array) -> jax.Array:
        """Returns what attention or feed-forward adds to the residual stream."""
        x_BTD = _maybe(norm, x_BTD)
        return x_BTD if self.residual_scale == 1 else x_BTD * jnp.asarray(self.residual_scale, x_BTD.dtype)


def _maybe(norm: RMSNorm | None, x_BTD: jax.Array) -> jax.Array:
    return x_BTD if norm is None else norm(x_BTD)


# The kind of the cache's part for each kind of layer.
_CACHES: Mapping[LayerKind, str] = {"full": "full", "window": "window", "chunk": "chunk", "nope": "full"}
for _kind, _cache in _CACHES.items():
    KINDS[_kind] = Kind(functools.partial(Block, kind=_kind), layer_specs, _cache)


class Llama(nnx.Module):
    """The whole model. A pytree: weights are leaves, `config` and `plan` are static.

    Attributes:
        config: the architecture.
        plan: the stacks of its layers; `config.stacks`, except for programs without loops.
        embed_VD: token embeddings.
        stacks: for each stack of the plan a tuple of P blocks whose leaves carry a leading axis R.
        norm: final RMSNorm.
        head_VD: output embeddings, or None if they are tied to `embed_VD`.
    """

    def __init__(
        self,
        config: Config,
        *,
        key: jax.Array,
        dtype: jax.typing.DTypeLike = jnp.float32,
        plan: tuple[Stack, ...] | None = None,
    ):
        """Random weights from `key`: normal with standard deviation 0.02, layer outputs scaled by 1/sqrt(2L) (GPT-2).

        Wrap in `jax.eval_shape` for the abstract tree: shapes and dtypes, no memory (see `abstract_model`).
        """
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        key_L = jax.random.split(layers_key, config.num_layers)
        whole = whole_specs(config)
        self.config = config
        self.plan = plan or config.stacks
        self.embed_VD = nnx.Param(begin(whole["embed_VD"], config, embed_key, dtype))
        stacks = []
        for stack in self.plan:
            made = []
            for position, kind in enumerate(stack.pattern):
                block = functools.partial(KINDS[kind].block, config, dtype=dtype)
                made.append(
                    jax.vmap(lambda key, block=block: block(key=key))(key_L[np.asarray(stack.layers(position))])
                )
            stacks.append(tuple(made))
        self.stacks = nnx.data(tuple(stacks))
        self.norm = RMSNorm(config.width, config.norm_eps, dtype, config.norm_offset)
        head = whole.get("head_VD")
        self.head_VD = None if head is None else nnx.Param(begin(head, config, head_key, dtype))

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the activations."""
        return self.norm.weight_D.dtype

    def __call__(
        self, tokens_BT: jax.Array, cache: Any = NO_CACHE, count_B: jax.Array | None = None, **options: Any
    ) -> Any:
        """Returns the logits after each given token.

        Args:
            tokens_BT: int token ids in [0, V), including padding. An id outside this range gives NaN logits.
            cache: earlier tokens; `NoCache()` for a sequence that starts here and is not continued.
            count_B: the number of real tokens of each row, which precede padding; T by default. The cache advances by
                it. Logits of padding are undefined.
            **options: capture, hooks and remat, as in `blocks`.

        Returns:
            logits_BTV in float32, and the cache with the tokens in it; with `capture` also the captured values.

        Raises:
            ValueError: if T exceeds the cache's slots. A row whose `length + T` exceeds them, which is known only at
                run time, gets NaN logits from then on.
        """
        x_BTD, *rest = self.blocks(self.embed(jnp.asarray(tokens_BT)), cache, count_B, **options)
        return (self.head(x_BTD), *rest)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Tokens -> the residual stream before the first layer, [B, T, D]; NaN for an id outside the vocabulary."""
        return on_auto_axes(Llama._embed, lambda like: like(tokens_BT, 1), self, tokens_BT)

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        # A negative id would count from the end.
        inside_BT = jnp.where(tokens_BT < 0, self.config.vocab_size, tokens_BT)
        x_BTD = rows(self.embed_VD.get_value(), inside_BT).astype(self.dtype)
        scale = self.config.embedding_scale
        return x_BTD if scale == 1 else x_BTD * jnp.asarray(scale, self.dtype)

    def blocks(
        self,
        x_BTD: jax.Array,
        cache: Any = NO_CACHE,
        count_B: jax.Array | None = None,
        *,
        capture: tuple[str, ...] = (),
        hooks: Hooks = NO_HOOKS,
        remat: Literal["layer"] | None = None,
    ) -> Any:
        """All layers: the residual stream before the first -> after the last, [B, T, D], and the cache.

        On a mesh of Explicit axes it is sharded like the first axis of `x_BTD`, and the cache keeps its sharding.

        Args:
            x_BTD: the result of `embed`.
            cache: as in `__call__`.
            count_B: as in `__call__`.
            capture: names of values to return as well: "hidden", the residual stream after each layer [L, B, T, D];
                "attention", its weights [L, B, N, T, S]; "attention_out" and "ffn_out", which a layer adds to it.
            hooks: the replacement of such a value, by (name, number of the layer): an array that broadcasts to it, or a
                function of it. Arrays may be arguments of the compiled function.
            remat: "layer" computes each layer again in the backward pass, instead of keeping its activations
                (`jax.checkpoint`; Chen et al. 2016, arXiv:1604.06174).

        Returns:
            x_BTD and the cache; with `capture` also the captured values, by name.

        Raises:
            LlamaJaxError: for a name or a layer that does not exist, or another `remat`.
        """
        if remat not in (None, "layer"):
            raise LlamaJaxError(f"remat is {remat!r}: expected None or 'layer'")
        function = functools.partial(Llama._blocks, capture=capture, remat=remat)

        def out(like: Callable[..., Any]) -> Any:
            captured = ({name: like(x_BTD, 0) for name in capture},) if capture else ()
            return (like(x_BTD, 1), jax.tree.map(like, cache), *captured)

        return on_auto_axes(function, out, self, x_BTD, cache, count_B, dict(hooks))

    def _blocks(
        self, x_BTD: jax.Array, cache: Any, count_B: Any, hooks: Hooks, capture: tuple[str, ...], remat: str | None
    ) -> Any:
        where = cache.begin(x_BTD.shape[1], count_B)
        kept: list[Any] = []
        shown: list[set[str]] = []
        # The cache is carried, not scanned over: as scan input and output it would be copied at every call.
        carry = (x_BTD, cache)
        for stack, blocks in zip(self.plan, self.stacks, strict=True):
            ats = [layers_of(self.config, stack, position) for position in range(len(stack.pattern))]

            def step(carry, blocks, index, numbers, ats=ats):
                (x_BTD, cache), kept = carry, []
                for block, at, of_layer in zip(blocks, ats, numbers, strict=True):
                    layer = at(index, of_layer, capture, hooks)
                    x_BTD, cache = block(x_BTD, where, cache, layer)
                    x_BTD = layer.see("hidden", x_BTD)
                    kept.append(layer.kept)
                    shown.append(layer.shown)
                return (x_BTD, cache), kept

            numbers = [varying(self.config, stack, position) for position in range(len(stack.pattern))]
            carry, kept_here = scan_layers(jax.checkpoint(step) if remat else step, carry, blocks, numbers)
            kept.append(kept_here)
        check_shown(shown, capture, hooks, self.config.num_layers)
        x_BTD, cache = carry
        # A row that did not fit overwrote its older tokens, because XLA moves updates that exceed the array. Its values
        # are NaN from now on.
        x_BTD, cache = where.checked(x_BTD), cache.end(where)
        return (x_BTD, cache, {name: in_order(kept, name) for name in capture}) if capture else (x_BTD, cache)

    def head(self, x_BTD: jax.Array) -> jax.Array:
        """The final norm and the head: [..., D] -> float32 logits [..., V], sharded by their first axis."""
        return on_auto_axes(Llama._head, lambda like: like(x_BTD, 1), self, x_BTD)

    def _head(self, x_BTD: jax.Array) -> jax.Array:
        head_VD = self.embed_VD if self.head_VD is None else self.head_VD
        logits_BTV = product(self.norm(x_BTD), head_VD.get_value(), axis=-1, dtype=jnp.float32)
        c = self.config
        if c.logit_scale != 1:
            logits_BTV = logits_BTV * c.logit_scale
        return logits_BTV if c.logit_cap is None else c.logit_cap * jnp.tanh(logits_BTV / c.logit_cap)

    def layer(self, number: int) -> Any:
        """Returns one layer, a `Block`, which is called as `block(x_BTD, where, cache, Layer(number))`.

        Weights in a backend's layout stay in their stack, and the layer is a view of it.
        """
        blocks, position, place = self._at(number)
        at = jnp.asarray(place, jnp.int32)
        return jax.tree.map(lambda weight: view(weight, at), blocks[position], is_leaf=is_weight)

    def with_layer(self, number: int, block: Any) -> "Llama":
        """Returns the same model with one layer replaced; weights of another type make mixed stacks (`quant.Mixed`).

        Raises:
            LlamaJaxError: for a layer that does not exist, or a block of another kind or another config.
        """
        blocks, position, place = self._at(number)
        structures: list[Any] = [jax.tree.structure(each, is_leaf=is_weight) for each in (blocks[position], block)]
        if structures[0] != structures[1]:
            raise LlamaJaxError(
                f"layer {number}: a {type(block).__name__} of another config, or of other weights: expected a "
                f"{type(blocks[position]).__name__} of a model with {self.config}"
            )
        changed = jax.tree.map(
            lambda weight, layer: with_layer(weight, place, layer), blocks[position], block, is_leaf=is_weight
        )
        model = jax.tree.map(lambda weight: weight, self, is_leaf=is_weight)
        stacks = [
            blocks if each is not blocks else (*blocks[:position], changed, *blocks[position + 1 :])
            for each in self.stacks
        ]
        model.stacks = nnx.data(tuple(stacks))
        return model

    def _at(self, number: int) -> tuple[Any, int, int]:
        """Returns the blocks of a layer's stack, its position in the pattern and its place along the stack."""
        stack, position, place = locate(self.plan, number)
        return self.stacks[self.plan.index(stack)], position, place

    def __repr__(self) -> str:
        """Returns a line for each weight: its name, shape, and dtype or quantization scheme."""
        named = named_weights(self)
        lines = [f"  {name:34} {_shown(weight)}" for name, weight in named.items()]
        return "\n".join(
            [f"Llama of {self.config.num_parameters:,} weights in {self.config.num_layers} layers", *lines]
        )


Llama.__str__ = Llama.__repr__  # type: ignore[method-assign, assignment]


def _shown(weight: Any) -> str:
    """Describes a leaf, which may be of any type in a pytree shaped like a model."""
    shape = getattr(weight, "shape", None)
    return repr(weight) if shape is None else f"{' x '.join(map(str, shape)):20} {', '.join(schemes(weight))}"


def abstract_model(
    config: Config, dtype: jax.typing.DTypeLike = jnp.float32, plan: tuple[Stack, ...] | None = None
) -> Any:
    """`Llama` with `jax.ShapeDtypeStruct` leaves: the tree that loading, saving and planning work from."""
    return jax.eval_shape(lambda: Llama(config, key=jax.random.key(0), dtype=dtype, plan=plan))


def model_from(weights: Mapping[str, Any], config: Config, plan: tuple[Stack, ...] | None = None) -> Any:
    """Builds a model from its `named_weights`, in any order: arrays, weights, or placeholders for them."""
    structure, names = _tree(config, plan)
    return jax.tree.unflatten(structure, [weights[name] for name in names])


@functools.lru_cache(maxsize=16)
def _tree(config: Config, plan: tuple[Stack, ...] | None) -> tuple[Any, tuple[str, ...]]:
    """Returns the tree structure of a model, and the names of its weights in the order of its leaves."""
    abstract = abstract_model(config, plan=plan)
    return jax.tree.structure(abstract), tuple(names_in_tree_order(abstract))
