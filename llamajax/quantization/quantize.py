"""Quantizes a model by a recipe: the same tree, with a `QTensor` where a weight array stood.

Weights are read, quantized and put away one by one, so that memory is that of the result, and of one layer's floats
where a recipe needs calibration: then each layer is quantized with the activations that the quantized layers before it
make of a text.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.checkpoint import Opened
from llamajax.checkpoint.naming import STACKED, Place, is_quantized, named_leaves, named_weights, tensor_places
from llamajax.checkpoint.stacks import LayerStacks
from llamajax.config import Config, preset_folder
from llamajax.errors import LlamaJaxError
from llamajax.files import read_toml, shortened
from llamajax.model import Llama, RMSNorm, abstract_model
from llamajax.quantization import calibrate
from llamajax.quantization.bit_search import choose_bits
from llamajax.quantization.quantize_weight import in_dtype, naming, quantize_weight
from llamajax.workers import workers
from quant import QTensor
from quant.recipe import Recipe, Rule, assign, recipe_from

if TYPE_CHECKING:
    from llamajax.quantization.resume import PartsOnDisk

_WORKERS = 3  # weights in work at a time

Rules = Mapping[tuple[str, int | None], Rule]


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


def assigned(rules: Sequence[Rule], config: Config) -> dict[tuple[str, int | None], Rule]:
    """The rule of each weight of each layer.

    Raises:
        LlamaJaxError: if rules and weights do not cover each other, or a norm would be quantized.
    """
    leaves = named_leaves(abstract_model(config))
    try:
        chosen = assign(rules, {name: config.num_layers if name.startswith(STACKED) else None for name in leaves})
    except ValueError as error:
        raise LlamaJaxError(str(error)) from None
    for (name, layer), rule in chosen.items():
        if leaves[name].ndim - (layer is not None) == 1 and not rule.keep:
            raise LlamaJaxError(
                f"{Place(name, layer)}: the rule for {rule.weights!r} would quantize a norm, which is no matrix: begin "
                "the recipe with a rule that keeps norms (weights = '*norm*', keep = true)"
            )
    return chosen


def quantize(
    model: Llama | Opened,
    recipe: str | Path | Recipe | tuple[Rule, ...],
    *,
    calibration: np.ndarray | None = None,
    window: int = 512,
    work: Path | None = None,
    on_weight: Callable[[int, int], None] = lambda done, total: None,
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

    Raises:
        LlamaJaxError: if the model is quantized already, a rule does not fit its weight, rules and weights do not cover
            each other, a norm would be quantized, or the recipe needs a calibration text and none is given.
    """
    recipe = _checked_recipe(recipe, calibration)
    config = model.config
    if is_quantized(model if isinstance(model, Llama) else model.abstract):
        raise LlamaJaxError("the model is quantized already: quantize the weights that it was made from")
    read = _reader(model)
    rules = assigned(recipe.rules, config)
    _check_shared_inputs(rules, config)
    if calibration is None or not recipe.needs_calibration:
        stacks = LayerStacks(rules, config)
        one = lambda place: quantize_weight(place, read(place), rules[place])  # noqa: E731
        for done, (place, weight) in enumerate(_side_by_side(one, tensor_places(config)), 1):
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

        parts = PartsOnDisk(work, _work_key(rules, recipe.target_bpw, windows, config, read))
    if recipe.target_bpw is not None:
        rules = _chosen_bits(read, rules, recipe.target_bpw, windows, config, parts, steps)
    return _calibrated(read, rules, windows, config, parts, steps)


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
    leaves = named_weights(model)
    return lambda place: leaves[place.name] if place.layer is None else leaves[place.name][place.layer]


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
        for names in calibrate.INPUTS.values():
            scalings = {rules[STACKED + name, layer].scaling for name in names}
            if len(scalings) > 1:
                raise LlamaJaxError(
                    f"{', '.join(names)} of layer {layer} share their input, but the recipe scales it by "
                    f"{' and '.join(sorted(map(str, scalings)))}: expected one scaling for all of them"
                )
    for name in ("embed_VD", "head_VD"):
        if (name, None) in rules and rules[name, None].scaling is not None:
            raise LlamaJaxError(
                f"{name}: scaling of the head's inputs is not supported: expected a rule without scaling"
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
) -> dict[tuple[str, int | None], Rule]:
    """`choose_bits`, or what it chose before the work was stopped."""
    stored = parts.load_arrays("bits") if parts else None
    if stored is not None:
        steps.add(len(rules))
        schemes = json.loads(stored[1])
    else:
        chosen = choose_bits(read, rules, target_bpw, windows_WT, config, steps.add)
        schemes = [rule.scheme for rule in chosen.values()]
        if parts:
            parts.store_arrays("bits", {}, json.dumps(schemes))
    return {
        key: dataclasses.replace(rule, scheme=scheme)
        for (key, rule), scheme in zip(rules.items(), schemes, strict=True)
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
    stacks = LayerStacks(rules, config)
    embed = quantize_weight(Place("embed_VD", None), read(Place("embed_VD", None)), rules["embed_VD", None])
    stacks.put(Place("embed_VD", None), embed)
    steps.add()
    x_WTD = np.array(calibrate.dense(embed)[windows_WT])
    for layer in range(config.num_layers):
        made = parts.load(f"layer-{layer}") if parts else None
        if made is None:
            made = _calibrated_layer(read, rules, layer, x_WTD, config)
            if parts:
                parts.store(f"layer-{layer}", made)
        for name, weight in made.items():
            stacks.put(Place(STACKED + name, layer), weight)
        block = calibrate.block_of({name: calibrate.dense(weight) for name, weight in made.items()}, config)
        x_WTD = calibrate.advance(block, x_WTD)
        steps.add(len(made))
    norm = Place("norm.weight_D", None)
    stacks.put(norm, quantize_weight(norm, read(norm), rules[norm]))
    steps.add()
    if not config.tied_embeddings:
        head = Place("head_VD", None)
        rule, seen = rules[head], None
        if rule.needs_calibration:
            final_norm = RMSNorm(config.width, config.norm_eps, jnp.float32)
            final_norm.weight_D.set_value(calibrate.dense(read(norm)))
            hidden_WTD = np.array(jax.jit(lambda x_WTD: final_norm(x_WTD))(x_WTD))
            seen = calibrate.observe_array(hidden_WTD, rule.method == "gptq")
        stacks.put(head, quantize_weight(head, read(head), rule, seen))
        steps.add()
    return stacks.model()


def _calibrated_layer(
    read: Callable[[Place], Any], rules: Rules, layer: int, x_WTD: np.ndarray, config: Config
) -> dict[str, Any]:
    """One layer: first its inputs are scaled where rules say so, then its weights quantized in the order of their use.

    The statistics behind each group of weights are those with the groups before it quantized already ("true
    sequential" in GPTQ's reference implementation).
    """
    names = [name.removeprefix(STACKED) for name, of in rules if of == layer]
    rule_of = {name: rules[STACKED + name, layer] for name in names}
    stored = {name: read(Place(STACKED + name, layer)) for name in names}
    dtypes = {name: stored[name].dtype for name in names}
    dense = {name: calibrate.dense(stored.pop(name)) for name in names}
    _scale_inputs(dense, rule_of, x_WTD, config, dtypes, layer)
    made: dict[str, Any] = {}
    for group, members in calibrate.INPUTS.items():
        seen = None
        if any(rule_of[name].needs_calibration for name in members):
            hessians = any(rule_of[name].method == "gptq" for name in members)
            seen = calibrate.observe(calibrate.block_of(dense, config), x_WTD, (group,), hessians)[group]
        for name in members:
            place, rule = Place(STACKED + name, layer), rule_of[name]
            made[name] = quantize_weight(
                place, in_dtype(place, dense[name], dtypes[name]) if rule.keep else dense[name], rule, seen
            )
            dense[name] = calibrate.dense(made[name])
            if isinstance(made[name], QTensor):
                made[name] = dataclasses.replace(made[name], dtype=np.dtype(dtypes[name]))
    for name in names:
        if name not in made:
            place = Place(STACKED + name, layer)
            made[name] = quantize_weight(place, in_dtype(place, dense[name], dtypes[name]), rule_of[name])
    return {name: made[name] for name in names}


def _scale_inputs(
    dense: dict[str, jax.Array],
    rule_of: dict[str, Rule],
    x_WTD: np.ndarray,
    config: Config,
    dtypes: Mapping[str, Any],
    layer: int,
) -> None:
    """Finds and folds the scales of a layer's inputs, `dense` being changed; the layer computes what it did."""
    groups = tuple(group for group, members in calibrate.INPUTS.items() if rule_of[members[0]].scaling is not None)
    if not groups:
        return
    seen = calibrate.observe(calibrate.block_of(dense, config), x_WTD, groups, hessians=False)
    # From the last input to the first: what is folded into `up` and `value` is then scaled as their own rows are.
    for group in reversed(groups):
        members = calibrate.INPUTS[group]
        rule, producer = rule_of[members[0]], calibrate.PRODUCERS[group]
        with naming(f"{', '.join(members)} of layer {layer}"):
            scale_K = calibrate.input_scale(group, rule, [dense[name] for name in members], seen[group], config)
        calibrate.fold(dense, group, scale_K, config, dtypes[producer])
        if not jnp.isfinite(dense[producer]).all():
            raise LlamaJaxError(
                f"{Place(STACKED + producer, layer)}: scaled by {rule.scaling}, a value is above the range of "
                f"{dtypes[producer]}: convert the model to bfloat16 or float32 first"
            )


def _work_key(
    rules: Rules, target_bpw: float | None, windows: np.ndarray, config: Config, read: Callable[[Place], Any]
) -> dict[str, Any]:
    """What the result depends on: named in an error where it differs from what a folder was begun with."""
    weights = hashlib.sha256()
    for place in tensor_places(config):
        weights.update(np.ascontiguousarray(read(place)).view(np.uint8).data)
    listed = [[name, layer, dataclasses.asdict(rule)] for (name, layer), rule in rules.items()]
    return {
        "version": 2,
        "recipe (sha256)": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "target_bpw": target_bpw,
        "config": config.to_dict(),
        "windows and tokens of each": list(windows.shape),
        "calibration text (sha256)": hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest(),
        "weights (sha256)": weights.hexdigest(),
    }
