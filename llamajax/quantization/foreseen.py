"""Predicts the shapes and dtypes of quantized weights from a recipe and an architecture, without any weights."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llamajax.checkpoint.source import float_weights
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.parameters import Place, Spec, specs
from llamajax.quantization.quantize import assigned, read_recipe
from llamajax.quantization.quantize_weight import by_rounding
from quant import Rule

FLOATS = ("float32", "bfloat16", "float16")


def rules_of(recipe: str | Path, config: Config) -> Mapping[Place, Rule]:
    """Returns the rule for each weight of each layer.

    Args:
        recipe: a recipe's name or file, or one of `FLOATS`, which quantizes no weight.
        config: the architecture.

    Raises:
        LlamaJaxError: if there is no such recipe, if it does not fit the architecture, or if the result depends on a
            calibration text or on the weights.
    """
    if str(recipe) in FLOATS:
        return assigned((Rule(weights="*", keep=True),), config)
    found = read_recipe(recipe)
    if found.target_bpw is not None or any(rule.outliers or rule.act_order for rule in found.rules):
        raise LlamaJaxError(
            f"recipe is {str(recipe)!r}, whose bits, outliers or channel order depend on a text or on the weights: "
            "expected a recipe that fixes them, such as int4-g32"
        )
    return assigned(found.rules, config)


def quantized_shape(place: Place, weight: jax.ShapeDtypeStruct, rule: Rule, spec: Spec) -> Any:
    """Returns the quantized weight that a rule makes of a matrix, as `jax.ShapeDtypeStruct`s.

    Raises:
        LlamaJaxError: if the rule does not fit the weight.
    """
    # The search for scales changes no shape, and takes seconds to trace.
    rule = dataclasses.replace(rule.for_inputs(weight.shape[spec.axis]), clip=None, importance=False)
    assert rule.scheme is not None  # a rule that quantizes
    try:
        made = jax.eval_shape(lambda weight: by_rounding(weight, rule, spec.axis), weight)
    except (ValueError, TypeError) as error:
        raise LlamaJaxError(f"{place} of shape {weight.shape}: {error}") from None
    return dataclasses.replace(made, activations=rule.activations)


def foreseen_weights(config: Config, recipe: str | Path, dtype: jax.typing.DTypeLike) -> dict[Place, Any]:
    """Returns every weight as a recipe stores it, as `jax.ShapeDtypeStruct`s.

    Args:
        config: the architecture.
        recipe: as in `rules_of`.
        dtype: dtype of weights that the recipe does not quantize; ignored if `recipe` is one of `FLOATS`.

    Raises:
        LlamaJaxError: as in `rules_of`.
    """
    rules = rules_of(recipe, config)
    floats = float_weights(config, str(recipe) if str(recipe) in FLOATS else dtype)
    known: dict[Any, Any] = {}  # layers are alike: tracing each would take seconds
    made: dict[Place, Any] = {}
    for place, spec in specs(config).items():
        weight, rule = floats[place], rules[place]
        if rule.keep or not spec.is_matrix:
            made[place] = weight
            continue
        key = place.name, rule
        if key not in known:
            known[key] = quantized_shape(place, weight, rule, spec)
        made[place] = known[key]
    return made
