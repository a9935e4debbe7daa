"""Chooses the number of bits of each weight within a budget for the whole model, by the KL divergence of rounding.

The cost of a weight at a number of bits is half the sum of its squared rounding errors, each times its entry in the
diagonal of the Fisher information (`sensitivity`): to second order, the KL divergence in nats per token. Costs of
different weights add up (the "linearity theorem" of HIGGS, Malinovskii et al. 2024, arXiv:2411.17525), so the best
choice within a budget is found by a walk along convex hulls (`quant.allocate`). Without a calibration text, the Fisher
information is that of tokens which the model itself draws (`own_tokens`).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.parameters import Place, specs
from llamajax.quantization.quantize_weight import by_rounding, naming
from llamajax.quantization.sensitivity import gradients
from quant import SCHEMES, Rule, Scheme, allocate

# Targets above this size, that of 6 bits in groups of 32 with their scales, also have candidates of 6 to 8 bits in
# groups half as large: a table of embeddings can be most of a model, and the largest target has nothing above 8 bits.
_HALVED_ABOVE, _HALVED_BITS = 6.25, 6
# The error of a candidate is measured on a sample of so many weights of a matrix, as columns of so many rows. 64 rows
# divide most lengths, so that one compiled program serves; columns are longer where more weights share one float of
# ggml's two-level scales.
_MEASURED_WEIGHTS, _MEASURED_ROWS = 2**18, 64
# Tokens of the text used for the Fisher information. Its sums over a matrix need fewer tokens than a Hessian does, and
# each token costs as much as five forward passes.
_FISHER_TOKENS = 2048
# This fraction of the mean over input channels is added to each one's importance, because few tokens tell little of a
# channel that they hardly use. On SmolLM2-135M at 4.5 bits it takes 2% off the KL divergence.
_ADDED_IMPORTANCE = 0.05

Rules = Mapping[Place, Rule]


class Choice(NamedTuple):
    """The result of a search for bits.

    Attributes:
        rules: the rule of each weight, with its bits.
        importance: the mean Fisher information of each input channel, float32 [K], of each matrix, plus
            `_ADDED_IMPORTANCE` of its mean over channels.
    """

    rules: dict[Place, Rule]
    importance: dict[Place, jax.Array]


def choose_bits(
    read: Callable[[Place], Any],
    rules: Rules,
    target_bpw: float,
    windows_WT: np.ndarray,
    config: Config,
    on_weights: Callable[[int], None],
    candidates: Callable[[Place, Rule], list[Rule]] | None = None,
    least_bits: int = 2,
) -> Choice:
    """Chooses the bits of each `int`, `uint` and `iq4_nl` scheme and returns the rules with these bits.

    Candidates are measured by round-to-nearest with clipping, whatever the rule's method is: only the comparison
    between weights matters.

    Args:
        read: returns one weight, as floats.
        rules: the rule for each weight.
        target_bpw: bits per weight of the whole model, everything counted.
        windows_WT: calibration text, or tokens that the model drew.
        config: the architecture.
        on_weights: called with the number of weights measured since the last call.
        candidates: returns the rules that may be chosen for a weight; by default, its rule with other numbers of bits.
        least_bits: candidates with fewer bits are left out.

    Raises:
        LlamaJaxError: if no weight's bits are free, if even the smallest candidates exceed the target, if a weight
            cannot be quantized, or if a cost is not finite.
    """
    options = _options(rules, candidates, least_bits, target_bpw)
    errors = {place: [0.0] * len(each) for place, each in options.items()}
    of, importance = specs(config), {}
    for place, weight, fisher in gradients(read, config, some_of(windows_WT)):
        by_input = jnp.mean(fisher, axis=-1 if of[place].axis == -2 else -2)
        importance[place] = by_input + _ADDED_IMPORTANCE * by_input.mean()
        if len(options[place]) > 1:
            sample = sampled(weight, fisher, of[place].axis, _rows(options[place]))
            errors[place] = [cost(place, rule, sample, weight.size) for rule in options[place]]
        on_weights(1)
    on_weights(sum(not spec.is_matrix for spec in of.values()))
    float_bytes = read(Place("norm.weight_D")).dtype.itemsize
    return Choice(share_out(options, errors, target_bpw, config, float_bytes), importance)


def some_of(windows_WT: np.ndarray) -> np.ndarray:
    """Returns windows spread evenly over the text: enough for `_FISHER_TOKENS` tokens, and at least one."""
    count = min(len(windows_WT), -(-_FISHER_TOKENS // windows_WT.shape[1]))
    return windows_WT[np.linspace(0, len(windows_WT) - 1, count).round().astype(int)]


def share_out(
    options: Mapping[Place, list[Rule]],
    errors: Mapping[Place, list[float]],
    target_bpw: float,
    config: Config,
    float_bytes: int,
) -> dict[Place, Rule]:
    """Chooses one candidate per weight so that the sum of errors is least within a number of bits per weight.

    Args:
        options: the candidates of each weight.
        errors: the error of each candidate.
        target_bpw: bits per weight of the whole model, everything counted.
        config: the architecture.
        float_bytes: bytes of one number in a weight that is not quantized.

    Raises:
        LlamaJaxError: if even the smallest candidates exceed the target.
    """
    costs = [[_bytes(rule, place, config, float_bytes) for rule in each] for place, each in options.items()]
    try:
        chosen = allocate(costs, [errors[place] for place in options], target_bpw * config.num_parameters / 8)
    except ValueError as error:
        raise LlamaJaxError(f"target_bpw is {target_bpw}: in bytes, {error}") from None
    return {place: options[place][i] for place, i in zip(options, chosen, strict=True)}


def _options(
    rules: Rules, candidates: Callable[[Place, Rule], list[Rule]] | None, least_bits: int, target_bpw: float
) -> dict[Place, list[Rule]]:
    """Returns the candidates of each weight."""
    candidates = candidates or (lambda place, rule: _candidates(rule, target_bpw))
    options = {}
    for place, rule in rules.items():
        each = candidates(place, rule)
        enough = (
            [option for option in each if Scheme.named(str(option.scheme)).bits >= least_bits] if each[1:] else each
        )
        options[place] = enough or each
    if not any(len(each) > 1 for each in options.values()):
        raise LlamaJaxError("target_bpw: no rule has an int, uint or iq4_nl scheme whose bits could be chosen")
    return options


def bits_are_free(rule: Rule) -> bool:
    """Whether the search may change the number of bits of a rule's scheme."""
    if rule.scheme is None or not isinstance(rule.group_size, int):
        return False
    if rule.scale_scheme is not None and rule.scale_group != "channel":  # the form of a ggml type, whose bits are fixed
        return False
    scheme = Scheme.named(rule.scheme)
    return scheme.signed_scales or scheme.kind == "uint"


