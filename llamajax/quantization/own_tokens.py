"""Draws tokens from a model to measure it on, where no text is given: all positions at once, one layer in memory.

Tokens begin as random ids. One pass over the model draws every token anew, from the prediction behind the ids before it
(a step of Jacobi iteration, as in Santilli et al. 2023, arXiv:2305.10427). The drawn tokens have about the frequencies
of the model's text. That is no text for GPTQ, but the Fisher information of such tokens ranks weights nearly as that of
real text does. Sampling one token after another (`own_text`) takes longer, and needs the whole model in memory.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.model import Llama
from llamajax.parameters import Place, specs
from llamajax.quantization import calibrate
from quant import values

_WINDOWS, _LENGTH = 2, 128


def own_tokens(
    read: Callable[[Place], Any],
    config: Config,
    bos_id: int | None = None,
    *,
    seed: int = 0,
    on_layers: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Draws windows of tokens from a model.

    Args:
        read: returns one weight.
        config: the architecture.
        bos_id: the first token of each window; a random one if it is None.
        seed: seed of the draws.
        on_layers: called with the number of layers computed since the last call, `num_layers` in all.

    Returns:
        int32 ids [W, T], about 256.

    Raises:
        LlamaJaxError: with the name of a weight that is not finite, or of the layer whose output is not; or if the
            model does not have the id of BOS.
    """
    if bos_id is not None and not 0 <= bos_id < config.vocab_size:
        raise LlamaJaxError(f"bos_id is {bos_id}: expected one of the model's ids, 0 to {config.vocab_size - 1}")
    shape = _WINDOWS, min(_LENGTH, config.context_length)
    tokens_WT = np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32)
    if bos_id is not None:
        tokens_WT[:, 0] = bos_id
    outside = {place.name: values(read(place)) for place in specs(config) if place.layer is None}
    model = calibrate.outside_model(outside, config)

    def on_layer(layer: int, x_WTD: np.ndarray) -> None:
        if not np.isfinite(x_WTD).all():
            raise _not_finite(read, config, layer)
        on_layers(1)

    x_WTD = calibrate.behind_layers(read, calibrate.embedded(outside, tokens_WT, config), config, on_layer)
    for row, key in enumerate(jax.random.split(jax.random.key(seed), _WINDOWS)):
        tokens_WT[row, 1:] = _drawn(model, jnp.asarray(x_WTD[row : row + 1]), key)[0, :-1]
    return tokens_WT


def _not_finite(read: Callable[[Place], Any], config: Config, layer: int) -> LlamaJaxError:
    for place in specs(config):
        if place.layer == layer and not jnp.isfinite(values(read(place))).all():
            return LlamaJaxError(f"{place} holds NaN or infinity: expected finite weights")
    return LlamaJaxError(f"layer {layer}: its output is not finite: expected activations that float32 can hold")


@jax.jit
def _drawn(model: Llama, x_BTD: jax.Array, key: jax.Array) -> jax.Array:
    """Draws the token that follows each position, int32 [B, T]."""
    return jax.random.categorical(key, model.head(x_BTD)).astype(jnp.int32)
