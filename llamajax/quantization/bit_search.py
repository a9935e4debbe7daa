"""How many bits each weight gets, given how many the whole model may have: by what its rounding costs in KL divergence.

For each weight and each number of bits the cost is half of the sum of squared rounding errors times the diagonal of the
Fisher information (`sensitivity`): the divergence that follows, in nats a token, to second order. Costs of different
weights add up (the "linearity theorem" of HIGGS, Malinovskii et al. 2024, arXiv:2411.17525), so that the best choice
within a budget is a walk along convex hulls (`quant.allocate`). Without a text the Fisher information of another model
stands in for this one's, by the names of weights.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.parameters import Place, specs
from llamajax.quantization.quantize_weight import by_rounding, naming
from llamajax.quantization.sensitivity import gradients
from quant import Rule, Scheme, allocate, values

_BITS = (2, 3, 4, 5, 6, 8)
# The error of a candidate is measured on so many weights of a matrix, as columns of so many rows: few, which divide
# most lengths, so that one program serves; or as many as share a float of ggml's scales of two levels.
_MEASURED_WEIGHTS, _MEASURED_ROWS = 2**18, 64
# Of the text, for the Fisher information: sums over a matrix need fewer tokens than its Hessian, and each costs as much
# as five forward passes.
_FISHER_TOKENS = 2048

Rules = Mapping[Place, Rule]


def choose_bits(
    read: Callable[[Place], Any],
    rules: Rules,
    target_bpw: float,
    windows_WT: np.ndarray,
    config: Config,
    on_weights: Callable[[int], None],
    candidates: Callable[[Place, Rule], list[Rule]] | None = None,
    least_bits: int = 2,
) -> dict[Place, Rule]:
    """The rules with the bits of each `int` and `uint` scheme chosen.

    Bits are tried by round-to-nearest with clipping, whatever the rule's method: what matters is how weights compare.

    Args:
        read: one weight at a time, floats.
        rules: of every weight.
        target_bpw: bits per weight of the whole model, everything counted.
        windows_WT: calibration text.
        config: the architecture.
        on_weights: called with how many weights more have been measured.
        candidates: what may be chosen for a weight by its rule; the same rule with other numbers of bits unless given.
        least_bits: of them, those with fewer bits are left out.

    Raises:
        LlamaJaxError: if no weight's bits are free, not even the fewest fit, a weight cannot be quantized, or what it
            makes of the text is not finite.
    """
    options = _options(rules, candidates, least_bits)
    errors = {place: [0.0] * len(each) for place, each in options.items()}
    of = specs(config)
    for place, weight, fisher in gradients(read, config, some_of(windows_WT)):
        if len(options[place]) > 1:
            sample = sampled(weight, fisher, of[place].axis, _rows(options[place]))
            errors[place] = [cost(place, rule, sample, weight.size) for rule in options[place]]
        on_weights(1)
    on_weights(sum(not spec.is_matrix for spec in of.values()))
    return share_out(options, errors, target_bpw, config, read(Place("norm.weight_D")).dtype.itemsize)


def some_of(windows_WT: np.ndarray) -> np.ndarray:
    """Windows from all over the text, as many as `_FISHER_TOKENS` fill, at least one."""
    count = min(len(windows_WT), -(-_FISHER_TOKENS // windows_WT.shape[1]))
    return windows_WT[np.linspace(0, len(windows_WT) - 1, count).round().astype(int)]


def choose_bits_by_roles(
    read: Callable[[Place], Any],
    rules: Rules,
    target_bpw: float,
    config: Config,
    on_weights: Callable[[int], None],
    candidates: Callable[[Place, Rule], list[Rule]] | None = None,
    least_bits: int = 2,
) -> dict[Place, Rule]:
    """As `choose_bits`, without a text: what matters is taken from another model (`role_cost`), errors from this one.

    Args:
        read: one weight at a time, floats.
        rules: of every weight.
        target_bpw: bits per weight of the whole model, everything counted.
        config: the architecture.
        on_weights: called with how many weights more have been measured.
        candidates: as of `choose_bits`.
        least_bits: likewise.

    Raises:
        LlamaJaxError: as `choose_bits`.
    """
    options = _options(rules, candidates, least_bits)
    errors = {place: [0.0] * len(each) for place, each in options.items()}
    for place, spec in specs(config).items():
        if len(options[place]) > 1:
            weight = values(read(place))
            mean_square = jnp.maximum(jnp.mean(weight**2), jnp.finfo(jnp.float32).tiny)
            even = jnp.full_like(weight, role_cost(place, config)) / mean_square
            sample = sampled(weight, even, spec.axis, _rows(options[place]))
            errors[place] = [cost(place, rule, sample, weight.size) for rule in options[place]]
        on_weights(1)
    return share_out(options, errors, target_bpw, config, read(Place("norm.weight_D")).dtype.itemsize)


# Cost of squared errors as large as a matrix's mean square, a weight of it, in microunits of nats: of
# SmolLM2-135M-Instruct on 2,048 tokens of WikiText-2 (`gradients`, mean of half of F w^2 with and without the spread of
# both over the matrix). What stands under other names is taken for the mean.
_ROLE_COSTS = {
    "attention.query_DQ": 0.21,
    "attention.key_DM": 0.96,
    "attention.value_DM": 0.65,
    "attention.out_QD": 0.16,
    "ffn.gate_DF": 0.13,
    "ffn.up_DF": 0.21,
    "ffn.down_FD": 0.39,
    "embed_VD": 0.72,
    "head_VD": 0.72,
}
_OTHER_COST = 0.3
# The first and the last layers cost more: (layers from the end, factor), of the same measurement.
_OUTER_LAYERS = {0: 3.0, 1: 1.5, 2: 1.2}, {0: 7.0, 1: 2.5, 2: 1.3}


def role_cost(place: Place, config: Config) -> float:
    """How much an error of a weight relative to its size costs in comparison with others, by name and layer alone."""
    of_name = _ROLE_COSTS.get(place.name, _OTHER_COST)
    if place.layer is None:
        # A table that is only looked up has no part in the logits.
        return of_name / 4 if specs(config)[place].is_only_looked_up else of_name
    first, last = _OUTER_LAYERS
    from_end = config.num_layers - 1 - place.layer
    return of_name * max(first.get(place.layer, 1.0), last.get(from_end, 1.0)) / 1.3


def share_out(
    options: Mapping[Place, list[Rule]],
    errors: Mapping[Place, list[float]],
    target_bpw: float,
    config: Config,
    float_bytes: int,
) -> dict[Place, Rule]:
    """The candidates whose errors add up to least within so many bits a weight.

    Args:
        options: candidates of every weight.
        errors: of each of them.
        target_bpw: bits per weight of the whole model, everything counted.
        config: the architecture.
        float_bytes: of a weight that is kept.

    Raises:
        LlamaJaxError: if not even the smallest candidates fit.
    """
    costs = [[_bytes(rule, place, config, float_bytes) for rule in each] for place, each in options.items()]
    try:
        chosen = allocate(costs, [errors[place] for place in options], target_bpw * config.num_parameters / 8)
    except ValueError as error:
        raise LlamaJaxError(f"target_bpw is {target_bpw}: in bytes, {error}") from None
    return {place: options[place][i] for place, i in zip(options, chosen, strict=True)}


def _options(
    rules: Rules, candidates: Callable[[Place, Rule], list[Rule]] | None, least_bits: int
) -> dict[Place, list[Rule]]:
    """What may be chosen for each weight."""
    candidates = candidates or (lambda place, rule: _candidates(rule))
    options = {}
    for place, rule in rules.items():
        each = candidates(place, rule)
        enough = (
            [option for option in each if Scheme.named(str(option.scheme)).bits >= least_bits] if each[1:] else each
        )
        options[place] = enough or each
    if not any(len(each) > 1 for each in options.values()):
        raise LlamaJaxError("target_bpw: no rule has an int or uint scheme whose bits could be chosen")
    return options


def bits_are_free(rule: Rule) -> bool:
    """Whether the bits of a rule's scheme are a starting point only."""
    if rule.scheme is None or not isinstance(rule.group_size, int):
        return False
    if rule.scale_scheme is not None and rule.scale_group != "channel":  # a type of ggml's, with one number of bits
        return False
    return Scheme.named(rule.scheme).kind in ("int", "uint")


