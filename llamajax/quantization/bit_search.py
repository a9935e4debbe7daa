"""How many bits each weight gets, given how many the whole model may have: measured, not guessed.

For each weight and each number of bits, the layer is run with just that weight quantized; the error is what that
changes in the layer's output, squared, relative to the output. Errors of different weights are taken to add up.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.model import Llama, model_from
from llamajax.parameters import Place, leaves, specs
from llamajax.quantization import calibrate
from llamajax.quantization.quantize_weight import by_rounding, naming
from llamajax.quantization.sensitivity import LayerGradients, gradients
from quant import Rule, Scheme, allocate, values

_BITS = (2, 3, 4, 5, 6, 8)
# What the search by loss chooses from, as (bits, group size): steps of a quarter to half a bit between 2.3 and 6.3.
_FORMS = ((2, 32), (2, 64), (3, 32), (3, 64), (4, 32), (4, 64), (4, 128), (5, 64), (6, 64), (8, 64))
# Weights of a matrix on which a candidate's error is measured: as many of its outputs.
_MEASURED_WEIGHTS = 2**18
_SAMPLE_TOKENS = 4096
_HEAD_TOKENS = 256

Rules = Mapping[Place, Rule]


def choose_bits(
    read: Callable[[Place], Any],
    rules: Rules,
    target_bpw: float,
    windows_WT: np.ndarray,
    config: Config,
    on_weights: Callable[[int], None],
    candidates: Callable[[Place, Rule], list[Rule]] | None = None,
) -> dict[Place, Rule]:
    """The rules with the bits of each `int` and `uint` scheme chosen.

    Bits are tried by round-to-nearest with clipping, whatever the rule's method: what matters is how weights compare.

    Args:
        read: one weight at a time, floats.
        rules: of every weight.
        target_bpw: bits per weight of the whole model, everything counted.
        windows_WT: calibration text; its first 4,096 tokens are used.
        config: the architecture.
        on_weights: called with how many weights more have been measured.
        candidates: what may be chosen for a weight by its rule; the same rule with other numbers of bits unless given.

    Raises:
        LlamaJaxError: if no weight's bits are free, not even the fewest fit, a weight cannot be quantized, or what it
            makes of the text is not finite.
    """
    windows_WT = windows_WT[: max(1, _SAMPLE_TOKENS // windows_WT.shape[1])]
    candidates = candidates or (lambda place, rule: _candidates(rule))
    options = {place: candidates(place, rule) for place, rule in rules.items()}
    if not any(len(candidates) > 1 for candidates in options.values()):
        raise LlamaJaxError("target_bpw: no rule has an int or uint scheme whose bits could be chosen")
    errors = _measure(read, options, windows_WT, config, on_weights)
    float_bytes = read(Place("norm.weight_D")).dtype.itemsize
    costs = [[_bytes(rule, place, config, float_bytes) for rule in candidates] for place, candidates in options.items()]
    try:
        chosen = allocate(costs, [errors[place] for place in options], target_bpw * config.num_parameters / 8)
    except ValueError as error:
        raise LlamaJaxError(f"target_bpw is {target_bpw}: in bytes, {error}") from None
    return {place: options[place][i] for place, i in zip(options, chosen, strict=True)}


def bits_are_free(rule: Rule) -> bool:
    """Whether the bits of a rule's scheme are a starting point only."""
    if rule.scheme is None or not isinstance(rule.group_size, int) or rule.scale_scheme is not None:
        return False
    return Scheme.named(rule.scheme).kind in ("int", "uint")


def _candidates(rule: Rule) -> list[Rule]:
    """The rule with each number of bits; itself alone where nothing is free."""
    if not bits_are_free(rule):
        return [rule]
    scheme = Scheme.named(str(rule.scheme))
    return [dataclasses.replace(rule, scheme=f"{scheme.kind}{bits}") for bits in _BITS]


