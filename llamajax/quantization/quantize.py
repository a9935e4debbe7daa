"""Quantizes a model by a recipe: the same tree, with a `QTensor` where a weight array stood.

Weights are read, quantized and put away one by one, so that memory is that of the result, and of one layer's floats
where a recipe needs calibration: then each layer is quantized with the activations that the quantized layers before it
make of a text.
"""

import collections
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np

from llamajax.checkpoint import Opened
from llamajax.checkpoint.assemble import Stacks
from llamajax.config import Config, preset_folder
from llamajax.errors import LlamaJaxError
from llamajax.files import read_toml, shortened
from llamajax.model import Llama
from llamajax.parameters import LAYERS, Place, inputs, specs, weights_of
from llamajax.quantization import calibrate
from llamajax.quantization.bit_search import choose_bits, choose_bits_by_roles
from llamajax.quantization.ggml_rules import candidates, for_ggml
from llamajax.quantization.layerwise import calibrated
from llamajax.quantization.quantize_weight import quantize_weight
from llamajax.quantization.tune import tune
from llamajax.workers import workers
from quant import Recipe, Rule, assign, kind_of, quantized, recipe_from

if TYPE_CHECKING:
    from llamajax.quantization.resume import PartsOnDisk

_WORKERS = 3  # weights in work at a time
_FORM = ("scheme", "group_size", "scale_scheme", "scale_group", "offset")  # what a search for bits chooses

Rules = Mapping[Place, Rule]


def recipe_names() -> list[str]:
    """Names of the ready recipes, sorted."""
    return sorted(path.stem for path in (preset_folder() / "recipes").glob("*.toml"))


def read_recipe(name: str | Path) -> Recipe:
    """A ready recipe by name, or one from a .toml file.

    Raises:
        LlamaJaxError: if there is none, or it is not a recipe.
    """
    path = preset_folder() / "recipes" / f"{name}.toml" if name in recipe_names() else Path(name)
    try:
        return recipe_from(read_toml(path), str(path))
    except OSError:
        expected = f"a .toml file or one of {', '.join(recipe_names())}"
        raise LlamaJaxError(f"recipe is {shortened(str(name))}: expected {expected}") from None
    except ValueError as error:
        raise LlamaJaxError(str(error)) from None


def assigned(rules: Sequence[Rule], config: Config) -> dict[Place, Rule]:
    """The rule of each weight of each layer.

    Biases and sinks, which some families have and no rule can quantize, stay as they are beside the matrices that a
    rule is for; a rule for them alone keeps them, or is refused.

    Raises:
        LlamaJaxError: if rules and weights do not cover each other, or a norm would be quantized.
    """
    layers: dict[str, list[int] | None] = {}
    for place in specs(config):
        if place.layer is None:
            layers[place.name] = None
        else:
            of = layers.setdefault(f"{LAYERS}*.{place.name}", [])
            assert of is not None  # a weight of layers
            of.append(place.layer)
    try:
        chosen = assign(rules, layers, config.num_layers)
    except ValueError as error:
        raise LlamaJaxError(str(error)) from None
    made = {Place(name.removeprefix(f"{LAYERS}*."), layer): rule for (name, layer), rule in chosen.items()}
    specced = specs(config)
    of_matrices = {id(rule) for place, rule in made.items() if specced[place].is_matrix}
    for place, rule in made.items():
        if "bias" in specced[place].roles and id(rule) in of_matrices:
            made[place] = rule if rule.keep else Rule(weights=rule.weights, layers=rule.layers, keep=True)
        elif not specced[place].is_matrix and not rule.keep:
            raise LlamaJaxError(
                f"{place}: the rule for {rule.weights!r} would quantize what is no matrix: begin the recipe with a "
                "rule that keeps norms (weights = '*norm*', keep = true)"
            )
    return {place: made[place] for place in specced}