def _candidates(rule: Rule, target_bpw: float) -> list[Rule]:
    """Returns the rule with each number of bits, or the rule alone if its bits are not free.

    iq4_nl is the candidate of 4 bits, beside int of other numbers of bits. See `_HALVED_ABOVE` for other groups.
    """
    if not bits_are_free(rule):
        return [rule]
    scheme = Scheme.named(str(rule.scheme))
    kind = "int" if scheme.codebook else scheme.kind
    names = {other.bits: other.name for other in reversed(SCHEMES.values()) if other.kind == kind}
    names |= {scheme.bits: scheme.name} if scheme.codebook else {}
    made = [dataclasses.replace(rule, scheme=name) for name in names.values()]
    size = rule.group_size
    if target_bpw > _HALVED_ABOVE and isinstance(size, int) and size % 16 == 0:
        many = [each for bits, each in zip(names, made, strict=True) if bits >= _HALVED_BITS]
        made += [dataclasses.replace(each, group_size=size // 2) for each in many]
    return made


def _rows(options: list[Rule]) -> int:
    """Returns the largest number of rows of the columns that candidates are measured on."""
    shared = [rule.scale_group for rule in options if rule.scale_scheme is not None]
    return max([_MEASURED_ROWS, *(size for size in shared if isinstance(size, int))])


def sampled(weight: jax.Array, fisher: jax.Array, axis: int, most_rows: int) -> tuple[jax.Array, jax.Array]:
    """Samples columns of neighbouring weights along a matrix's contraction axis, with their Fisher information.

    The samples of all matrices have few different shapes, so that few compiled programs measure them all. Of a matrix
    with more columns, those with large weights and much Fisher information are drawn more often, and count less: in an
    embedding, a few tokens' rows have nearly all of it.

    Args:
        weight: float32 [K, M] (`axis=-2`) or [M, K].
        fisher: the Fisher information, of the same shape.
        axis: the contraction axis.
        most_rows: the largest number of rows of a column.

    Returns:
        Samples of both, [k, n]: k is the largest divisor of K that is at most `most_rows`, and a multiple of 32 if
        there is one. A sum over both samples, times K M / (k n), estimates the sum over the matrix.
    """
    pair = (weight, fisher) if axis == -2 else (weight.T, fisher.T)
    length, outputs = pair[0].shape
    divisors = [size for size in range(1, min(length, most_rows) + 1) if length % size == 0]
    rows = max(divisors, key=lambda size: (size % 32 == 0, size))
    total = outputs * (length // rows)
    count = max(1, min(_MEASURED_WEIGHTS // rows, total))
    at, counts = np.arange(total), np.ones(total, np.float32)
    if count < total:
        mass = np.asarray(_mass(*pair, rows), np.float64).reshape(-1)
        mass = np.nan_to_num(mass, nan=1e38, posinf=1e38)  # is drawn, so that `cost` refuses it
        chance = 0.9 * mass / mass.sum() + 0.1 / total if mass.any() else np.full(total, 1 / total)
        # At equal distances along the sum of chances: a column of chance p is drawn n p times, rounded up or down.
        ends = np.cumsum(chance)
        at = np.searchsorted(ends, (np.arange(count) + 0.5) / count * ends[-1]).clip(max=total - 1)
        counts = (1 / (total * chance[at])).astype(np.float32)
    weight_rn, fisher_rn = _columns(*pair, jnp.asarray(at % outputs), jnp.asarray(at // outputs), rows)
    return weight_rn, fisher_rn * counts


@functools.partial(jax.jit, static_argnames="rows")
def _mass(weight_KM: jax.Array, fisher_KM: jax.Array, rows: int) -> jax.Array:
    """Returns about what rounding each column may cost, [K / rows, M]: its information times its largest square."""
    weight_PrM, fisher_PrM = (x.reshape(-1, rows, x.shape[-1]) for x in (weight_KM, fisher_KM))
    return fisher_PrM.sum(1) * jnp.abs(weight_PrM).max(1) ** 2


@functools.partial(jax.jit, static_argnames="rows")
def _columns(
    weight_KM: jax.Array, fisher_KM: jax.Array, output_n: jax.Array, part_n: jax.Array, rows: int
) -> tuple[jax.Array, jax.Array]:
    """Gathers rows `part * rows` to `(part + 1) * rows - 1` of some outputs, [rows, n]."""
    at_rn = part_n * rows + jnp.arange(rows)[:, None]
    return weight_KM[at_rn, output_n], fisher_KM[at_rn, output_n]


def cost(place: Place, rule: Rule, sample: tuple[jax.Array, jax.Array], size: int) -> float:
    """Returns the cost of rounding a weight by a rule, in nats per token.

    Args:
        place: the weight's place.
        rule: the candidate.
        sample: the result of `sampled`.
        size: number of elements of the whole weight.

    Raises:
        LlamaJaxError: if the rule does not fit the weight, or the cost is not finite.
    """
    weight_kn, fisher_kn = sample
    with naming(f"{place} as {rule.scheme}"):
        error = float(_cost(weight_kn, fisher_kn, _quick(rule, len(weight_kn)))) * size / weight_kn.size
    if not math.isfinite(error):
        raise LlamaJaxError(
            f"{place} as {rule.scheme}: the cost of its rounding errors is not finite: expected weights and "
            "activations whose squares float32 can hold"
        )
    return error


@functools.partial(jax.jit, static_argnames="rule")
def _cost(weight_kn: jax.Array, fisher_kn: jax.Array, rule: Rule) -> jax.Array:
    return 0.5 * jnp.sum((by_rounding(weight_kn, rule, -2).values() - weight_kn) ** 2 * fisher_kn)


def _quick(rule: Rule, length: int) -> Rule:
    """Returns the rule for inputs of a length, with round-to-nearest as its method."""
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
    """Returns the number of bytes that a weight takes when it is quantized by a rule."""
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
    """Returns the quantized weight as `jax.ShapeDtypeStruct`s. The search for scales does not change the shapes."""
    rule = dataclasses.replace(rule, clip=None)
    return jax.eval_shape(lambda weight: by_rounding(weight, rule, axis), jax.ShapeDtypeStruct(shape, jnp.float32))