def _quantized(weight: Any, rule: Rule, axis: int) -> Any:
    rule = rule.for_inputs(weight.shape[axis])
    return by_rounding(weight, dataclasses.replace(rule, method="rtn", clip="mse", importance=False), axis)


def _bytes(rule: Rule, place: Place, config: Config, float_bytes: int) -> int:
    """What a weight takes by that rule."""
    spec = specs(config)[place]
    shape = spec.shape(config)
    if rule.scheme is None:
        return math.prod(shape) * float_bytes
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    made = jax.eval_shape(lambda weight: _quantized(weight, rule, spec.axis), weight)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
    length = shape[spec.axis]
    size += 4 * length if rule.act_order and made.group_size < length else 0
    return size + rule.outliers * (2 * math.prod(shape) // length + 4)


def _measure(
    read: Callable[[Place], Any],
    options: Mapping[Place, list[Rule]],
    windows_WT: np.ndarray,
    config: Config,
    on_weights: Callable[[int], None],
) -> dict[Place, list[float]]:
    """The error of each candidate of each weight; 0 where there is nothing to choose."""
    of = specs(config)
    errors = {place: [0.0] * len(candidates) for place, candidates in options.items()}
    embed = Place("embed_VD")
    whole = {"embed_VD": values(read(embed)), "norm.weight_D": values(read(Place("norm.weight_D")))}
    x_WTD = _embedded(config, whole, windows_WT)
    for i, rule in enumerate(options[embed] if len(options[embed]) > 1 else ()):
        rounded = _rounded(embed, whole["embed_VD"], rule, of[embed].axis)
        errors[embed][i] = _change(embed, rule, x_WTD, _embedded(config, whole | {"embed_VD": rounded}, windows_WT))
    for layer in range(config.num_layers):
        numbers = dict(config.numbers(layer))
        places = [place for place in options if place.layer == layer]
        weights = {place.name: values(read(place)) for place in places}
        after_WTD = calibrate.run_block(calibrate.block_of(weights, config, layer), x_WTD, numbers)
        for place in places:
            candidates = options[place]
            for i, rule in enumerate(candidates if len(candidates) > 1 else ()):
                changed = weights | {place.name: _rounded(place, weights[place.name], rule, of[place].axis)}
                block = calibrate.block_of(changed, config, layer)
                errors[place][i] = _change(place, rule, after_WTD, calibrate.run_block(block, x_WTD, numbers))
        x_WTD = after_WTD
        on_weights(len(places))
    _measure_head(read, options, errors, whole, x_WTD, config)
    on_weights(sum(place.layer is None for place in options))
    return errors


def _embedded(config: Config, whole: Mapping[str, jax.Array], windows_WT: np.ndarray) -> jax.Array:
    """What the first layer gets, float32."""
    return jax.jit(Llama.embed)(model_from(dict.fromkeys(leaves(config)) | dict(whole), config), windows_WT)


def _measure_head(
    read: Callable[[Place], Any],
    options: Mapping[Place, list[Rule]],
    errors: dict[Place, list[float]],
    whole: Mapping[str, jax.Array],
    x_WTD: jax.Array,
    config: Config,
) -> None:
    """Adds what a quantized head, tied or not, changes in the logits: relative to how they vary over the vocabulary."""
    (place,) = (place for place, spec in specs(config).items() if "head" in spec.roles)
    if len(options[place]) == 1:
        return
    head_VD = whole["embed_VD"] if place.name in whole else values(read(place))
    x_TD = x_WTD.reshape(-1, config.width)
    x_TD = x_TD[:: max(1, len(x_TD) // _HEAD_TOKENS)]

    def centred(head_VD: jax.Array) -> jax.Array:
        model = model_from(dict.fromkeys(leaves(config)) | dict(whole) | {place.name: head_VD}, config)
        logits_TV = jax.jit(Llama.head)(model, x_TD)
        return logits_TV - logits_TV.mean(-1, keepdims=True)

    logits_TV = centred(head_VD)
    for i, rule in enumerate(options[place]):
        axis = specs(config)[place].axis
        errors[place][i] += _change(place, rule, logits_TV, centred(_rounded(place, head_VD, rule, axis)))


def _rounded(place: Place, weight: jax.Array, rule: Rule, axis: int) -> jax.Array:
    """What a weight becomes by a candidate, float32."""
    with naming(f"{place} of shape {weight.shape}"):
        return values(_quantized(weight, rule, axis))


def _change(place: Place, rule: Rule, before: jax.Array, after: jax.Array) -> float:
    """What a candidate of a weight changes, as `_mean_change` has it."""
    change = float(_mean_change(before, after))
    if not math.isfinite(change):
        raise LlamaJaxError(
            f"{place} as {rule.scheme}: what it makes of the calibration text is not finite: expected weights and "
            "activations whose squares float32 can hold"
        )
    return change


@jax.jit
def _mean_change(before: jax.Array, after: jax.Array) -> jax.Array:
    """Mean over tokens of |after - before|^2 / |before|^2: no token counts more because its activations are large."""
    return jnp.mean(jnp.sum((after - before) ** 2, -1) / jnp.maximum(jnp.sum(before**2, -1), 1e-30))


# ---- By what the loss says -------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    rules: dict
    energy: dict
    hessian_DD: Any
    errors: dict


def loss_candidates(place, rule, config):
    if not bits_are_free(rule):
        return [rule]
    spec = specs(config)[place]
    length = spec.shape(config)[spec.axis]
    kind = Scheme.named(str(rule.scheme)).kind
    return [dataclasses.replace(rule, scheme=f"{kind}{bits}", group_size=size) for bits, size in _FORMS if length % size == 0] or [rule]


def choose_by_loss(read, rules, target_bpw, windows_WT, config, on_layers, candidates=loss_candidates):
    options = {place: candidates(place, rule, config) for place, rule in rules.items()}
    errors = {place: [0.0] * len(each) for place, each in options.items()}
    energy, hessian_DD = {}, None
    for seen in gradients(read, config, windows_WT, on_layers=on_layers):
        if isinstance(seen, LayerGradients):
            fisher = {Place(name, seen.layer): (seen.weights[name], f) for name, f in seen.fisher.items()}
            energy |= {Place(name, seen.layer): e for name, e in seen.energy.items()}
        else:
            hessian_DD = seen.hessian_DD
            embed, head = Place("embed_VD"), Place("head_VD")
            fisher = {embed: (values(read(embed)), seen.embed_fisher_VD)}
            if seen.head_fisher_VD is not None:
                fisher[head] = values(read(head)), seen.head_fisher_VD
        for place, (weight, f) in fisher.items():
            axis = specs(config)[place].axis
            for i, rule in enumerate(options[place] if len(options[place]) > 1 else ()):
                errors[place][i] = float(_loss_error(weight, f, rule, axis))
    float_bytes = read(Place("norm.weight_D")).dtype.itemsize
    costs = [[_bytes(rule, place, config, float_bytes) for rule in each] for place, each in options.items()]
    chosen = allocate(costs, [errors[place] for place in options], target_bpw * config.num_parameters / 8)
    return Chosen({place: options[place][i] for place, i in zip(options, chosen, strict=True)}, energy, hessian_DD,
                  {place: errors[place][i] for place, i in zip(options, chosen, strict=True)})


def _loss_error(weight, fisher, rule, axis):
    across = -1 if axis == -2 else -2
    step = max(1, weight.size // _MEASURED_WEIGHTS)
    if axis == -2:
        part, f = weight[:, ::step], fisher[:, ::step]
    else:
        part, f = weight[::step], fisher[::step]
    count = weight.shape[across] / part.shape[across]
    return 0.5 * count * jnp.sum((values(_quantized(part, rule, axis)) - part) ** 2 * f)
