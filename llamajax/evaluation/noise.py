"""Signal-to-noise ratio of a model against the one that it was made from: layer by layer, and weight by weight.

The ratio in decibels is 10 log10(sum of reference**2 / sum of (reference - model)**2): 20 dB means an error of a tenth,
40 dB of a hundredth, infinity means equality. A quantizer gains about 6 dB with each bit (Bennett 1948).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.evaluation.evaluate import check_vocabularies
from llamajax.evaluation.windows import Windows, as_windows
from llamajax.model import Llama
from llamajax.parameters import LAYERS, named_weights, weights_of
from llamajax.quantization.calibrate import run_block
from quant import values


class LayerNoise(NamedTuple):
    """Signal-to-noise ratios along a model, in dB.

    The sums run over all inputs of all windows. Positions with huge activations (in trained models often the first
    position: Sun et al. 2024, arXiv:2402.17762) therefore weigh most in the residual stream.

    Attributes:
        embedding: ratio of the input of the first layer.
        layers: ratio of the residual stream after each layer.
        logits: ratio of the logits.
    """

    embedding: float
    layers: tuple[float, ...]
    logits: float


def layer_noise(
    model: Llama,
    reference: Llama,
    tokens: Sequence[int] | np.ndarray | Windows,
    *,
    window: int = 512,
    batch: int = 4,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> LayerNoise:
    """Runs both models over a text side by side and compares them after each layer.

    Only the activations of one batch and one layer are in memory. The arguments are those of `evaluate.token_losses`.
    As there, weights are multiplied in the layout that they have.

    Raises:
        LlamaJaxError: if the text is too short, the models differ in vocabulary, width or layers, or activations are
            not finite.
    """
    check_vocabularies(model, reference)
    for name in ("width", "num_layers"):
        size, expected = (getattr(each.config, name) for each in (model, reference))
        if size != expected:
            raise LlamaJaxError(f"{name} is {size} in the model, {expected} in the reference: expected the same")
    windows = as_windows(tokens, window)
    powers = np.zeros((model.config.num_layers + 2, 2))
    for rows, used in windows.batches(batch, on_batch):
        inputs_BT = jnp.asarray(rows[:, :-1])
        ours, theirs = _embed(model, inputs_BT), _embed(reference, inputs_BT)
        powers[0] += _powers("the embedding", ours, theirs, used)
        for layer in range(model.config.num_layers):
            ours, theirs = _advance(model, layer, ours), _advance(reference, layer, theirs)
            powers[layer + 1] += _powers(f"the residual stream behind layer {layer}", ours, theirs, used)
        powers[-1] += _powers("the logits", _head(model, ours), _head(reference, theirs), used)
    embedding, *layers, logits = map(_decibels, powers)
    return LayerNoise(embedding, tuple(layers), logits)


def weight_noise(model: Llama, reference: Llama) -> dict[str, list[float]]:
    """Signal-to-noise ratio of every weight by name, in dB: one per layer for weights of the layers, else one.

    The ratio is that of the dequantized values, which a backend's layout does not change. A recipe that moves scales
    from one weight to the next (AWQ, SmoothQuant) changes weights without changing the model's outputs; only
    `layer_noise` is meaningful then.

    Raises:
        LlamaJaxError: if the models' weights differ in name or shape, or are not finite.
    """
    if (ours := _shapes(model)) != (theirs := _shapes(reference)):
        name = next(iter(dict(ours.items() ^ theirs.items())))
        raise LlamaJaxError(
            f"{name} is {ours.get(name)} in the model, {theirs.get(name)} in the reference: expected one shape"
        )
    result: dict[str, list[float]] = {}
    theirs_of = weights_of(reference)
    for place, weight in weights_of(model).items():
        name = place.name if place.layer is None else f"{LAYERS}*.{place.name}"
        result.setdefault(name, []).append(_decibels(_powers(str(place), weight, theirs_of[place])))
    return result


def same_weights(model: Llama, reference: Llama) -> bool:
    """Whether two models have weights of the same names and shapes, quantized or not."""
    return _shapes(model) == _shapes(reference)


def _shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in named_weights(model).items()}


def _advance(model: Llama, layer: int, x_BTD: jax.Array) -> jax.Array:
    return run_block(model.layer(layer), x_BTD, dict(model.config.numbers(layer)))


def _powers(name: str, ours: Any, theirs: Any, used: int | None = None) -> np.ndarray:
    """Power of the reference and of the difference, float64 [2], over the first `used` rows.

    Summed in float32 along the last axis only: millions of squares in float32 would lose digits.

    Raises:
        LlamaJaxError: if a power is not finite; the message contains `name`.
    """
    powers = np.asarray(_row_powers(ours, theirs))
    powers = (powers if used is None else powers[:, :used]).reshape(2, -1).sum(axis=1, dtype=np.float64)
    if not np.isfinite(powers).all():
        of = "the reference" if not np.isfinite(powers[0]) else "the model"
        raise LlamaJaxError(
            f"{name} of {of} is not finite, or its square is not: its numbers overflow: give another dtype, such as "
            "float32"
        )
    return powers


@jax.jit
def _row_powers(ours: Any, theirs: Any) -> jax.Array:
    ours, theirs = values(ours), values(theirs)
    return jnp.stack([jnp.sum(x * x, axis=-1) for x in (theirs, theirs - ours)])


def _decibels(powers: np.ndarray) -> float:
    signal, noise = map(float, powers)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


_embed = jax.jit(Llama.embed)
_head = jax.jit(Llama.head)
