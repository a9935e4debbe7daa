"""The functions of a bundle's programs: their inputs and outputs, and the model's calls in them.

The calls are those that generation uses (`Llama.blocks`, `Llama.head`, `sample`).
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from export.profiles import Profile, Spec
from export.weights import assemble
from llamajax import Config, KVCache, Llama, Sampler, sample

# A program before it is lowered: its name, a function of a model and inputs, these inputs by name, the names of its
# results, and whether it takes a model (otherwise it gets None).
Function = tuple[str, Callable[..., tuple], dict[str, jax.ShapeDtypeStruct], tuple[str, ...], bool]


def empty_state(config: Config, spec: Spec, sizes: Mapping[str, Any] = types.MappingProxyType({})) -> KVCache:
    """The abstract cache of programs of `spec`: the arrays of its `KVCache.state` are inputs and outputs."""
    # Symbolic sizes cannot decide branches: they need the straight layout, whatever the profile.
    layout = "dense" if spec.profile.layers == "scanned" and not sizes else "straight"
    batch, slots = sizes.get("B", spec.batch), sizes.get("S", spec.slots)
    empty = functools.partial(KVCache.empty, config, dtype=spec.cache_dtype, layout=layout, reach=spec.slots)
    return jax.eval_shape(lambda: empty(batch=batch, slots=slots))


def functions(model: Llama, spec: Spec, sizes: Mapping[str, Any] = types.MappingProxyType({})) -> list[Function]:
    """Every program of `spec` as a function of (model, *inputs), with the shapes of its inputs.

    Args:
        model: the model; only its config is used.
        spec: the programs to make.
        sizes: replacements of the spec's "B", "S" and "T", such as symbolic ones; with "T" prefill is one program.
    """
    B = sizes.get("B", spec.batch)
    config = model.config
    int32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    cache = empty_state(config, spec, sizes)
    state = cache.state
    prefill, decode, verify = (functools.partial(function, cache) for function in (_prefill, _decode, _verify))
    made: list[Function] = []

    def add(name: str, function: Callable[..., tuple], inputs: dict[str, Any], results: tuple[str, ...], weights=True):
        made.append((name, function, inputs, results, weights))

    for name, T in {"prefill": sizes["T"]}.items() if "T" in sizes else ((f"prefill_{T}", T) for T in spec.buckets):
        inputs = {"tokens": int32((B, T)), "count": int32((B,)), "length": int32((B,)), **state}
        add(name, prefill, inputs, ("logits", *state))
    add("decode", decode, {"token": int32((B,)), "length": int32((B,)), **state}, ("logits", *state))
    T = spec.buckets[-1]
    text = {"tokens": int32((B, T)), "count": int32((B,))}
    if "verify" in spec.programs:
        inputs = {"tokens": int32((B, spec.drafts + 1)), "length": int32((B,)), **state}
        add("verify", verify, inputs, ("logits", *state))
    if "score" in spec.programs:
        add("score", _score, text, ("log_probability",))
    if "embed" in spec.programs:
        add("embed", _embed, text, ("embedding",))
    if "sample" in spec.programs:
        floats = {name: jax.ShapeDtypeStruct((B,), jnp.float32) for name in ("temperature", "top_p")}
        inputs = {
            "logits": jax.ShapeDtypeStruct((B, config.vocab_size), jnp.float32),
            "key": jax.ShapeDtypeStruct((B, 2), jnp.uint32),
            "length": int32((B,)),
            **floats,
            "top_k": int32((B,)),
        }
        add("sample", _sample, inputs, ("token", "log_probability"), False)
    return made


def _prefill(empty: KVCache, model: Llama, tokens_BT, count_B, length_B, *state):
    """Adds the first `count` of each row's T tokens after its `length` ones; returns the logits of the last."""
    x_BTD, cache = model.blocks(model.embed(tokens_BT), empty.with_state(state, length_B), count_B)
    is_last_BT1 = (jnp.arange(tokens_BT.shape[1]) == count_B[:, None] - 1)[:, :, None]
    # A sum in which all terms but one are zero, because an index for each row would be a gather.
    last_BD = jnp.sum(jnp.where(is_last_BT1, x_BTD, 0), axis=1)
    is_valid_B = _fits(length_B, tokens_BT, empty) & _is_count(count_B, tokens_BT)
    return (_or_nan(is_valid_B, model.head(last_BD)), *cache.state.values())


