"""Computes the diagonal of the Fisher information layer by layer: the KL divergence that a change of a weight costs.

To second order, the KL divergence of a changed model from the original is half the square of the change d under the
Fisher information F: KL = 1/2 d' F d. F is the mean of g g' for gradients g of -log p of tokens that the model itself
draws (Martens 2014, arXiv:1412.1193), so the text's true next tokens do not enter. Only the diagonal of F is computed:
a position's gradient for a weight is x g', and `fisher_KM` is the mean over tokens of x_k^2 g_m^2. The diagonal
suffices because rounding errors of different weights have independent signs.

The computation takes one forward and one backward pass over the text, with the weights of one layer in memory. The
residual stream before each layer is kept on the host, in bfloat16. Dimension key as in `config.py`; `K` is the
contraction axis of any weight, `M` its outputs.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llamajax.config import Config
from llamajax.model import Llama
from llamajax.parameters import Place, block_weights, specs
from llamajax.quantization import calibrate
from quant import Probe, values

# Tokens per batch in a layer: memory holds the inputs and output gradients of all its weights for them.
_BATCH_TOKENS = 1024
# Tokens per batch in the head: memory holds logits of a large vocabulary, and their gradient.
_HEAD_TOKENS = 512

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def gradients(
    read: Callable[[Place], Any],
    config: Config,
    windows_WT: np.ndarray,
    *,
    seed: int = 0,
) -> Iterator[tuple[Place, jax.Array, jax.Array]]:
    """Yields the Fisher information of every matrix: the head, the layers from last to first, the embedding.

    Args:
        read: returns one weight.
        config: the architecture.
        windows_WT: text; its tokens are inputs only, targets are drawn from the model.
        seed: seed of these draws.

    Yields:
        A place, its weight in float32, and the diagonal of the Fisher information per token, of the weight's shape. A
        tied embedding comes once, with the sum of its information as embedding and as head.
    """
    outside = [place for place in specs(config) if place.layer is None]
    whole = {place.name: values(read(place)) for place in outside}
    x_WTD = calibrate.embedded(whole, windows_WT, config)
    kept = []
    for layer in range(config.num_layers):
        kept.append(x_WTD.astype(ml_dtypes.bfloat16))
        x_WTD = calibrate.advance(calibrate.float_block(read, layer, config), x_WTD, config.numbers(layer))
    g_WTD, head_fisher_VD = _through_head(whole, config, x_WTD, seed)
    embed, head = Place("embed_VD"), Place("head_VD")
    if head.name in whole:
        yield head, whole.pop(head.name), head_fisher_VD
    for layer in reversed(range(config.num_layers)):
        block = calibrate.float_block(read, layer, config)
        g_WTD, fisher = _through_layer(block, kept.pop(), g_WTD, config, layer)
        weights = block_weights(block)
        for name, fisher_KM in fisher.items():
            yield Place(name, layer), weights[name], fisher_KM
    fisher_VD = _table_fisher(windows_WT, g_WTD, config.vocab_size) * config.embedding_scale**2
    yield embed, whole[embed.name], fisher_VD + head_fisher_VD if config.tied_embeddings else fisher_VD


def _rows(shape: tuple[int, ...], most_tokens: int) -> Iterator[slice]:
    """Yields slices of windows, all of one length, of up to about `most_tokens` tokens."""
    count, length = shape[:2]
    most = max(1, most_tokens // length)
    size = max(size for size in range(1, min(most, count) + 1) if count % size == 0)
    return (slice(first, first + size) for first in range(0, count, size))


# ---- The head --------------------------------------------------------------------------------------------------------


def _through_head(
    whole: Mapping[str, Any], config: Config, x_WTD: np.ndarray, seed: int
) -> tuple[np.ndarray, jax.Array]:
    """Returns the gradient behind the last layer [W, T, D], and the head's Fisher information."""
    g_WTD, total, key = np.empty_like(x_WTD), None, jax.random.key(seed)
    for number, rows in enumerate(_rows(x_WTD.shape, _HEAD_TOKENS)):
        one = jax.random.fold_in(key, number)
        g_WTD[rows], total = _head_gradient(whole, jnp.asarray(x_WTD[rows]), one, total, config)
    assert total is not None  # there is at least one window
    return g_WTD, total / (x_WTD.shape[0] * x_WTD.shape[1])


