"""Quantizes a model by a recipe: the result is the same tree, with a `QTensor` in place of each quantized array.

Weights are read, quantized and stored one by one, so that memory holds the result and little else. A recipe that needs
calibration also needs memory for the floats of one layer: each layer is quantized with the activations that the
quantized layers before it compute from a text.
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
from llamajax.quantization.bit_search import Choice, choose_bits
from llamajax.quantization.ggml_rules import candidates, for_ggml
from llamajax.quantization.layerwise import calibrated
from llamajax.quantization.own_tokens import own_tokens
from llamajax.quantization.quantize_weight import quantize_weight
from llamajax.quantization.tune import tune
from llamajax.workers import workers
from quant import Recipe, Rule, assign, kind_of, quantized, recipe_from

if TYPE_CHECKING:
    from llamajax.quantization.resume import PartsOnDisk

_WORKERS = 3  # weights in work at a time
_FORM = ("scheme", "group_size", "scale_scheme", "scale_group", "offset")  # fields that a search for bits sets

Rules = Mapping[Place, Rule]


def recipe_names() -> list[str]:
    """Returns the names of the built-in recipes, sorted."""
    return sorted(path.stem for path in (preset_folder() / "recipes").glob("*.toml"))


def read_recipe(name: str | Path) -> Recipe:
    """Reads a built-in recipe by name, or a recipe from a .toml file.

    Raises:
        LlamaJaxError: if there is no such recipe, or the file does not hold one.
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
    """Returns the rule for each weight of each layer.

    Some families have biases and sinks, which cannot be quantized. They stay as they are where a rule also matches
    matrices; a rule that matches only them must have keep = true, otherwise it is refused.

    Raises:
        LlamaJaxError: if a weight has no rule, a rule matches no weight, or a norm would be quantized.
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
                f"{place}: the rule for {rule.weights!r} would quantize a weight that is no matrix: begin the recipe "
                "with a rule that keeps norms (weights = '*norm*', keep = true)"
            )
    return {place: made[place] for place in specced}


def without_makers(rules: Rules, config: Config) -> tuple[dict[Place, Rule], list[str]]:
    """Removes scaling from the rules of weights whose inputs no preceding weight makes channel by channel.

    Such a preceding weight must undo the scaling. It does not exist in families that have no norm before attention and
    feed-forward network (OLMo 2): there the residual stream is the input.

    Returns:
        The rules, and the names (without layer numbers) of the weights that are quantized without scaling.

    Raises:
        LlamaJaxError: if a rule scales the inputs of a weight outside of layers, which has no maker in any family.
    """
    of, made = specs(config), dict(rules)
    skipped: dict[str, None] = {}
    for place, rule in rules.items():
        if rule.scaling is None or of[place].maker:
            continue
        if place.layer is None:
            raise LlamaJaxError(
                f"{place}: scaling of its inputs is not supported, as no weight before it could undo the scales: "
                "expected a rule without scaling"
            )
        made[place] = dataclasses.replace(rule, scaling=None)
        skipped[place.name] = None
    return made, list(skipped)


def without_inputs(rules: Rules, config: Config) -> tuple[dict[Place, Rule], list[Place]]:
    """Replaces GPTQ by round-to-nearest for weights that are only looked up, where a rule matches several weights.

    A rule that matches only such a weight stays as it is; quantizing the weight then raises an error.

    Returns:
        The rules, and the places of the weights that are rounded to nearest.
    """
    of, made, changed = specs(config), dict(rules), []
    shared = collections.Counter(id(rule) for rule in rules.values())
    for place, rule in rules.items():
        if of[place].is_only_looked_up and rule.method == "gptq" and shared[id(rule)] > 1:
            made[place] = rule.to_nearest()
            changed.append(place)
    return made, changed


def quantize(
    model: Llama | Opened,
    recipe: str | Path | Recipe | tuple[Rule, ...],
    *,
    calibration: np.ndarray | None = None,
    window: int = 512,
    bos_id: int | None = None,
    work: Path | None = None,
    on_weight: Callable[[int, int], None] = lambda done, total: None,
    types: Literal["ggml"] | None = None,
    on_note: Callable[[str], None] = warnings.warn,
) -> Llama:
    """Returns the model with its weights quantized by a recipe.

    Groups run along the rows of embeddings (a row is looked up or, in a head, contracted), and along the inputs of
    matrices.

    Args:
        model: a model with arrays as weights, or an opened checkpoint, whose weights are read one by one and never held
            in memory together.
        recipe: name, path, recipe or rules.
        calibration: token ids, [n], of a text like those that the model is used for; only for recipes that need one.
            Windows [W, T] of a text are used as they are (`llamajax.quantization.calibrate.calibration_windows`).
        window: number of tokens of a window, if `calibration` holds ids.
        bos_id: the token that begins each window, if `calibration` holds ids or the model draws tokens itself:
            `Tokenizer.first_id`. Models whose texts begin with BOS compute other activations without it: Gemma 3 270M
            has a perplexity of 84 on WikiText-2 in windows without BOS and of 36 with it. None if texts begin without
            BOS.
        work: folder for finished layers of a calibrated recipe, so that the same call continues where it was stopped.
            The folder stays: remove it with `resume.remove_parts` once the model has been saved.
        on_weight: called with (weights done, weights in all); the weights of each layer count separately.
        types: "ggml" makes only weights that a ggml type holds without loss, so that `save_checkpoint` writes them to
            GGUF bit for bit. Then scales are float16, uint schemes have offsets instead of zero points, and a target of
            bits per weight is met with types of 2 to 8 bits, whatever group sizes the rules have.
        on_note: called with a message for each request of the recipe that is not followed: GPTQ of a weight that is
            only looked up, and scaling of inputs that no weight makes.

    Raises:
        LlamaJaxError: if the model is already quantized, a rule does not fit its weight, a weight has no rule, a rule
            matches no weight, a norm would be quantized, or the recipe needs a calibration text and none is given. A
            file in which some types can be read only as floats may be quantized: its packed weights stay as they are.
    """
    recipe = _checked_recipe(recipe, calibration)
    config = model.config
    packed = _packed(model, recipe)
    read = _reader(model)
    rules = _rules(recipe, config, types, on_note)
    if calibration is None or not recipe.needs_calibration:
        return _uncalibrated(read, recipe, rules, packed, config, types, bos_id, on_weight)
    windows = calibrate.calibration_windows(calibration, config, window, bos_id)
    steps = _Steps(on_weight, _step_count(recipe, rules, config) + recipe.tuning * len(windows))
    parts = None
    if work is not None:
        from llamajax.quantization.resume import (
            PartsOnDisk,  # imported here: it needs safetensors, which is not needed to make random models
        )

        parts = PartsOnDisk(work, _work_key(rules, recipe, windows, config, read, types))
    if recipe.target_bpw is not None:
        if recipe.bits_by == "loss":
            rules = _chosen_bits(read, rules, recipe, windows, config, parts, steps, _of_types(types, config))
        else:
            rules = _bits_by_own_tokens(read, rules, recipe, config, steps, types, bos_id).rules
    made = calibrated(read, rules, windows, config, recipe.propagation, parts, steps.add)
    return tune(made, read, windows, recipe.tuning, on_step=steps.add) if recipe.tuning else made


def _uncalibrated(
    read: Callable[[Place], Any],
    recipe: Recipe,
    rules: Rules,
    packed: Mapping[Place, Any],
    config: Config,
    types: str | None,
    bos_id: int | None,
    on_weight: Callable[[int, int], None],
) -> Llama:
    """Quantizes every weight by itself; weights in `packed` (each with its `kind_of`) stay as they are."""
    steps = _Steps(on_weight, _step_count(recipe, rules, config))
    importance: Mapping[Place, Any] = {}
    if recipe.target_bpw is not None:
        rules, importance = _bits_by_own_tokens(read, rules, recipe, config, steps, types, bos_id)
    stacks, of = Stacks(config, lambda place: packed.get(place, rules[place])), specs(config)

    def one(place: Place) -> Any:
        if place in packed:
            return read(place)
        return quantize_weight(place, read(place), rules[place], of[place], importance=importance.get(place))

    for place, weight in _side_by_side(one, tuple(of)):
        stacks.put(place, weight)
        steps.add()
    return stacks.model()


def _bits_by_own_tokens(
    read: Callable[[Place], Any],
    rules: Rules,
    recipe: Recipe,
    config: Config,
    steps: "_Steps",
    types: str | None,
    bos_id: int | None,
) -> Choice:
    """Returns the result of `choose_bits` for tokens that the model draws."""
    assert recipe.target_bpw is not None  # of a recipe that chooses bits
    windows = own_tokens(read, config, bos_id, on_layers=steps.add)
    of_types = _of_types(types, config)
    return choose_bits(read, rules, recipe.target_bpw, windows, config, steps.add, of_types, recipe.least_bits)


def _step_count(recipe: Recipe, rules: Rules, config: Config) -> int:
    """Returns the steps of quantizing: each weight, again to choose its bits, each layer to draw tokens."""
    if recipe.target_bpw is None:
        return len(rules)
    return 2 * len(rules) + (config.num_layers if recipe.bits_by == "own_tokens" else 0)


def _of_types(types: str | None, config: Config) -> Callable[[Place, Rule], list[Rule]] | None:
    """Returns a function that gives a weight's candidates if only ggml's types are allowed, else None."""
    return (lambda place, rule: candidates(place, rule, config)) if types else None


def _rules(recipe: Recipe, config: Config, types: str | None, on_note: Callable[[str], None]) -> Rules:
    """Returns the rule for each weight, after checking that all can be followed; arguments and errors as `quantize`."""
    rules = assigned(recipe.rules, config)
    if types not in (None, "ggml"):
        raise LlamaJaxError(f"types is {types!r}: expected None or 'ggml'")
    if types is not None:
        rules = for_ggml(rules, config, recipe.target_bpw is not None)
    rules, only_looked_up = without_inputs(rules, config)
    if only_looked_up:
        on_note(f"{', '.join(map(str, only_looked_up))}: rounded to nearest: only looked up, never multiplied")
    _check_shared_inputs(rules, config)
    rules, unscaled = without_makers(rules, config)
    if unscaled:
        on_note(
            f"{', '.join(unscaled)}: quantized without scaling of their inputs: in the family {config.family!r} the "
            "input is the residual stream itself, and no weight before it could undo the scales"
        )
    return rules


def _packed(model: Llama | Opened, recipe: Recipe) -> dict[Place, Any]:
    """Returns the weights that stay packed as they are, each with its `kind_of`, which layers of one stack share.

    Packed weights are allowed only in a file that also has weights without a packed form here (`Source.expanded`).
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
        raise LlamaJaxError("the recipe needs a calibration text, to compute the inputs of the weights: give one")
    return recipe