def _decode(empty: KVCache, model: Llama, token_B, length_B, *state):
    """Adds one token to each row; returns the logits after it."""
    logits_BTV, cache = model(token_B[:, None], empty.with_state(state, length_B))
    return (_or_nan(_fits(length_B, token_B[:, None], empty), logits_BTV[:, 0]), *cache.state.values())


def _verify(empty: KVCache, model: Llama, tokens_BT, length_B, *state):
    """The logits after the newest token and k drafted ones. The caller advances `length` by the accepted ones."""
    logits_BTV, cache = model(tokens_BT, empty.with_state(state, length_B))
    return (_or_nan(_fits(length_B, tokens_BT, empty), logits_BTV), *cache.state.values())


def _score(model: Llama, tokens_BT, count_B):
    """Log probability of each token given those before it; 0 for the first, which has none, and for padding."""
    logits_BTV, _ = model(tokens_BT)
    log_probability_BTV = jax.nn.log_softmax(logits_BTV[:, :-1], axis=-1)
    is_next_BTV = jnp.arange(logits_BTV.shape[-1]) == tokens_BT[:, 1:, None]
    next_BT = jnp.sum(jnp.where(is_next_BTV, log_probability_BTV, 0), axis=-1)
    next_BT = jnp.where(jnp.arange(1, tokens_BT.shape[1]) < count_B[:, None], next_BT, 0)
    return (_or_nan(_is_count(count_B, tokens_BT), jnp.pad(next_BT, ((0, 0), (1, 0)))),)


def _embed(model: Llama, tokens_BT, count_B):
    """The mean of a text's last hidden states, after the final norm."""
    hidden_BTD = model.norm(model.blocks(model.embed(tokens_BT))[0])
    is_text_BT1 = (jnp.arange(tokens_BT.shape[1]) < count_B[:, None])[:, :, None]
    sum_BD = jnp.sum(jnp.where(is_text_BT1, hidden_BTD.astype(jnp.float32), 0), axis=1)
    return (_or_nan(_is_count(count_B, tokens_BT), sum_BD / jnp.maximum(count_B, 1).astype(jnp.float32)[:, None]),)


def _sample(_: None, logits_BV, key_B2, length_B, temperature_B, top_p_B, top_k_B):
    """Chooses a token as `generate` does: `key` is a row's PRNG key, `length` the number of tokens in its cache."""
    key_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(key_B2, impl="threefry2x32"), length_B)
    sampler = Sampler(temperature=temperature_B, top_k=top_k_B, top_p=top_p_B)
    return sample(logits_BV, key_B, sampler, narrows=False)


def _fits(length_B, tokens_BT, empty: KVCache):
    """Whether T tokens fit the cache after `length`; if not, XLA overwrites other tokens. No sum here overflows."""
    fits_B = length_B >= 0
    return fits_B if empty.slots is None else fits_B & (length_B <= empty.slots - tokens_BT.shape[1])


def _is_count(count_B, tokens_BT):
    """Whether a count of real tokens is from 1 to T."""
    return (count_B >= 1) & (count_B <= tokens_BT.shape[1])


def _or_nan(is_valid_B, x_BX):
    """The array, with NaN in rows whose arguments are invalid, because a program cannot raise an error."""
    return jnp.where(is_valid_B.reshape(-1, *[1] * (x_BX.ndim - 1)), x_BX, jnp.nan)


def bound(function: Callable[..., tuple], names: tuple[str, ...] | None, like: Llama, profile: Profile):
    """Turns a function of (model, *inputs) into one of flat arrays: the weights of these names, then the inputs."""

    def flat(*arrays):
        if names is None:
            return function(None, *arrays)
        model = assemble(dict(zip(names, arrays, strict=False)), like, profile)
        return function(model, *arrays[len(names) :])

    return flat