@functools.partial(jax.jit, static_argnames="config", donate_argnames="total")
def _head_gradient(
    whole: Mapping[str, Any], x_BTD: jax.Array, key: jax.Array, total: Any, config: Config
) -> tuple[jax.Array, Any]:
    """Returns the gradient of -log p of drawn tokens before the final norm, and the sum of x_k^2 g_m^2 over tokens."""
    name = "head_VD" if "head_VD" in whole else "embed_VD"

    def logits(x_BTD: jax.Array, added_BTV: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen: dict[str, jax.Array] = {}
        probe = Probe(whole[name], name, seen, added_BTV)
        return Llama.head(calibrate.outside_model({**whole, name: probe}, config), x_BTD), seen[name]

    zeros_BTV = jnp.zeros((*x_BTD.shape[:2], config.vocab_size), jnp.float32)
    logits_BTV, back, seen_BTD = jax.vjp(logits, x_BTD, zeros_BTV, has_aux=True)
    drawn_BT = jax.random.categorical(key, logits_BTV)
    g_BTD, g_BTV = back(jax.nn.softmax(logits_BTV) - jax.nn.one_hot(drawn_BT, config.vocab_size, dtype=jnp.float32))
    sums_VD = _matmul((_flat(g_BTV) ** 2).T, _flat(seen_BTD) ** 2)
    return g_BTD, sums_VD if total is None else total + sums_VD


def _flat(x: jax.Array) -> jax.Array:
    """[B, T, n] -> float32 [B * T, n]."""
    return x.reshape(-1, x.shape[-1]).astype(jnp.float32)


# ---- Layers ----------------------------------------------------------------------------------------------------------


def _through_layer(
    block: Any, x_WTD: np.ndarray, g_WTD: np.ndarray, config: Config, layer: int
) -> tuple[np.ndarray, dict[str, jax.Array]]:
    """Replaces the gradient behind a layer by that before it; also returns the Fisher information of its matrices."""
    matrices = tuple(place.name for place, spec in specs(config).items() if place.layer == layer and spec.is_matrix)
    numbers = dict(config.numbers(layer))
    total = None
    for rows in _rows(x_WTD.shape, _BATCH_TOKENS):
        x_BTD, g_BTD = jnp.asarray(x_WTD[rows], jnp.float32), jnp.asarray(g_WTD[rows])
        g_WTD[rows], total = _layer_gradient(block, x_BTD, g_BTD, numbers, total, matrices)
    assert total is not None  # there is at least one window
    tokens = x_WTD.shape[0] * x_WTD.shape[1]
    return g_WTD, {name: fisher_KM / tokens for name, fisher_KM in total.items()}


@functools.partial(jax.jit, static_argnames="matrices", donate_argnames=("g_BTD", "total"))
def _layer_gradient(
    block: Any, x_BTD: jax.Array, g_BTD: jax.Array, numbers: Mapping[str, Any], total: Any, matrices: tuple[str, ...]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the gradient before a layer, and the sums of x_k^2 g_m^2 with this batch added."""
    of = block_weights(block)

    def run(x_BTD: jax.Array, added: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        seen: dict[str, jax.Array] = {}
        probed = [Probe(weight, name, seen, added[name]) if name in added else weight for name, weight in of.items()]
        return calibrate.forward(jax.tree.unflatten(jax.tree.structure(block), probed), x_BTD, numbers), seen

    zeros = {name: jnp.zeros((*x_BTD.shape[:2], of[name].shape[-1]), jnp.float32) for name in matrices}
    _, back, seen = jax.vjp(run, x_BTD, zeros, has_aux=True)
    before_BTD, gradient = back(g_BTD)
    sums = {name: _matmul((_flat(seen[name]) ** 2).T, _flat(gradient[name]) ** 2) for name in matrices}
    return before_BTD, sums if total is None else jax.tree.map(jnp.add, total, sums)


def _table_fisher(tokens_WT: np.ndarray, g_WTD: np.ndarray, height: int) -> jax.Array:
    """Returns the Fisher information of the embedding: each token's row sums the squared gradients at its positions."""
    sums_VD = np.zeros((height, g_WTD.shape[-1]), np.float32)
    np.add.at(sums_VD, tokens_WT.reshape(-1), (g_WTD**2).reshape(-1, g_WTD.shape[-1]))
    return jnp.asarray(sums_VD / tokens_WT.size)
