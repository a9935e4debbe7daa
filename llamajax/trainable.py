"""Selects the arrays of a model to train, because `jax.grad` fails at the integer arrays of a packed model."""

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
    """Splits a model into arrays to differentiate and the rest.

        train, rest, merge = trainable(model, "norm")
        gradient = jax.grad(lambda train: loss(merge(train, rest)))(train)

    Args:
        model: quantized or not; the scales and other floats of a quantized weight can be trained.
        which: a role of weights, such as "norm" or "head" (`parameters.Spec.roles`), or a glob on their names, as
            "layers.*.ffn.*".

    Returns:
        The float arrays of the selected weights, by name; all other arrays; and a function that merges both into a
        model. Both are pytrees for arguments of compiled functions, not for constants.

    Raises:
        LlamaJaxError: if no selected weight has a float array.
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
            f"trainable {which!r} selects no weight with floats: expected one of {', '.join(roles)}, or a glob on "
            f"{', '.join(named)}"
        )
    abstract = {name: jax.eval_shape(lambda weight=weight: weight) for name, weight in named.items()}
    config, plan = model.config, model.plan

    def merge(train: Arrays, rest: Arrays) -> Llama:
        arrays = {**rest, **train}
        weights = {name: rebuilt(name, weight, arrays) for name, weight in abstract.items()}
        return model_from(weights, config, plan)

    return train, rest, merge
