"""Scales and norms of a packed model, tuned by the divergence of its predictions from those of the model it was made from.

Codes stay. What is learnt is a factor near 1 for each scale and each norm's weight, by Adam, as the end-to-end phase of
EfficientQAT (Chen et al. 2024, arXiv:2407.11062), with the KL divergence in place of the text's own loss: the text says
what is read, the model what comes next.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llamajax.model import Llama
from llamajax.trainable import trainable


def tune(
    packed: Llama,
    logits_of: Callable[[int], jax.Array],
    windows_WT: np.ndarray,
    *,
    epochs: int = 2,
    learning_rate: float = 2e-3,
    batch: int = 1,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    betas=(0.9, 0.95),
) -> Llama:
    train, rest, merge = trainable(packed)
    steps = epochs * (len(windows_WT) // batch)
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps), b1=betas[0], b2=betas[1])
    factors = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), train)

    def arrays(factors, train):
        return jax.tree.map(lambda u, a: a.astype(jnp.float32) * (1 + u), factors, train)

    def loss(factors, train, rest, tokens_BT, teacher_BTV):
        model = merge(arrays(factors, train), rest)
        logits = model(tokens_BT, remat="layer")[0]
        p = jax.nn.log_softmax(teacher_BTV)
        return jnp.sum(jnp.exp(p) * (p - jax.nn.log_softmax(logits)), -1).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(factors, state, train, rest, tokens_BT, teacher_BTV):
        value, gradient = jax.value_and_grad(loss)(factors, train, rest, tokens_BT, teacher_BTV)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(factors, updates), state, value

    state = optimizer.init(factors)
    rng = np.random.default_rng(seed)
    done, seen = 0, []
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(windows_WT)), len(windows_WT) // batch):
            factors, state, value = step(factors, state, train, rest, jnp.asarray(windows_WT[rows]), logits_of(rows))
            seen.append(value)
            done += 1
            on_step(done, steps)
    tuned = jax.tree.map(lambda new, a: new.astype(a.dtype), arrays(factors, train), train)
    tune.losses = [float(v) for v in seen]
    return merge(tuned, rest)
