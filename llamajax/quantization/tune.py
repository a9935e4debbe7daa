"""Scales and norms of a quantized model, tuned by how its predictions differ from those of the model it was made from.

Codes stay. A factor near 1 is learnt for each scale and each weight of a norm, by Adam (Kingma & Ba 2014,
arXiv:1412.6980). This is the end-to-end phase of EfficientQAT (Chen et al. 2024, arXiv:2407.11062) with another loss:
the KL divergence from the float model's predictions instead of the text's next tokens. A short text has few tokens, but
a whole distribution at each position.
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

# Of scales. With 3e-3 one pass over 8,192 tokens made SmolLM2-135M at 4.5 bits worse on other text.
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
    """The model with scales and norms that bring its predictions nearer to the float model's on a text.

    A window at a time, in an order drawn anew for each pass; the learning rate falls to 0 as a cosine.

    Args:
        model: quantized.
        read: one weight of the float model at a time.
        windows_WT: calibration text.
        passes: over the text.
        learning_rate: relative to the scales.
        seed: of the order of windows.
        on_step: called with how many windows more have been seen.
    """
    config = model.config
    outside = {place.name: read(place) for place in specs(config) if place.layer is None}
    hidden_WTD = behind_layers(read, embedded(outside, windows_WT, config), config).astype(ml_dtypes.bfloat16)
    teacher = outside_model(outside, config)
    # Scales in codes are floats meanwhile: one factor for all groups of an output would leave little to learn.
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
    """Arrays by their factors 1 + change, float32."""
    return {name: jnp.asarray(array).astype(jnp.float32) * (1 + change[name]) for name, array in train.items()}
