"""Between loading and generating: weights in the layout of a backend, and what they are multiplied with."""

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
    """The same model, with its quantized weights laid out for one backend.

    Not to be saved, exported or sharded: the format at rest is the QTensors'. A model without quantized weights comes
    back as it is. So does an embedding table that serves as no head: of it only rows are looked up.

    Args:
        model: of QTensors or arrays.
        backend: as `jax.default_backend` names it, which it is unless given.
        donate: whether each weight may be freed as soon as it has been laid out; then `model` must not be used any
            more, and memory never holds more than the model and one weight.

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
    """The same model, with other rounding of what its quantized weights are multiplied with.

    On a CPU prefill is faster with "bfloat16", because products of 16-bit floats are; nothing is with "int8".

    Args:
        model: not prepared yet; leaves may be abstract.
        kind: "float32", not rounded; "bfloat16", each to 8 bits of precision; "int8", each group to 8 bits with a scale
            of its own, as llama.cpp does; all elements of a token as one where the weight's groups are reordered.

    Raises:
        LlamaJaxError: for another kind, a prepared model, or rounding for one without quantized weights.
    """
    check_activations(model, kind)
    return with_activations_of_weight(model, kind)


def check_activations(weights: Any, kind: str | None) -> None:
    """Refuses rounding that the weights of a pytree cannot have, as `with_activations` says; None asks for nothing."""
    if kind is None:
        return
    if kind not in ACTIVATIONS:
        raise LlamaJaxError(f"activations {kind!r}: expected one of {', '.join(ACTIVATIONS)}")
    if is_laid_out(weights):
        raise LlamaJaxError("activations of a model that is laid out for a backend: change them before `prepare`")
    if kind != "float32" and not quantized(weights):
        raise LlamaJaxError(f"activations {kind!r} for a model without quantized weights: nothing would be rounded")