def _candidates(rule: Rule) -> list[Rule]:
    """The rule with each number of bits; itself alone where nothing is free."""
    if not bits_are_free(rule):
        return [rule]
    scheme = Scheme.named(str(rule.scheme))
    return [dataclasses.replace(rule, scheme=f"{scheme.kind}{bits}") for bits in _BITS]


def _rows(options: list[Rule]) -> int:
    """Most rows of the columns that candidates are measured on."""
    shared = [rule.scale_group for rule in options if rule.scale_scheme is not None]
    return max([_MEASURED_ROWS, *(size for size in shared if isinstance(size, int))])


def sampled(weight: jax.Array, fisher: jax.Array, axis: int, most_rows: int) -> tuple[jax.Array, jax.Array]:
    """Some of a matrix's weights, as columns of neighbours along its contraction axis, and what is known of them.

    Columns of all matrices have few different shapes, so that few programs measure all.

    Args:
        weight: float32 [K, M] (`axis=-2`) or [M, K].
        fisher: likewise.
        axis: the contraction axis.
        most_rows: of the columns.

    Returns:
        Both as [k, n]: k the largest divisor of K that is at most `most_rows` and, if there is one, a multiple of 32.
    """
    pair = (weight, fisher) if axis == -2 else (weight.T, fisher.T)
    length, outputs = pair[0].shape
    divisors = [size for size in range(1, min(length, most_rows) + 1) if length % size == 0]
    rows = max(divisors, key=lambda size: (size % 32 == 0, size))
    count = max(1, min(_MEASURED_WEIGHTS // rows, outputs * (length // rows)))
    at = np.random.default_rng(0).choice(outputs * (length // rows), count, replace=False)
    return _columns(*pair, jnp.asarray(at % outputs), jnp.asarray(at // outputs), rows)


@functools.partial(jax.jit, static_argnames="rows")
def _columns(
    weight_KM: jax.Array, fisher_KM: jax.Array, output_n: jax.Array, part_n: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Rows `part * rows` and on of some outputs, [rows, n]."""
    at_rn = part_n * rows + jnp.arange(rows)[:, None]
    return weight_KM[at_rn, output_n], fisher_KM[at_rn, output_n]


def cost(place: Place, rule: Rule, sample: tuple[jax.Array, jax.Array], size: int) -> float:
    """What rounding by a rule costs, in nats a token.

    Args:
        place: of the weight.
        rule: the candidate.
        sample: of `sampled`.
        size: of the whole weight.

    Raises:
        LlamaJaxError: if the rule does not fit the weight, or the cost is not finite.
    """
    weight_kn, fisher_kn = sample
    with naming(f"{place} as {rule.scheme}"):
        error = float(_cost(weight_kn, fisher_kn, _quick(rule, len(weight_kn)))) * size / weight_kn.size
    if not math.isfinite(error):
        raise LlamaJaxError(
            f"{place} as {rule.scheme}: what it makes of the calibration text is not finite: expected weights and "
            "activations whose squares float32 can hold"
        )
    return error


@functools.partial(jax.jit, static_argnames="rule")
def _cost(weight_kn: jax.Array, fisher_kn: jax.Array, rule: Rule) -> jax.Array:
    return 0.5 * jnp.sum((by_rounding(weight_kn, rule, -2).values() - weight_kn) ** 2 * fisher_kn)


def _quick(rule: Rule, length: int) -> Rule:
    """The rule for a sample of so many rows, by round-to-nearest."""
    rule = rule.for_inputs(length)
    return Rule(
        weights="*",
        scheme=rule.scheme,
        group_size=rule.group_size,
        scale_dtype=rule.scale_dtype,
        scale_scheme=rule.scale_scheme,
        scale_group=rule.scale_group,
        offset=rule.offset,
        clip="mse",
    )


def _bytes(rule: Rule, place: Place, config: Config, float_bytes: int) -> int:
    """What a weight takes by that rule."""
    spec = specs(config)[place]
    shape = spec.shape(config)
    if rule.scheme is None:
        return math.prod(shape) * float_bytes
    length = shape[spec.axis]
    made = _shape(_quick(rule, length), shape, spec.axis)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
    size += 4 * length if rule.act_order and made.group_size < length else 0
    return size + rule.outliers * (2 * math.prod(shape) // length + 4)


@functools.lru_cache(maxsize=256)
def _shape(rule: Rule, shape: tuple[int, ...], axis: int) -> Any:
    """What a rule makes of a weight, of `jax.ShapeDtypeStruct`s. How scales are searched for changes none of it."""
    rule = dataclasses.replace(rule, clip=None)
    return jax.eval_shape(lambda weight: by_rounding(weight, rule, axis), jax.ShapeDtypeStruct(shape, jnp.float32))
