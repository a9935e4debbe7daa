"""Quantizes a model by a recipe: the same tree, with a `QTensor` where a weight array stood."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import jax

from llamajax.checkpoint.naming import is_quantized, named_weights
from llamajax.config import preset_folder
from llamajax.errors import LlamaJaxError
from llamajax.model import Llama
from quant import QTensor, quantize_rtn
from quant.recipe import Rule, assign, rules_from


def recipe_names() -> list[str]:
    """Names of the ready recipes, sorted."""
    return sorted(path.stem for path in (preset_folder() / "recipes").glob("*.toml"))


def read_recipe(name: str | Path) -> tuple[Rule, ...]:
    """A ready recipe by name, or one from a .toml file.

    Raises:
        LlamaJaxError: if there is none, or it is not a recipe.
    """
    path = preset_folder() / "recipes" / f"{name}.toml" if name in recipe_names() else Path(name)
    if not path.is_file():
        raise LlamaJaxError(f"recipe is {str(name)!r}: expected a .toml file or one of {', '.join(recipe_names())}")
    try:
        return rules_from(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
    except ValueError as error:  # of the recipe, of TOML, of UTF-8
        raise LlamaJaxError(str(error) if str(path) in str(error) else f"{path}: not TOML ({error})") from None


def quantize(
    model: Llama,
    recipe: str | Path | tuple[Rule, ...],
    on_weight: Callable[[int, int], None] = lambda done, total: None,
) -> Llama:
    """The model with its weights quantized as a recipe says, without calibration data.

    Embeddings are grouped along their rows (looked up and, as a head, contracted), matrices along their inputs.

    Args:
        model: weights are arrays.
        recipe: name, path or rules.
        on_weight: called with (weights done, weights in all).

    Raises:
        LlamaJaxError: if the model is quantized already, a rule does not fit its weight, or rules and weights do not
            cover each other.
    """
    rules = recipe if isinstance(recipe, tuple) else read_recipe(recipe)
    weights = named_weights(model)
    if is_quantized(model):
        raise LlamaJaxError("the model is quantized already: quantize the weights that it was made from")
    try:
        chosen = assign(rules, weights)
    except ValueError as error:
        raise LlamaJaxError(str(error)) from None
    quantized = []
    for done, (name, weight) in enumerate(weights.items(), 1):
        quantized.append(_quantize_weight(name, weight, chosen[name]))
        on_weight(done, len(weights))
    return jax.tree.unflatten(jax.tree.structure(model), quantized)


def _quantize_weight(name: str, weight: jax.Array, rule: Rule) -> jax.Array | QTensor:
    if rule.keep or rule.scheme is None:
        return weight
    try:
        return quantize_rtn(
            weight,
            rule.scheme,
            group_size=rule.group_size,
            axis=-1 if name.endswith("_VD") else -2,
            scale_dtype=rule.scale_dtype,
            clip=rule.clip,
        )
    except (ValueError, TypeError) as error:
        raise LlamaJaxError(f"{name} of shape {weight.shape}: {error}") from None
