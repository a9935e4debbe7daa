"""Which weight gets which scheme: an ordered list of rules, strict.

    [[rules]]
    weights = "*norm*"          # glob on names; the first rule that matches a weight decides
    keep = true

    [[rules]]
    weights = "*"
    scheme = "int4"
    group_size = 32
    clip = "mse"

A rule that matches nothing, a weight that no rule matches and a key that nobody reads are errors.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from quant.scheme import Scheme


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the weights whose name matches.

    Attributes:
        weights: glob on weight names.
        keep: leave them as they are; then nothing else is set.
        scheme: name of a `Scheme`.
        group_size: weights that share a scale, "channel" or "tensor".
        scale_dtype: float32, bfloat16 or float16.
        clip: None or "mse" (see `quantize_rtn`).
    """

    weights: str
    keep: bool = False
    scheme: str | None = None
    group_size: int | Literal["channel", "tensor"] = 32
    scale_dtype: str = "bfloat16"
    clip: Literal["mse"] | None = None

    def __post_init__(self) -> None:
        """Checks the rule by itself.

        Raises:
            ValueError: if it both keeps and quantizes, does neither, or names an unknown scheme.
        """
        if not isinstance(self.weights, str) or not self.weights:
            raise ValueError(f"weights is {self.weights!r}: expected a glob, as '*' or 'layers.ffn.*'")
        if self.keep is (self.scheme is not None):
            raise ValueError(f"rule for {self.weights!r}: expected either keep = true or a scheme")
        if self.scheme is not None:
            Scheme.named(self.scheme)


def rules_from(table: Mapping[str, Any], source: str) -> tuple[Rule, ...]:
    """Reads a recipe's parsed TOML.

    Raises:
        ValueError: for anything but a list of rules with known keys; the message begins with `source`.
    """
    rules = table.get("rules")
    if set(table) != {"rules"} or not isinstance(rules, list) or not rules:
        raise ValueError(
            f"{source}: expected [[rules]] and nothing else, found {', '.join(sorted(table)) or 'nothing'}"
        )
    known = {field.name for field in dataclasses.fields(Rule)}
    for rule in rules:
        unknown = sorted(set(rule) - known) if isinstance(rule, Mapping) else [repr(rule)]
        if unknown or "weights" not in rule:
            raise ValueError(f"{source}: rule with {unknown or 'no weights'}: expected keys {', '.join(sorted(known))}")
    try:
        return tuple(Rule(**rule) for rule in rules)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def assign(rules: Iterable[Rule], names: Iterable[str]) -> dict[str, Rule]:
    """The rule of each weight: the first whose glob matches its name.

    Raises:
        ValueError: if a rule decides for no weight, or no rule for a weight.
    """
    rules, names = tuple(rules), tuple(names)
    chosen = {}
    for name in names:
        matching = [rule for rule in rules if fnmatch.fnmatchcase(name, rule.weights)]
        if not matching:
            raise ValueError(f"no rule matches the weight {name!r}: end the recipe with weights = '*'")
        chosen[name] = matching[0]
    for rule in rules:
        if not any(rule is used for used in chosen.values()):
            raise ValueError(f"the rule for {rule.weights!r} decides for no weight: the weights are {', '.join(names)}")
    return chosen
