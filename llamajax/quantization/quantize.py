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
import jax.numpy as jnp
import numpy as np

from llamajax.checkpoint import Opened
from llamajax.checkpoint.assemble import Stacks
from llamajax.config import Config, preset_folder
from llamajax.errors import LlamaJaxError
from llamajax.files import read_toml, shortened
from llamajax.model import Llama, model_from
from llamajax.parameters import LAYERS, Place, inputs, leaves, specs, weights_of
from llamajax.quantization import calibrate
from llamajax.quantization.bit_search import choose_bits
from llamajax.quantization.ggml_rules import candidates, for_ggml
from llamajax.quantization.quantize_weight import in_dtype, naming, quantize_weight
from llamajax.workers import workers
from quant import Recipe, Rule, assign, kind_of, quantized, recipe_from, values

if TYPE_CHECKING:
    from llamajax.quantization.resume import PartsOnDisk

_WORKERS = 3  # weights in work at a time
_FORM = ("scheme", "group_size", "scale_scheme", "offset")  # what a search for bits chooses

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
        stacks = Stacks(config, lambda place: packed.get(place, rules[place]))

        def one(place: Place) -> Any:
            return read(place) if place in packed else quantize_weight(place, read(place), rules[place], of[place])

        of = specs(config)
        for done, (place, weight) in enumerate(_side_by_side(one, tuple(specs(config))), 1):
            stacks.put(place, weight)
            on_weight(done, len(rules))
        return stacks.model()
    windows = calibrate.calibration_windows(calibration, config, window)
    steps = _Steps(on_weight, len(rules) * (2 if recipe.target_bpw else 1))
    parts = None
    if work is not None:
        from llamajax.quantization.resume import (
            PartsOnDisk,  # here: it needs safetensors, without which random models can be made
        )

        parts = PartsOnDisk(work, _work_key(rules, recipe.target_bpw, windows, config, read, types))
    if recipe.target_bpw is not None:
        of_types = (lambda place, rule: candidates(place, rule, config)) if types else None
        rules = _chosen_bits(read, rules, recipe.target_bpw, windows, config, parts, steps, of_types)
    return _calibrated(read, rules, windows, config, parts, steps)


def _rules(recipe: Recipe, config: Config, types: str | None, on_note: Callable[[str], None]) -> Rules:
    """The rule of each weight, once it is sure that they can be followed; arguments and errors as of `quantize`."""
    rules = assigned(recipe.rules, config)
    if types not in (None, "ggml"):
        raise LlamaJaxError(f"types is {types!r}: expected None or 'ggml'")
    if types is not None:
        rules = for_ggml(rules, config, recipe.target_bpw is not None)
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
    target_bpw: float,
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
        chosen = choose_bits(read, rules, target_bpw, windows_WT, config, steps.add, of_types)
        forms = [{name: getattr(rule, name) for name in _FORM} for rule in chosen.values()]
        if parts:
            parts.store_arrays("bits", {}, json.dumps(forms))
    return {
        place: rule if rule.keep else dataclasses.replace(rule, **form)
        for (place, rule), form in zip(rules.items(), forms, strict=True)
    }


def _calibrated(
    read: Callable[[Place], Any],
    rules: Rules,
    windows_WT: np.ndarray,
    config: Config,
    parts: "PartsOnDisk | None",
    steps: _Steps,
) -> Llama:
    """Layer by layer, each with what the quantized layers before it make of the calibration text."""
    of = specs(config)
    stacks = Stacks(config, rules.__getitem__)

    def finish(place: Place, seen: calibrate.Statistics | None = None) -> Any:
        weight = quantize_weight(place, read(place), rules[place], of[place], seen)
        stacks.put(place, weight)
        steps.add()
        return weight

    embed = finish(Place("embed_VD"))
    norm = values(read(Place("norm.weight_D")))
    whole = _whole(config, {"embed_VD": embed, "norm.weight_D": norm})
    x_WTD = np.array(jax.jit(Llama.embed)(whole, windows_WT))
    for layer in range(config.num_layers):
        made = parts.load(f"layer-{layer}") if parts else None
        if made is None:
            made = _calibrated_layer(read, rules, layer, x_WTD, config)
            if parts:
                parts.store(f"layer-{layer}", made)
        for name, weight in made.items():
            stacks.put(Place(name, layer), weight)
        block = calibrate.block_of({name: values(weight) for name, weight in made.items()}, config, layer)
        x_WTD = calibrate.advance(block, x_WTD, config.numbers(layer))
        steps.add(len(made))
    finish(Place("norm.weight_D"))
    head = Place("head_VD")
    if head in of:
        seen = None
        if rules[head].needs_calibration:
            hidden_WTD = np.array(jax.jit(lambda model, x_WTD: model.norm(x_WTD))(whole, x_WTD))
            seen = calibrate.observe_array(hidden_WTD, rules[head].method == "gptq")
        finish(head, seen)
    return stacks.model()


