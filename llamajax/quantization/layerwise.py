"""Quantizes layer by layer, each layer calibrated on activations that the quantized layers before it compute."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.checkpoint.assemble import Stacks
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.model import Llama
from llamajax.parameters import Place, inputs, specs
from llamajax.quantization import calibrate
from llamajax.quantization.quantize_weight import in_dtype, naming, quantize_weight
from quant import Rule, missing_by_inputs, propagated, values

if TYPE_CHECKING:
    from llamajax.quantization.resume import PartsOnDisk

Rules = Mapping[Place, Rule]


def calibrated(
    read: Callable[[Place], Any],
    rules: Rules,
    windows_WT: np.ndarray,
    config: Config,
    propagation: float,
    parts: "PartsOnDisk | None",
    on_weights: Callable[[int], None],
) -> Llama:
    """Quantizes every weight by its rule, calibrated on the activations of the quantized layers before it.

    Args:
        read: returns one weight, as floats.
        rules: the rule for each weight.
        windows_WT: calibration text.
        config: the architecture.
        propagation: as `Recipe.propagation`. If it is not 0, the float model's activations are computed as well.
        parts: where finished layers are kept, or None.
        on_weights: called with the number of weights finished since the last call.
    """
    of = specs(config)
    stacks = Stacks(config, rules.__getitem__)

    def finish(place: Place, seen: calibrate.Statistics | None = None) -> Any:
        weight = quantize_weight(place, read(place), rules[place], of[place], seen)
        stacks.put(place, weight)
        on_weights(1)
        return weight

    embed_place, norm_place, head = Place("embed_VD"), Place("norm.weight_D"), Place("head_VD")
    outside = {"embed_VD": read(embed_place), "norm.weight_D": values(read(norm_place))}
    float_WTD = calibrate.embedded(outside, windows_WT, config)
    seen = None
    if config.tied_embeddings and rules[embed_place].needs_calibration:
        seen = _seen_by_head(
            outside, calibrate.behind_layers(read, float_WTD.copy(), config), rules[embed_place], config
        )
    x_WTD = calibrate.embedded(outside | {"embed_VD": finish(embed_place, seen)}, windows_WT, config)
    for layer in range(config.num_layers):
        made = parts.load(f"layer-{layer}") if parts else None
        before = _Before(x_WTD, float_WTD if propagation else None, propagation)
        if made is None:
            made = _calibrated_layer(read, rules, layer, before, config)
            if parts:
                parts.store(f"layer-{layer}", made)
        elif propagation:
            float_WTD = calibrate.advance(calibrate.float_block(read, layer, config), float_WTD, config.numbers(layer))
        for name, weight in made.items():
            stacks.put(Place(name, layer), weight)
        block = calibrate.block_of({name: values(weight) for name, weight in made.items()}, config, layer)
        x_WTD = calibrate.advance(block, x_WTD, config.numbers(layer))
        on_weights(len(made))
    finish(norm_place)
    if head in of:
        finish(head, _seen_by_head(outside, x_WTD, rules[head], config) if rules[head].needs_calibration else None)
    return stacks.model()


@dataclasses.dataclass
class _Before:
    """Activations before a layer.

    Attributes:
        x_WTD: from the quantized layers before it, float32.
        float_WTD: from the float model's layers, or None; `_calibrated_layer` replaces them by those behind the layer.
        propagation: how far weights are moved to compensate for the difference.
    """

    x_WTD: np.ndarray
    float_WTD: np.ndarray | None
    propagation: float


def _seen_by_head(outside: Mapping[str, Any], x_WTD: np.ndarray, rule: Rule, config: Config) -> calibrate.Statistics:
    """Collects statistics of the head's input."""
    model = calibrate.outside_model(outside, config)
    hidden_WTD = np.array(jax.jit(lambda model, x_WTD: model.norm(x_WTD))(model, x_WTD))
    return calibrate.observe_array(hidden_WTD, rule.method == "gptq")