def _reader(model: Llama | Opened) -> Callable[[Place], Any]:
    """Returns a function that reads one weight, from memory or from a file."""
    if isinstance(model, Opened):
        return model.read_weight
    return weights_of(jax.tree.map(np.asarray, model)).__getitem__


def _side_by_side(work: Callable[[Place], Any], places: Sequence[Place]) -> Iterator[tuple[Place, Any]]:
    """Yields results in order while threads make the next ones: while one waits for a file, others use the cores."""
    with workers(_WORKERS) as pool:
        coming = collections.deque(pool.submit(work, place) for place in places[:_WORKERS])
        for i, place in enumerate(places):
            made = coming.popleft().result()
            if i + _WORKERS < len(places):
                coming.append(pool.submit(work, places[i + _WORKERS]))
            yield place, made


def _check_shared_inputs(rules: Rules, config: Config) -> None:
    """Checks that weights with a common input agree on its scaling."""
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
    """Returns the result of `choose_bits`, or the stored one if earlier work was interrupted after it."""
    stored = parts.load_arrays("bits") if parts else None
    if stored is not None:
        steps.add(len(rules))
        forms = json.loads(stored[1])
    else:
        assert recipe.target_bpw is not None  # of a recipe that chooses bits
        chosen = choose_bits(read, rules, recipe.target_bpw, windows_WT, config, steps.add, of_types, recipe.least_bits)
        forms = [{name: getattr(rule, name) for name in _FORM} for rule in chosen.rules.values()]
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
    """Returns everything that the result depends on, by name; an error names an entry that differs in a work folder."""
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
