"""Which arrays of a model are trained: `jax.grad` of a packed model refuses its bytes."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llamajax.errors import LlamaJaxError
from llamajax.model import Llama, model_from
from llamajax.parameters import leaves, named_weights, parts_of, rebuilt

Arrays = Mapping[str, Any]


def trainable(
    model: Llama, which: str = "*"
) -> tuple[dict[str, Any], dict[str, Any], Callable[[Arrays, Arrays], Llama]]:
    """A model in two parts, of which the first can be differentiated.

        train, rest, merge = trainable(model, "norm")
        gradient = jax.grad(lambda train: loss(merge(train, rest)))(train)

    Args:
        model: quantized or not; of a quantized weight the scales and other floats can be trained.
        which: a role of weights, as "norm" or "head" (`parameters.Spec.roles`), or a glob on their names, as
            "layers.*.ffn.*".

    Returns:
        The float arrays of the weights that are meant, by name; all others; and what makes the model of the two again.
        Both are pytrees, to be arguments of what is compiled, not constants.

    Raises:
        LlamaJaxError: if nothing is meant that has a float array.
    """
    of, named = leaves(model.config, model.plan), named_weights(model)
    train: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, weight in named.items():
        meant = which in of[name].spec.roles or fnmatch.fnmatchcase(name, which)
        for part, array in parts_of(weight).items():
            into = train if meant and jnp.issubdtype(array.dtype, jnp.floating) else rest
            into[name + part] = array
    if not train:
        roles = dict.fromkeys(role for leaf in of.values() for role in leaf.spec.roles)
        raise LlamaJaxError(
            f"trainable {which!r}: no weight with floats is meant: expected one of {', '.join(roles)}, or a glob on "
            f"{', '.join(named)}"
        )
    abstract = {name: jax.eval_shape(lambda weight=weight: weight) for name, weight in named.items()}
    config, plan = model.config, model.plan

    def merge(train: Arrays, rest: Arrays) -> Llama:
        arrays = {**rest, **train}
        weights = {name: rebuilt(name, weight, arrays) for name, weight in abstract.items()}
        return model_from(weights, config, plan)

    return train, rest, merge