def _calibrated_layer(
    read: Callable[[Place], Any], rules: Rules, layer: int, before: _Before, config: Config
) -> dict[str, Any]:
    """Quantizes one layer: scales inputs where rules say so, then quantizes the weights in the order of their use.

    The statistics for each group of weights are computed with the groups before it already quantized ("true sequential"
    in GPTQ's reference implementation).
    """
    of = {place.name: spec for place, spec in specs(config).items() if place.layer == layer}
    rule_of = {name: rules[Place(name, layer)] for name in of}
    stored = {name: read(Place(name, layer)) for name in of}
    dtypes = {name: stored[name].dtype for name in of}
    dense = {name: values(stored.pop(name)) for name in of}
    _scale_inputs(dense, rule_of, before.x_WTD, config, dtypes, layer)
    wanted_of = _wanted(dense, before, rule_of, layer, config)
    made: dict[str, Any] = {}
    for group, members in inputs(config, layer).items():
        seen = None
        if any(rule_of[name].needs_calibration for name in members):
            hessians = any(rule_of[name].method == "gptq" for name in members)
            block, wanted = calibrate.block_of(dense, config, layer), wanted_of.pop(group, None)
            numbers = config.numbers(layer)
            seen = calibrate.observe(block, before.x_WTD, {group: members[0]}, hessians, numbers, wanted)[group]
            _make_up(dense, members, seen, wanted, before.propagation)
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


def _wanted(
    dense: Mapping[str, Any], before: _Before, rule_of: Mapping[str, Rule], layer: int, config: Config
) -> dict[str, calibrate.Wanted]:
    """Returns, by input name, the float model's activations that weights quantized by GPTQ should reproduce.

    For the weights that add to the residual stream last this is the layer's output, so that they also compensate for
    the error in the residual stream. Replaces `before.float_WTD` by the activations behind the layer.
    """
    if before.float_WTD is None:
        return {}
    shared = inputs(config, layer)
    corrected = {group: members for group, members in shared.items() if rule_of[members[0]].method == "gptq"}
    firsts = {group: members[0] for group, members in corrected.items()}
    block = calibrate.block_of(dense, config, layer)
    made, before.float_WTD[...] = calibrate.inputs_and_output(block, before.float_WTD, firsts, config.numbers(layer))
    wanted = {group: calibrate.Wanted(made[group], False) for group in firsts}
    last = list(shared)[-1]
    if last in wanted and config.norms == "before" and config.residual_scale == 1:
        wanted[last] = calibrate.Wanted(before.float_WTD, True)
    return wanted


def _make_up(
    dense: dict[str, Any],
    members: tuple[str, ...],
    seen: calibrate.Statistics,
    wanted: calibrate.Wanted | None,
    propagation: float,
) -> None:
    """Moves weights that share an input so that they compensate for its errors; changes `dense` in place."""
    if wanted is None or seen.missing is None or seen.hessian_KK is None:
        return
    for name in members:
        missing_KM = seen.missing if wanted.is_output else missing_by_inputs(seen.missing, dense[name])
        dense[name] = propagated(dense[name], seen.hessian_KK, missing_KM, propagation)


def _scale_inputs(
    dense: dict[str, jax.Array],
    rule_of: dict[str, Rule],
    x_WTD: np.ndarray,
    config: Config,
    dtypes: Mapping[str, Any],
    layer: int,
) -> None:
    """Finds and folds the scales of a layer's inputs; changes `dense` in place. The layer's output stays the same."""
    shared, of = inputs(config, layer), {p.name: spec for p, spec in specs(config).items() if p.layer == layer}
    groups = {group: members[0] for group, members in shared.items() if rule_of[members[0]].scaling is not None}
    if not groups:
        return
    block = calibrate.block_of(dense, config, layer)
    seen = calibrate.observe(block, x_WTD, groups, hessians=False, numbers=config.numbers(layer))
    # From the last input to the first: scales folded into `up` and `value` then count when their own inputs are scaled.
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
