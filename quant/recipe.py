"""Recipes: ordered lists of rules that say how each weight is quantized.

    target_bpw = 4.5                # optional: choose the bits of each weight so that the whole model has that many

    [[rules]]
    weights = "*norm*"              # glob on names; the first rule that matches a weight decides
    keep = true

    [[rules]]
    weights = "layers.*.ffn.down_FD"    # layers.7.ffn.down_FD is that of one layer
    layers = [0, -1]                # the first and the last; all unless given
    scheme = "int6"
    group_size = 32

    [[rules]]
    weights = "*"
    scheme = "int4"
    group_size = 32
    clip = "mse"

A rule that decides for no weight, a weight that no rule matches and an unknown key are errors.
"""

import dataclasses
import fnmatch
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from quant.activations import ACTIVATIONS
from quant.packing import PLANE_BITS, plane_bits
from quant.qtensor import SCALE_DTYPES
from quant.scheme import SCHEMES, Scheme

_SMALLEST_GROUP = 16


class _Kind(NamedTuple):
    """The valid values of a recipe's key: a description, and a function that checks a value."""

    expected: str
    holds: Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _one_of(names: Iterable[str]) -> _Kind:
    names = tuple(names)
    return _Kind(f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names)


_BOOLEAN = _Kind("true or false", lambda value: isinstance(value, bool))
# Type and range of every key. A key whose default is None may also be None, which TOML does not have.
KEYS: dict[str, _Kind] = {
    "weights": _Kind("a glob, as '*' or 'layers.*.ffn.*'", lambda value: isinstance(value, str) and value != ""),
    "layers": _Kind(
        "numbers, as [0, -1]",
        lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_whole, value)),
    ),
    "keep": _BOOLEAN,
    "scheme": _one_of(SCHEMES),
    "group_size": _Kind(
        "a whole number of at least 1, 'channel' or 'tensor'",
        lambda value: (_is_whole(value) and value >= 1) or (isinstance(value, str) and value in ("channel", "tensor")),
    ),
    "scale_dtype": _one_of(SCALE_DTYPES),
    "scale_scheme": _one_of(SCHEMES),
    "scale_group": _Kind(
        "256 or 'channel'",
        lambda value: (_is_whole(value) and value == 256) or (isinstance(value, str) and value == "channel"),
    ),
    "offset": _BOOLEAN,
    "method": _one_of(("rtn", "gptq", "hqq")),
    "clip": _one_of(("mse",)),
    "importance": _BOOLEAN,
    "act_order": _BOOLEAN,
    "damping": _Kind(
        "a number of 0 or more, as 0.01",
        lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) < 100,
    ),
    "descent": _Kind("a whole number of sweeps, 0 or more", lambda value: _is_whole(value) and 0 <= value < 100),
    "scaling": _one_of(("awq", "smoothquant")),
    "outliers": _Kind("a whole number of channels, 0 or more", lambda value: _is_whole(value) and value >= 0),
    "activations": _one_of(ACTIVATIONS),
    "indivisible": _one_of(SCHEMES),
    "target_bpw": _Kind(
        "bits per weight between 1 and 17, as 4.5",
        lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool) and 1 < float(value) < 17,
    ),
    "least_bits": _Kind("bits of a code, 2 to 8", lambda value: _is_whole(value) and value in PLANE_BITS),
    "bits_by": _one_of(("loss", "own_tokens")),
    "propagation": _Kind(
        "a number from 0 to 1, as 0.5",
        lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= float(value) <= 1,
    ),
    "tuning": _Kind("a whole number of passes, 0 or more", lambda value: _is_whole(value) and 0 <= value < 1000),
}


