"""Prepares a loaded model for generating: lays out weights for a backend, and sets the rounding of activations."""

from typing import Any

import jax

from llamajax.errors import LlamaJaxError
from llamajax.model import Llama, model_from
from llamajax.parameters import leaves, named_weights
from quant import is_laid_out, quantized
from quant import prepare as prepare_weight
from quant import with_activations as with_activations_of_weight

ACTIVATIONS = ("float32", "bfloat16", "int8")


def prepare(model: Llama, backend: str | None = None, *, donate: bool = False) -> Llama:
    """Returns the same model with its quantized weights in the layout of one backend.

    Do not save, export or shard the result: QTensors are the format for storage. A model without quantized weights is
    returned unchanged. An embedding table that is not also the head stays unchanged, because it is only looked up.

    Args:
        model: a model of QTensors or arrays.
        backend: name of a backend, as `jax.default_backend()` returns it, which is also the default.
        donate: whether each weight may be freed as soon as its layout is made; then `model` must not be used
            afterwards, and memory never holds more than the model and one weight.

    Returns:
        The prepared model. Its logits are those of `model` up to the rounding of sums.
    """
    backend = backend or jax.default_backend()
    of = leaves(model.config, model.plan)
    made = {
        name: weight if of[name].spec.is_only_looked_up else prepare_weight(weight, backend, donate=donate)
        for name, weight in named_weights(model).items()
    }
    return model_from(made, model.config, model.plan)


def with_activations(model: Llama, kind: str) -> Llama:
    """Returns the same model with another rounding of the activations that quantized weights are multiplied with.

    On a CPU "bfloat16" makes prefill faster, because products of 16-bit floats are faster; "int8" speeds up nothing.

    Args:
        model: not prepared yet; leaves may be abstract.
        kind: "float32", not rounded; "bfloat16", 8 bits of precision; "int8", 8 bits with a scale for each group, as in
            llama.cpp, or one scale for a whole token if the weight's groups are reordered.

    Raises:
        LlamaJaxError: for another kind, a prepared model, or rounding for one without quantized weights.
    """
    check_activations(model, kind)
    return with_activations_of_weight(model, kind)


def check_activations(weights: Any, kind: str | None) -> None:
    """Refuses rounding that the weights of a pytree cannot have, as `with_activations`; None is always accepted."""
    if kind is None:
        return
    if kind not in ACTIVATIONS:
        raise LlamaJaxError(f"activations {kind!r}: expected one of {', '.join(ACTIVATIONS)}")
    if is_laid_out(weights):
        raise LlamaJaxError("activations of a model that is laid out for a backend: change them before `prepare`")
    if kind != "float32" and not quantized(weights):
        raise LlamaJaxError(f"activations {kind!r} for a model without quantized weights: nothing would be rounded")
