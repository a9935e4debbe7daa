"""How much a change of each weight costs in KL divergence: the diagonal of the Fisher information, layer by layer.

The divergence of a changed model from the model itself is, to second order, half the square of the change under the
Fisher information: KL = 1/2 d' F d. F is the mean of g g' for gradients g of -log p of tokens that the model itself
draws (Martens 2014, arXiv:1412.1193), so no true next token enters. Of F only the diagonal is kept, and of each
position's gradient x g' of a weight only the product of squares: `fisher_KM` is the mean over tokens of x_k^2 g_m^2.
Rounding errors of different weights have independent signs, for which the diagonal is what counts.

One forward and one backward pass over the text, with the weights of one layer in memory; the residual stream before each
layer is kept on the host, in bfloat16. Dimension key as in `config.py`; `K` is the contraction axis of any weight, `M` its
outputs.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llamajax.config import Config
from llamajax.model import Llama, model_from
from llamajax.parameters import Place, block_weights, leaves, specs
from llamajax.quantization import calibrate
from quant import Probe, values

# Tokens whose gradients are in memory together: of a layer, inputs and outputs of all its weights.
_BATCH_TOKENS = 1024
# Of the head: logits of a large vocabulary, and their gradient.
_HEAD_TOKENS = 512

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class LayerGradients(NamedTuple):
    """What the backward pass saw of one layer.

    Attributes:
        layer: its number.
        weights: the layer's weights as arrays, float32, by name.
        fisher: of each matrix, float32 [K, M], a token's mean.
        energy: of each matrix, float32 [W, T]: the squared length of the gradient of what it gives.
    """

    layer: int
    weights: Mapping[str, jax.Array]
    fisher: Mapping[str, jax.Array]
    energy: Mapping[str, np.ndarray]


class WholeGradients(NamedTuple):
    """The same of the weights outside of layers.

    Attributes:
        embed_fisher_VD: of the table by which tokens are looked up, and, where it is tied, of the head that it is.
        head_fisher_VD: of a head of its own, or None.
        hessian_DD: of the head's inputs, weighted by the gradient's squared length.
    """

    embed_fisher_VD: jax.Array
    head_fisher_VD: jax.Array | None
    hessian_DD: jax.Array


def gradients(
    read: Callable[[Place], Any],
    config: Config,
    windows_WT: np.ndarray,
    *,
    seed: int = 0,
    on_layers: Callable[[int], None] = lambda count: None,
) -> Iterator[LayerGradients | WholeGradients]:
    """The Fisher information of every matrix: the layers' from the last to the first, then what is outside of them.

    Args:
        read: one weight at a time.
        config: the architecture.
        windows_WT: text, whose tokens the model's own draws take the place of as targets.
        seed: of these draws.
        on_layers: called with how many layers more have been passed, forward and backward.
    """
    outside = [place for place in specs(config) if place.layer is None]
    whole = {place.name: values(read(place)) for place in outside}
    x_WTD = np.concatenate([_embedded(whole, windows_WT[rows], config) for rows in _rows(windows_WT.shape, _BATCH_TOKENS)])
    kept = []
    for layer in range(config.num_layers):
        kept.append(x_WTD.astype(ml_dtypes.bfloat16))
        block = calibrate.block_of(_dense(read, config, layer), config, layer)
        x_WTD = calibrate.advance(block, x_WTD, config.numbers(layer))
        on_layers(1)
    g_WTD, head_fisher_VD, hessian_DD = _through_head(whole, config, x_WTD, seed)
    for layer in reversed(range(config.num_layers)):
        weights = _dense(read, config, layer)
        g_WTD, fisher, energy = _through_layer(weights, kept.pop(), g_WTD, config, layer)
        yield LayerGradients(layer, weights, fisher, energy)
        on_layers(1)
    embed_fisher_VD = _table_fisher(windows_WT, g_WTD, whole["embed_VD"].shape) * config.embedding_scale**2
    if config.tied_embeddings:
        yield WholeGradients(embed_fisher_VD + head_fisher_VD, None, hessian_DD)
    else:
        yield WholeGradients(embed_fisher_VD, head_fisher_VD, hessian_DD)


def _dense(read: Callable[[Place], Any], config: Config, layer: int) -> dict[str, jax.Array]:
    """The weights of a layer, float32."""
    return {place.name: values(read(place)) for place in specs(config) if place.layer == layer}


@functools.partial(jax.jit, static_argnames="config")
def _embedded(whole: Mapping[str, Any], tokens_BT: jax.Array, config: Config) -> jax.Array:
    return Llama.embed(_model(whole, config), tokens_BT).astype(jnp.float32)


def _rows(shape: tuple[int, ...], most_tokens: int) -> Iterator[slice]:
    """Slices of windows, all of one length, of about so many tokens."""
    count, length = shape[:2]
    most = max(1, most_tokens // length)
    size = max(size for size in range(1, min(most, count) + 1) if count % size == 0)
    return (slice(first, first + size) for first in range(0, count, size))


# ---- The head --------------------------------------------------------------------------------------------------------


def _through_head(
    whole: Mapping[str, Any], config: Config, x_WTD: np.ndarray, seed: int
) -> tuple[np.ndarray, jax.Array, jax.Array]:
    """The gradient behind the last layer [W, T, D], the head's Fisher information, and the Hessian of its inputs."""
    g_WTD, total, key = np.empty_like(x_WTD), None, jax.random.key(seed)
    for number, rows in enumerate(_rows(x_WTD.shape, _HEAD_TOKENS)):
        one = jax.random.fold_in(key, number)
        g_WTD[rows], total = _head_gradient(whole, jnp.asarray(x_WTD[rows]), one, total, config)
    assert total is not None  # there is at least one window
    tokens, energy, hessian_DD, fisher_VD = total
    return g_WTD, fisher_VD / tokens, hessian_DD / energy