def without_makers(rules: Rules, config: Config) -> tuple[dict[Place, Rule], list[str]]:
    """The rules without scaling where nothing makes a weight's inputs channel by channel, so that it could undo it.

    So it is where a family has no norm before a layer's halves (OLMo 2): the residual stream is the input.

    Returns:
        The rules, and the names of the weights, of all layers together, that are quantized without scaling.

    Raises:
        LlamaJaxError: for a weight outside of layers, which has no maker in any family.
    """
    of, made = specs(config), dict(rules)
    skipped: dict[str, None] = {}
    for place, rule in rules.items():
        if rule.scaling is None or of[place].maker:
            continue
        if place.layer is None:
            raise LlamaJaxError(
                f"{place}: scaling of its inputs is not supported, as nothing that makes them could undo it: expected "
                "a rule without scaling"
            )
        made[place] = dataclasses.replace(rule, scaling=None)
        skipped[place.name] = None
    return made, list(skipped)


def without_inputs(rules: Rules, config: Config) -> tuple[dict[Place, Rule], list[Place]]:
    """The rules with round-to-nearest where a rule for several weights asks for GPTQ of one that is only looked up.

    A rule for such a weight alone stays as it is, and is refused when it is followed.

    Returns:
        The rules, and the weights that are rounded to nearest.
    """
    of, made, changed = specs(config), dict(rules), []
    shared = collections.Counter(id(rule) for rule in rules.values())
    for place, rule in rules.items():
        if of[place].is_only_looked_up and rule.method == "gptq" and shared[id(rule)] > 1:
            made[place] = dataclasses.replace(rule, method="rtn", act_order=False, damping=Rule.damping, descent=0)
            changed.append(place)
    return made, changed


def quantize(
    model: Llama | Opened,
    recipe: str | Path | Recipe | tuple[Rule, ...],
    *,
    calibration: np.ndarray | None = None,
    window: int = 512,
    work: Path | None = None,
    on_weight: Callable[[int, int], None] = lambda done, total: None,
    types: Literal["ggml"] | None = None,
    on_note: Callable[[str], None] = warnings.warn,
) -> Llama:
    """The model with its weights quantized as a recipe says.

    Embeddings are grouped along their rows (looked up and, as a head, contracted), matrices along their inputs.

    Args:
        model: with arrays for weights; or a checkpoint that was opened, whose weights are then read one by one and
            never held together.
        recipe: name, path, recipe or rules.
        calibration: token ids of a text like those that the model is for, [n]; for recipes that need one.
        window: tokens of that text that are seen together.
        work: folder for finished layers of a calibrated recipe, so that the same call goes on where it was stopped. It
            stays: remove it, by `resume.remove_parts`, once the model has been saved.
        on_weight: called with (weights done, weights in all), a layer's counting singly.
        types: "ggml": only what a type of ggml's holds without loss, so that `save_checkpoint` writes it as GGUF bit
            for bit. Scales are float16 then, zero points of uint schemes offsets, and a target of bits a weight is met
            with types of 2 to 8 bits, whatever groups the rules have.
        on_note: called with what a recipe asks for and the family cannot have: scales of inputs that nothing makes.

    Raises:
        LlamaJaxError: if the model is quantized already (but a file's that also holds what only floats are made of: its
            packed weights stay as they are), a rule does not fit its weight, rules and weights do not cover
            each other, a norm would be quantized, or the recipe needs a calibration text and none is given.
    """
    recipe = _checked_recipe(recipe, calibration)
    config = model.config
    packed = _packed(model, recipe)
    read = _reader(model)
    rules = _rules(recipe, config, types, on_note)
    if calibration is None or not recipe.needs_calibration:
        return _uncalibrated(read, recipe, rules, packed, config, types, on_weight)
    windows = calibrate.calibration_windows(calibration, config, window)
    steps = _Steps(on_weight, len(rules) * (2 if recipe.target_bpw else 1) + recipe.tuning * len(windows))
    parts = None
    if work is not None:
        from llamajax.quantization.resume import (
            PartsOnDisk,  # here: it needs safetensors, without which random models can be made
        )

        parts = PartsOnDisk(work, _work_key(rules, recipe, windows, config, read, types))
    if recipe.target_bpw is not None:
        if recipe.bits_by == "loss":
            rules = _chosen_bits(read, rules, recipe, windows, config, parts, steps, _of_types(types, config))
        else:
            rules = _bits_by_roles(read, rules, recipe, config, steps, types)
    made = calibrated(read, rules, windows, config, recipe.propagation, parts, steps.add)
    return tune(made, read, windows, recipe.tuning, on_step=steps.add) if recipe.tuning else made


