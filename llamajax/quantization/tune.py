"""Tunes scales and norms of a quantized model so that its predictions come nearer to the float model's.

Codes do not change. Adam (Kingma & Ba 2014, arXiv:1412.6980) learns a factor near 1 for each scale and each norm
weight. This is the end-to-end phase of EfficientQAT (Chen et al. 2024, arXiv:2407.11062) with another loss: the KL
divergence from the float model's predictions, instead of the cross-entropy of the text's next tokens. A short text has
few tokens, but the float model gives a whole distribution at each position.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

from llamajax.model import Llama
from llamajax.parameters import Place, specs
from llamajax.quantization.calibrate import behind_layers, embedded, outside_model
from llamajax.trainable import trainable
from quant import with_float_scales, with_scales_of

# Of the factors. With 3e-3, one pass over 8,192 tokens made SmolLM2-135M at 4.5 bits worse on other text.
_LEARNING_RATE = 1e-3
_DECAY = 0.9, 0.95


def tune(
    model: Llama,
    read: Callable[[Place], Any],
    windows_WT: np.ndarray,
    passes: int,
    *,
    learning_rate: float = _LEARNING_RATE,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda count: None,
) -> Llama:
    """Returns the model with scales and norms that bring its predictions nearer to the float model's on a text.

    Each step uses one window, in an order that is drawn again for each pass. The learning rate falls to 0 as a cosine.

    Args:
        model: the quantized model.
        read: returns one weight of the float model.
        windows_WT: calibration text.
        passes: number of passes over the text.
        learning_rate: relative to the scales.
        seed: seed of the order of windows.
        on_step: called with the number of windows used since the last call.
    """
    config = model.config
    outside = {place.name: read(place) for place in specs(config) if place.layer is None}
    hidden_WTD = behind_layers(read, embedded(outside, windows_WT, config), config).astype(ml_dtypes.bfloat16)
    teacher = outside_model(outside, config)
    # Quantized scales are floats while tuning: with one factor for all groups of an output, little could be learnt.
    train, rest, merge = trainable(with_float_scales(model))
    steps = passes * len(windows_WT)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps), *_DECAY)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(change: Any, state: Any, constants: Any, tokens_BT: jax.Array, hidden_BTD: jax.Array) -> tuple[Any, Any]:
        teacher, train, rest = constants
        log_p_BTV = jax.nn.log_softmax(teacher.head(hidden_BTD.astype(jnp.float32)))

        def divergence(change: Mapping[str, jax.Array]) -> jax.Array:
            student = merge(_changed(train, change), rest)
            log_q_BTV = jax.nn.log_softmax(student(tokens_BT, remat="layer")[0])
            return jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), -1).mean()

        gradient = jax.grad(divergence)(change)
        with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32 and multiplies them with floats
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(change, updates), state

    change = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), train)
    state = optimizer.init(change)
    order = np.random.default_rng(seed)
    for _ in range(passes):
        for row in order.permutation(len(windows_WT)):
            window, hidden = jnp.asarray(windows_WT[row : row + 1]), jnp.asarray(hidden_WTD[row : row + 1])
            change, state = step(change, state, (teacher, train, rest), window, hidden)
            on_step(1)
    tuned = merge(jax.tree.map(lambda new, old: new.astype(old.dtype), _changed(train, change), train), rest)
    return with_scales_of(model, tuned)


def _changed(train: Mapping[str, Any], change: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the arrays times their factors 1 + change, float32."""
    return {name: jnp.asarray(array).astype(jnp.float32) * (1 + change[name]) for name, array in train.items()}