def _whole(config: Config, weights: Mapping[str, Any]) -> Llama:
    """A model of some weights outside of its layers: enough for `embed`, the final norm or `head`."""
    return model_from(dict.fromkeys(leaves(config)) | dict(weights), config)


def _calibrated_layer(
    read: Callable[[Place], Any], rules: Rules, layer: int, x_WTD: np.ndarray, config: Config
) -> dict[str, Any]:
    """One layer: first its inputs are scaled where rules say so, then its weights quantized in the order of their use.

    The statistics behind each group of weights are those with the groups before it quantized already ("true
    sequential" in GPTQ's reference implementation).
    """
    of = {place.name: spec for place, spec in specs(config).items() if place.layer == layer}
    rule_of = {name: rules[Place(name, layer)] for name in of}
    stored = {name: read(Place(name, layer)) for name in of}
    dtypes = {name: stored[name].dtype for name in of}
    dense = {name: values(stored.pop(name)) for name in of}
    numbers = config.numbers(layer)
    _scale_inputs(dense, rule_of, x_WTD, config, dtypes, layer)
    made: dict[str, Any] = {}
    for group, members in inputs(config, layer).items():
        seen = None
        if any(rule_of[name].needs_calibration for name in members):
            hessians = any(rule_of[name].method == "gptq" for name in members)
            block = calibrate.block_of(dense, config, layer)
            seen = calibrate.observe(block, x_WTD, {group: members[0]}, hessians, numbers)[group]
        for name in members:
            place, rule = Place(name, layer), rule_of[name]
            weight = in_dtype(place, dense[name], dtypes[name]) if rule.keep else dense[name]
            made[name] = quantize_weight(place, weight, rule, of[name], seen)
            dense[name] = values(made[name])
            if not rule.keep:
                made[name] = dataclasses.replace(made[name], dtype=np.dtype(dtypes[name]))
    for name in of:
        if name not in made:
            place = Place(name, layer)
            made[name] = quantize_weight(place, in_dtype(place, dense[name], dtypes[name]), rule_of[name], of[name])
    return {name: made[name] for name in of}


def _scale_inputs(
    dense: dict[str, jax.Array],
    rule_of: dict[str, Rule],
    x_WTD: np.ndarray,
    config: Config,
    dtypes: Mapping[str, Any],
    layer: int,
) -> None:
    """Finds and folds the scales of a layer's inputs, `dense` being changed; the layer computes what it did."""
    shared, of = inputs(config, layer), {p.name: spec for p, spec in specs(config).items() if p.layer == layer}
    groups = {group: members[0] for group, members in shared.items() if rule_of[members[0]].scaling is not None}
    if not groups:
        return
    block = calibrate.block_of(dense, config, layer)
    seen = calibrate.observe(block, x_WTD, groups, hessians=False, numbers=config.numbers(layer))
    # From the last input to the first: what is folded into `up` and `value` is then scaled as their own rows are.
    for group in reversed(groups):
        members = shared[group]
        rule, producer = rule_of[members[0]], of[members[0]].maker
        with naming(f"{', '.join(members)} of layer {layer}"):
            weights = [dense[name] for name in members]
            scale_K = calibrate.input_scale(rule, weights, seen[group], config, dense[producer].shape[-1])
        calibrate.fold(dense, of, group, scale_K, config, dtypes[producer])
        if not all(jnp.isfinite(dense[name]).all() for name in (producer, *filter(None, (of[producer].bias,)))):
            raise LlamaJaxError(
                f"{Place(producer, layer)}: scaled by {rule.scaling}, a value is above the range of "
                f"{dtypes[producer]}: convert the model to bfloat16 or float32 first"
            )


def _work_key(
    rules: Rules,
    target_bpw: float | None,
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
        "version": 4,
        "recipe (sha256)": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "target_bpw": target_bpw,
        **({"types": types} if types else {}),
        "config": config.to_dict(),
        "windows and tokens of each": list(windows.shape),
        "calibration text (sha256)": hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest(),
        "weights (sha256)": weights.hexdigest(),
    }