def _uncalibrated(
    read: Callable[[Place], Any],
    recipe: Recipe,
    rules: Rules,
    packed: Mapping[Place, Any],
    config: Config,
    types: str | None,
    on_weight: Callable[[int, int], None],
) -> Llama:
    """Every weight by itself; `packed` are those that stay as they are, and what they are made of."""
    steps = _Steps(on_weight, len(rules) * (2 if recipe.target_bpw else 1))
    if recipe.target_bpw is not None:
        rules = _bits_by_roles(read, rules, recipe, config, steps, types)
    stacks, of = Stacks(config, lambda place: packed.get(place, rules[place])), specs(config)

    def one(place: Place) -> Any:
        return read(place) if place in packed else quantize_weight(place, read(place), rules[place], of[place])

    for place, weight in _side_by_side(one, tuple(of)):
        stacks.put(place, weight)
        steps.add()
    return stacks.model()


def _bits_by_roles(
    read: Callable[[Place], Any], rules: Rules, recipe: Recipe, config: Config, steps: "_Steps", types: str | None
) -> dict[Place, Rule]:
    assert recipe.target_bpw is not None  # of a recipe that chooses bits
    of_types = _of_types(types, config)
    return choose_bits_by_roles(read, rules, recipe.target_bpw, config, steps.add, of_types, recipe.least_bits)


def _of_types(types: str | None, config: Config) -> Callable[[Place, Rule], list[Rule]] | None:
    """What bits are chosen from, where only some types may be made."""
    return (lambda place, rule: candidates(place, rule, config)) if types else None


def _rules(recipe: Recipe, config: Config, types: str | None, on_note: Callable[[str], None]) -> Rules:
    """The rule of each weight, once it is sure that they can be followed; arguments and errors as of `quantize`."""
    rules = assigned(recipe.rules, config)
    if types not in (None, "ggml"):
        raise LlamaJaxError(f"types is {types!r}: expected None or 'ggml'")
    if types is not None:
        rules = for_ggml(rules, config, recipe.target_bpw is not None)
    rules, only_looked_up = without_inputs(rules, config)
    if only_looked_up:
        on_note(f"{', '.join(map(str, only_looked_up))}: rounded to nearest: nothing is multiplied with it")
    _check_shared_inputs(rules, config)
    rules, unscaled = without_makers(rules, config)
    if unscaled:
        on_note(
            f"{', '.join(unscaled)}: quantized without scaling of their inputs, which is the residual stream itself in "
            f"the family {config.family!r}: nothing that makes it could undo the scales"
        )
    return rules


def _packed(model: Llama | Opened, recipe: Recipe) -> dict[Place, Any]:
    """The weights that stay packed as they are, each with what its layers must share to be one stack.

    Those of a file most of whose weights have no packed form here (`Source.expanded`); otherwise there may be none.
    """
    if not quantized(model if isinstance(model, Llama) else model.abstract):
        return {}
    if isinstance(model, Llama) or not model.source.expanded:
        raise LlamaJaxError("the model is quantized already: quantize the weights that it was made from")
    if recipe.needs_calibration:
        raise LlamaJaxError(
            f"{model.path}: some of its weights are packed already: expected a recipe that needs no calibration text, "
            "such as int4-g32"
        )
    return {place: kind_of(weight) for place, weight in model.source.abstract.items() if quantized(weight)}


