"""How many bits each weight gets, given how many the whole model may have: measured, not guessed.

For each weight and each number of bits, the layer is run with just that weight quantized; the error is what that
changes in the layer's output, squared, relative to the output. Errors of different weights are taken to add up.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.checkpoint.naming import STACKED, Place, named_leaves
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.model import RMSNorm, abstract_model
from llamajax.quantization import calibrate
from llamajax.quantization.quantize_weight import naming
from quant import QTensor, Scheme, dequantize, quantize_rtn
from quant.budget import allocate
from quant.recipe import Rule

_BITS = (2, 3, 4, 5, 6, 8)
# Layers are scanned in runs of equal schemes, each a loop of its own in the program: not more than this many.
_MAX_RUNS = 8
_SAMPLE_TOKENS = 4096
_HEAD_TOKENS = 256

Rules = Mapping[tuple[str, int | None], Rule]


def choose_bits(
    read: Callable[[Place], Any],
    rules: Rules,
    target_bpw: float,
    windows_WT: np.ndarray,
    config: Config,
    on_weights: Callable[[int], None],
) -> dict[tuple[str, int | None], Rule]:
    """The rules with the bits of each `int` and `uint` scheme chosen.

    Layers are tied into at most 8 neighbouring groups that get the same bits. Bits are tried by round-to-nearest with
    clipping, whatever the rule's method: what matters is how weights compare.

    Args:
        read: one weight at a time, floats.
        rules: of every weight.
        target_bpw: bits per weight of the whole model, everything counted.
        windows_WT: calibration text; its first 4,096 tokens are used.
        config: the architecture.
        on_weights: called with how many weights more have been measured.

    Raises:
        LlamaJaxError: if no weight's bits are free, not even the fewest fit, a weight cannot be quantized, or what it
            makes of the text is not finite.
    """
    windows_WT = windows_WT[: max(1, _SAMPLE_TOKENS // windows_WT.shape[1])]
    options = {key: _candidates(rule) for key, rule in rules.items()}
    if not any(len(candidates) > 1 for candidates in options.values()):
        raise LlamaJaxError("target_bpw: no rule has an int or uint scheme whose bits could be chosen")
    errors = _measure(read, options, windows_WT, config, on_weights)
    # What is tied has one rule: a layer that the recipe treats in its own way stays apart.
    items: dict[tuple[str, int | None, Rule], list] = {}
    for (name, layer), rule in rules.items():
        tied = None if layer is None else layer * min(_MAX_RUNS, config.num_layers) // config.num_layers
        items.setdefault((name, tied, rule), []).append((name, layer))
    float_bytes = read(Place("norm.weight_D", None)).dtype.itemsize
    costs = [
        [len(keys) * _bytes(rule, keys[0][0], config, float_bytes) for rule in options[keys[0]]]
        for keys in items.values()
    ]
    faults = [[sum(errors[key][i] for key in keys) for i in range(len(options[keys[0]]))] for keys in items.values()]
    try:
        chosen = allocate(costs, faults, target_bpw * config.num_parameters / 8)
    except ValueError as error:
        raise LlamaJaxError(f"target_bpw is {target_bpw}: in bytes, {error}") from None
    return {key: options[key][i] for keys, i in zip(items.values(), chosen, strict=True) for key in keys}


def _candidates(rule: Rule) -> list[Rule]:
    """The rule with each number of bits; itself alone where nothing is free."""
    if rule.keep or rule.scheme is None or not isinstance(rule.group_size, int):
        return [rule]
    scheme = Scheme.named(rule.scheme)
    if scheme.kind not in ("int", "uint"):
        return [rule]
    return [dataclasses.replace(rule, scheme=f"{scheme.kind}{bits}") for bits in _BITS]


def _shape(name: str, config: Config) -> tuple[int, ...]:
    """(K, M) of a weight without layers; (D,) of a norm."""
    leaf = named_leaves(abstract_model(config))[name]
    shape = leaf.shape[1:] if name.startswith(STACKED) else leaf.shape
    return shape[::-1] if name.endswith("_VD") else shape


def _quantized(weight: jax.Array, rule: Rule, axis: int) -> QTensor:
    rule = rule.for_inputs(weight.shape[axis])
    assert rule.scheme is not None  # a rule that quantizes
    return quantize_rtn(
        weight, rule.scheme, group_size=rule.group_size, axis=axis, scale_dtype=rule.scale_dtype, clip="mse"
    )


def _bytes(rule: Rule, name: str, config: Config, float_bytes: int) -> int:
    """What a weight of one layer takes by that rule."""
    shape = _shape(name, config)
    if rule.scheme is None:
        return int(np.prod(shape)) * float_bytes
    weight = jax.ShapeDtypeStruct(shape, jnp.float32)
    made = jax.eval_shape(lambda weight: _quantized(weight, rule, -2), weight)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
    size += 4 * shape[0] if rule.act_order and made.group_size < shape[0] else 0
    return size + rule.outliers * (2 * shape[1] + 4)


def _measure(
    read: Callable[[Place], Any],
    options: Mapping[tuple[str, int | None], list[Rule]],
    windows_WT: np.ndarray,
    config: Config,
    on_weights: Callable[[int], None],
) -> dict[tuple[str, int | None], list[float]]:
    """The error of each candidate of each weight; 0 where there is nothing to choose."""
    errors = {key: [0.0] * len(candidates) for key, candidates in options.items()}
    embed_VD = calibrate.dense(read(Place("embed_VD", None)))
    x_WTD = jnp.asarray(embed_VD)[windows_WT]
    for i, rule in enumerate(options["embed_VD", None]):
        if len(options["embed_VD", None]) > 1:
            place = Place("embed_VD", None)
            errors["embed_VD", None][i] = _change(place, rule, x_WTD, _rounded(place, embed_VD, rule, -1)[windows_WT])
    names = [name for name, layer in options if layer == 0]
    for layer in range(config.num_layers):
        weights = {name.removeprefix(STACKED): calibrate.dense(read(Place(name, layer))) for name in names}
        after_WTD = calibrate.run_block(calibrate.block_of(weights, config), x_WTD)
        for name in names:
            candidates = options[name, layer]
            for i, rule in enumerate(candidates if len(candidates) > 1 else ()):
                short = name.removeprefix(STACKED)
                place = Place(name, layer)
                changed = weights | {short: _rounded(place, weights[short], rule, -2)}
                block = calibrate.block_of(changed, config)
                errors[name, layer][i] = _change(place, rule, after_WTD, calibrate.run_block(block, x_WTD))
        x_WTD = after_WTD
        on_weights(len(names))
    _measure_head(read, options, errors, embed_VD, x_WTD, config)
    on_weights(len(options) - len(names) * config.num_layers)
    return errors


def _measure_head(
    read: Callable[[Place], Any],
    options: Mapping[tuple[str, int | None], list[Rule]],
    errors: dict[tuple[str, int | None], list[float]],
    embed_VD: jax.Array,
    x_WTD: jax.Array,
    config: Config,
) -> None:
    """Adds what a quantized head, tied or not, changes in the logits: relative to how they vary over the vocabulary."""
    name = "embed_VD" if config.tied_embeddings else "head_VD"
    if len(options[name, None]) == 1:
        return
    head_VD = embed_VD if config.tied_embeddings else calibrate.dense(read(Place(name, None)))
    norm = RMSNorm(config.width, config.norm_eps, jnp.float32)
    norm.weight_D.set_value(calibrate.dense(read(Place("norm.weight_D", None))))
    hidden_TD = norm(x_WTD).reshape(-1, config.width)
    hidden_TD = hidden_TD[:: max(1, len(hidden_TD) // _HEAD_TOKENS)]

    def centred(head_VD: jax.Array) -> jax.Array:
        logits_TV = hidden_TD @ head_VD.T
        return logits_TV - logits_TV.mean(-1, keepdims=True)

    logits_TV = centred(head_VD)
    for i, rule in enumerate(options[name, None]):
        place = Place(name, None)
        errors[name, None][i] += _change(place, rule, logits_TV, centred(_rounded(place, head_VD, rule, -1)))


def _rounded(place: Place, weight: jax.Array, rule: Rule, axis: int) -> jax.Array:
    """What a weight becomes by a candidate, float32."""
    with naming(f"{place} of shape {weight.shape}"):
        return dequantize(_quantized(weight, rule, axis))


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