@functools.partial(jax.jit, static_argnames="config", donate_argnames="total")
def _head_gradient(
    whole: Mapping[str, Any], x_BTD: jax.Array, key: jax.Array, total: Any, config: Config
) -> tuple[jax.Array, Any]:
    """The gradient of -log p of drawn tokens before the final norm; and sums with a batch more: `_head_sums`."""
    name = "head_VD" if "head_VD" in whole else "embed_VD"

    def logits(x_BTD: jax.Array, added_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen: dict[str, jax.Array] = {}
        probe = Probe(whole[name], name, seen, added_BTV)
        return Llama.head(_model(whole | {name: probe}, config), x_BTD), seen[name]

    zeros_BTV = jnp.zeros((*x_BTD.shape[:2], config.vocab_size), jnp.float32)
    logits_BTV, back, seen_BTD = jax.vjp(logits, x_BTD, zeros_BTV, has_aux=True)
    drawn_BT = jax.random.categorical(key, logits_BTV)
    g_BTD, g_BTV = back(jax.nn.softmax(logits_BTV) - jax.nn.one_hot(drawn_BT, config.vocab_size, dtype=jnp.float32))
    return g_BTD, _head_sums(total, _flat(seen_BTD), _flat(g_BTV))


def _head_sums(total: Any, x_TD: jax.Array, g_TV: jax.Array) -> Any:
    """Number of tokens, energy, sum of x x' by energy, and of the squares' products, with some tokens more."""
    energy_T = jnp.sum(g_TV**2, -1)
    sums = (
        jnp.float32(len(x_TD)),
        energy_T.sum(),
        _matmul(x_TD.T * energy_T, x_TD),
        _matmul((g_TV**2).T, x_TD**2),
    )
    return sums if total is None else jax.tree.map(jnp.add, total, sums)


def _model(whole: Mapping[str, Any], config: Config) -> Any:
    """A model of the weights outside of its layers."""
    return model_from(dict.fromkeys(leaves(config)) | dict(whole), config)


def _flat(x: jax.Array) -> jax.Array:
    """[B, T, n] -> float32 [B * T, n]."""
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


# ---- Layers ----------------------------------------------------------------------------------------------------------


def _through_layer(
    weights: Mapping[str, jax.Array], x_WTD: np.ndarray, g_WTD: np.ndarray, config: Config, layer: int
) -> tuple[np.ndarray, dict[str, jax.Array], dict[str, np.ndarray]]:
    """The gradient before a layer, in place of that behind it; Fisher information and energies of its matrices."""
    matrices = tuple(place.name for place, spec in specs(config).items() if place.layer == layer and spec.is_matrix)
    block = calibrate.block_of(weights, config, layer)
    numbers = dict(config.numbers(layer))
    energy = {name: np.empty(x_WTD.shape[:2], np.float32) for name in matrices}
    total = None
    for rows in _rows(x_WTD.shape, _BATCH_TOKENS):
        x_BTD, g_BTD = jnp.asarray(x_WTD[rows], jnp.float32), jnp.asarray(g_WTD[rows])
        g_WTD[rows], part, total = _layer_gradient(block, x_BTD, g_BTD, numbers, total, matrices)
        for name, energy_BT in part.items():
            energy[name][rows] = energy_BT
    assert total is not None  # there is at least one window
    tokens = x_WTD.shape[0] * x_WTD.shape[1]
    return g_WTD, {name: fisher_KM / tokens for name, fisher_KM in total.items()}, energy


@functools.partial(jax.jit, static_argnames="matrices", donate_argnames=("g_BTD", "total"))
def _layer_gradient(
    block: Any, x_BTD: jax.Array, g_BTD: jax.Array, numbers: Mapping[str, Any], total: Any, matrices: tuple[str, ...]
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """The gradient before a layer, energies [B, T], and the sums of the squares' products with a batch more."""
    of = block_weights(block)

    def run(x_BTD: jax.Array, added: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen: dict[str, jax.Array] = {}
        probed = [Probe(weight, name, seen, added[name]) if name in added else weight for name, weight in of.items()]
        return calibrate.forward(jax.tree.unflatten(jax.tree.structure(block), probed), x_BTD, numbers), seen

    zeros = {name: jnp.zeros((*x_BTD.shape[:2], of[name].shape[-1]), jnp.float32) for name in matrices}
    _, back, seen = jax.vjp(run, x_BTD, zeros, has_aux=True)
    before_BTD, gradient = back(g_BTD)
    sums = {name: _matmul((_flat(seen[name]) ** 2).T, _flat(gradient[name]) ** 2) for name in matrices}
    energy = {name: jnp.sum(gradient[name] ** 2, -1) for name in matrices}
    return before_BTD, energy, sums if total is None else jax.tree.map(jnp.add, total, sums)


def _table_fisher(tokens_WT: np.ndarray, g_WTD: np.ndarray, shape: tuple[int, int]) -> jax.Array:
    """Of the table that tokens are looked up in: of a token's row the squares of all gradients where it stands."""
    sums_VD = np.zeros(shape, np.float32)
    np.add.at(sums_VD, tokens_WT.reshape(-1), (g_WTD**2).reshape(-1, shape[1]))
    return jnp.asarray(sums_VD / tokens_WT.size)