def _checked_recipe(recipe: str | Path | Recipe | tuple[Rule, ...], calibration: np.ndarray | None) -> Recipe:
    if isinstance(recipe, tuple):
        recipe = Recipe(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe)
    if recipe.needs_calibration and calibration is None:
        raise LlamaJaxError("the recipe needs a calibration text, to know what weights are multiplied with: give one")
    return recipe


def _reader(model: Llama | Opened) -> Callable[[Place], Any]:
    """One weight at a time, from memory or from a file."""
    if isinstance(model, Opened):
        return model.read_weight
    return weights_of(jax.tree.map(np.asarray, model)).__getitem__


def _side_by_side(work: Callable[[Place], Any], places: Sequence[Place]) -> Iterator[tuple[Place, Any]]:
    """Results in order, while the next ones are being made: a thread that waits for a file leaves the others a core."""
    with workers(_WORKERS) as pool:
        coming = collections.deque(pool.submit(work, place) for place in places[:_WORKERS])
        for i, place in enumerate(places):
            made = coming.popleft().result()
            if i + _WORKERS < len(places):
                coming.append(pool.submit(work, places[i + _WORKERS]))
            yield place, made


def _check_shared_inputs(rules: Rules, config: Config) -> None:
    """That weights with a common input agree on how it is scaled."""
    for layer in range(config.num_layers):
        for names in inputs(config, layer).values():
            scalings = {rules[Place(name, layer)].scaling for name in names}
            if len(scalings) > 1:
                raise LlamaJaxError(
                    f"{', '.join(names)} of layer {layer} share their input, but the recipe scales it by "
                    f"{' and '.join(sorted(map(str, scalings)))}: expected one scaling for all of them"
                )


class _Steps:
    """Counts weights for a progress bar."""

    def __init__(self, on_weight: Callable[[int, int], None], total: int):
        self._on_weight, self._total, self._done = on_weight, total, 0

    def add(self, count: int = 1) -> None:
        self._done += count
        self._on_weight(self._done, self._total)


def _chosen_bits(
    read: Callable[[Place], Any],
    rules: Rules,
    recipe: Recipe,
    windows_WT: np.ndarray,
    config: Config,
    parts: "PartsOnDisk | None",
    steps: _Steps,
    of_types: Callable[[Place, Rule], list[Rule]] | None,
) -> dict[Place, Rule]:
    """`choose_bits`, or what it chose before the work was stopped."""
    stored = parts.load_arrays("bits") if parts else None
    if stored is not None:
        steps.add(len(rules))
        forms = json.loads(stored[1])
    else:
        assert recipe.target_bpw is not None  # of a recipe that chooses bits
        chosen = choose_bits(read, rules, recipe.target_bpw, windows_WT, config, steps.add, of_types, recipe.least_bits)
        forms = [{name: getattr(rule, name) for name in _FORM} for rule in chosen.values()]
        if parts:
            parts.store_arrays("bits", {}, json.dumps(forms))
    return {
        place: rule if rule.keep else dataclasses.replace(rule, **form)
        for (place, rule), form in zip(rules.items(), forms, strict=True)
    }


def _work_key(
    rules: Rules,
    recipe: Recipe,
    windows: np.ndarray,
    config: Config,
    read: Callable[[Place], Any],
    types: str | None,
) -> dict[str, Any]:
    """What the result depends on: named in an error where it differs from what a folder was begun with."""
    weights = hashlib.sha256()
    for place in specs(config):
        weights.update(np.ascontiguousarray(read(place)).view(np.uint8).data)
    listed = [[str(place), dataclasses.asdict(rule)] for place, rule in rules.items()]
    return {
        "version": 6,
        "recipe (sha256)": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "target_bpw": recipe.target_bpw,
        "least_bits": recipe.least_bits,
        "bits_by": recipe.bits_by,
        "propagation": recipe.propagation,
        **({"types": types} if types else {}),
        "config": config.to_dict(),
        "windows and tokens of each": list(windows.shape),
        "calibration text (sha256)": hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest(),
        "weights (sha256)": weights.hexdigest(),
    }