def _check_keys(of: Any) -> None:
    """Checks the fields of a rule or recipe against `KEYS`."""
    for field in dataclasses.fields(of):
        value, kind = getattr(of, field.name), KEYS.get(field.name)
        if kind is None or (value is None and field.default is None) or kind.holds(value):
            continue
        shown = repr(value)
        raise ValueError(f"{field.name} is {shown if len(shown) < 80 else shown[:78] + ' …'}: expected {kind.expected}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """How the weights whose name matches are quantized.

    Attributes:
        weights: glob on weight names.
        layers: numbers of the layers that the rule applies to, negative ones from the end. Without it the rule applies
            to all layers and to weights outside of layers.
        keep: leave the weights as they are; then none of the fields below may be set.
        scheme: name of a `Scheme`.
        group_size: number of weights that share a scale, or "channel" or "tensor".
        scale_dtype: float32, bfloat16 or float16.
        scale_scheme: name of the scheme of quantized scales (`quantize_two_levels`); None: scales are not quantized.
        scale_group: number of weights whose quantized scales share a float: 256, or "channel".
        offset: for a `uint` scheme, store a float offset beside the scale instead of the zero point (`with_offset`).
        method: "rtn" (`quantize_rtn`), "gptq" (`quantize_gptq`) or "hqq" (`quantize_hqq`).
        clip: None or "mse" (see `quantize_rtn`).
        importance: weigh each input channel's error by its activations' mean square, as llama.cpp's imatrix does, or by
            its Fisher information where the recipe's `bits_by` is "own_tokens"; needs method rtn with clip.
        act_order: see `quantize_gptq`.
        damping: damping of the Hessian, relative to its mean diagonal (see `quantize_gptq`). Higher damping fits a
            short text less closely.
        descent: sweeps of coordinate descent after GPTQ (see `quantize_gptq`).
        scaling: "awq" (`search_scale`) or "smoothquant" (`smoothing_scale`): scales the input channels before
            quantization and undoes that in the operation that makes the inputs. All weights that share an input take
            part.
        outliers: number of input channels, those of the largest activations, that are kept in float beside the codes.
        activations: "bfloat16", "int8-token" or "int8-group": how the activations are rounded before they are
            multiplied with the weight; None: not at all.
        indivisible: name of a scheme for weights whose number of inputs is not a multiple of `group_size`. They get the
            largest smaller group size of 16 or more that fits, or one group per channel, or, if that does not fill
            whole bytes, this scheme per channel. Without it such a weight is an error.
    """

    weights: str
    layers: tuple[int, ...] | None = None
    keep: bool = False
    scheme: str | None = None
    group_size: int | Literal["channel", "tensor"] = 32
    scale_dtype: str = "bfloat16"
    scale_scheme: str | None = None
    scale_group: int | Literal["channel"] = 256
    offset: bool = False
    method: Literal["rtn", "gptq", "hqq"] = "rtn"
    clip: Literal["mse"] | None = None
    importance: bool = False
    act_order: bool = False
    damping: float = 0.01
    descent: int = 0
    scaling: Literal["awq", "smoothquant"] | None = None
    outliers: int = 0
    activations: str | None = None
    indivisible: str | None = None

    def __post_init__(self) -> None:
        """Checks the rule by itself.

        Raises:
            ValueError: if it is invalid; the message names the rule, the mistake and the expected value.
        """
        try:
            _check_keys(self)
        except ValueError as error:
            raise ValueError(f"rule for {self.weights!r}: {error}") from None
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))
        of_kept = {"weights", "layers", "keep"}
        given = [
            field.name
            for field in dataclasses.fields(self)
            if field.name not in of_kept and getattr(self, field.name) != field.default
        ]
        for wrong, message in (
            (self.keep is (self.scheme is not None), "expected either keep = true or a scheme"),
            (
                self.keep and given,
                f"{', '.join(given)} beside keep = true: expected no other key, because kept weights do not change",
            ),
            (self.importance and (self.method != "rtn" or self.clip is None), "importance needs method rtn and clip"),
            (self.act_order and self.method != "gptq", "act_order needs method gptq"),
            (self.damping != Rule.damping and self.method != "gptq", "damping needs method gptq"),
            (self.descent and self.method != "gptq", "descent needs method gptq"),
            (self.scale_scheme is None and self.scale_group != 256, "scale_group needs a scale_scheme"),
            (self.scale_scheme is not None and self.method == "hqq", "hqq does not support scale_scheme"),
            (self.scale_scheme is not None and self.act_order, "act_order does not support scale_scheme"),
            (self.offset and not str(self.scheme).startswith("uint"), "offset needs a uint scheme"),
            (self.method == "hqq" and self.clip is not None, "hqq has its own search: leave clip out"),
        ):
            if wrong:
                raise ValueError(f"rule for {self.weights!r}: {message}")

    def for_inputs(self, length: int) -> "Rule":
        """Returns the rule for a weight of `length` inputs: itself unless `indivisible` applies."""
        if self.scheme is None or self.indivisible is None or isinstance(self.group_size, str):
            return self
        if length % self.group_size == 0:
            return self
        multiple = 8 // min(plane_bits(Scheme.named(self.scheme).bits))
        for size in range(min(length, self.group_size), _SMALLEST_GROUP - 1, -1):
            if length % size == 0 and size % multiple == 0:
                kept = self.scale_scheme if self.scale_group == "channel" else None  # "channel" takes any group size
                return dataclasses.replace(self, group_size=size, scale_scheme=kept)
        if length % multiple == 0:
            return dataclasses.replace(self, group_size="channel", scale_scheme=None, scale_group=256)
        plain: dict[str, Any] = {"outliers": 0, "scale_scheme": None, "scale_group": 256}
        plain["offset"] = self.offset and self.indivisible.startswith("uint")
        return self.to_nearest(scheme=self.indivisible, group_size="channel", **plain)

    def to_nearest(self, **changes: Any) -> "Rule":
        """Returns the rule with method rtn instead of gptq, without the keys that only gptq has, and other changes."""
        return dataclasses.replace(
            self, method="rtn", act_order=False, damping=Rule.damping, descent=Rule.descent, **changes
        )

    @property
    def needs_calibration(self) -> bool:
        """Whether the rule needs statistics of the weight's inputs."""
        return self.importance or self.needs_text

    @property
    def needs_text(self) -> bool:
        """Whether these statistics must come from a text; importance may be that of tokens that the model draws."""
        return self.method == "gptq" or self.scaling is not None or self.outliers > 0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules for the weights, and settings for the whole model.

    Attributes:
        rules: in order of priority; the first rule that matches a weight decides.
        target_bpw: bits per weight of the whole model, everything counted. With it the bits in `int`, `uint` and
            `iq4_nl` rules are only a starting point: the bits of each weight are chosen for the least error within the
            budget. Beside iq4_nl the candidates are int with other numbers of bits.
        least_bits: fewest bits that this choice may give a weight. Codes of 2 and 3 bits decode at about 0.6 of the
            bytes per second of 4-bit codes.
        bits_by: how this choice rates a weight's error: "loss", measured on a calibration text; "own_tokens", on
            tokens that the model draws, without a text.
        propagation: how far each GPTQ weight is moved before rounding to make up for the errors of its inputs, from 0
            to 1 (`propagated`).
        tuning: number of final passes over the calibration text that tune scales and norms, by the KL divergence from
            the model before quantization.
    """

    rules: tuple[Rule, ...]
    target_bpw: float | None = None
    least_bits: int = 2
    bits_by: Literal["loss", "own_tokens"] = "loss"
    propagation: float = 0.0
    tuning: int = 0

    def __post_init__(self) -> None:
        """Checks the fields of the recipe.

        Raises:
            ValueError: if a value is not valid.
        """
        _check_keys(self)

    def with_target(self, bits: float) -> "Recipe":
        """Returns the recipe with another target, in bits per weight.

        `least_bits` stays if the target leaves half a bit for scales and for weights that need more; else it becomes 2.
        """
        least = self.least_bits if bits >= self.least_bits + 0.5 else 2
        return dataclasses.replace(self, target_bpw=bits, least_bits=least)

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe needs a calibration text to run the model on."""
        draws = self.target_bpw is not None and self.bits_by == "own_tokens"
        of_model = (self.target_bpw is not None and not draws) or self.tuning > 0
        return of_model or any(rule.needs_text or (rule.importance and not draws) for rule in self.rules)


def recipe_from(table: Mapping[str, Any], source: str) -> Recipe:
    """Makes a recipe from parsed TOML.

    Raises:
        ValueError: for an unknown key, a missing one or an invalid value; the message begins with `source`.
    """
    rules = table.get("rules")
    of_model = [field.name for field in dataclasses.fields(Recipe) if field.name != "rules"]
    if set(table) - set(of_model) != {"rules"} or not isinstance(rules, list) or not rules:
        raise ValueError(
            f"{source}: expected [[rules]], {', '.join(of_model)} and nothing else, found "
            f"{', '.join(sorted(table)) or 'nothing'}"
        )
    known = {field.name for field in dataclasses.fields(Rule)}
    for rule in rules:
        unknown = sorted(set(rule) - known) if isinstance(rule, Mapping) else [repr(rule)]
        if unknown or "weights" not in rule:
            raise ValueError(f"{source}: rule with {unknown or 'no weights'}: expected keys {', '.join(sorted(known))}")
    try:
        return Recipe(tuple(Rule(**rule) for rule in rules), **{key: table[key] for key in of_model if key in table})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from None


def assign(
    rules: Iterable[Rule], weights: Mapping[str, Sequence[int] | None], num_layers: int
) -> dict[tuple[str, int | None], Rule]:
    """Returns the rule of each weight of each layer: the first that matches the name and includes the layer.

    Args:
        rules: in order of priority. A glob is matched with the weight's name, `layers.7.ffn.up_DF`, and with the names
            for all layers, `layers.*.ffn.up_DF` and `layers.ffn.up_DF`.
        weights: names (`layers.*.ffn.up_DF` for a weight in layers) and for each the numbers of the layers that have
            it, or None for a weight outside of layers.
        num_layers: number of layers of the model.

    Returns:
        A rule for each (name, layer); layer is None outside of layers.

    Raises:
        ValueError: if a rule decides for no weight, no rule matches a weight, or a layer does not exist.
    """
    rules, chosen = tuple(rules), {}
    for name, layers in weights.items():
        for layer in (None,) if layers is None else layers:
            rule = next((rule for rule in rules if _matches(rule, name, layer) and _has(rule, layer, num_layers)), None)
            if rule is None:
                shown = name if layer is None else name.replace("*", str(layer), 1)
                raise ValueError(f"no rule matches the weight {shown!r}: end the recipe with weights = '*'")
            chosen[name, layer] = rule
    for rule in rules:
        if not any(rule is used for used in chosen.values()):
            raise ValueError(
                f"the rule for {rule.weights!r} decides for no weight: the weights are {', '.join(weights)}"
            )
    return chosen


def _matches(rule: Rule, name: str, layer: int | None) -> bool:
    """Whether a rule's glob matches a weight."""
    names = [name] if layer is None else [name.replace("*", str(layer), 1), name, name.replace(".*", "", 1)]
    return any(fnmatch.fnmatchcase(each, rule.weights) for each in names)


def _has(rule: Rule, layer: int | None, count: int) -> bool:
    """Whether a rule applies to a layer of a model of `count` layers."""
    if rule.layers is None:
        return True
    if layer is None:
        return False
    outside = [number for number in rule.layers if not -count <= number < count]
    if outside:
        raise ValueError(f"the rule for {rule.weights!r} names layer {outside[0]}: the model has {count} layers")
    return layer in {number % count for number in rule.layers}
