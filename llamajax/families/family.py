"""What a family is: a table for each format, and the keys of a file's description as they are read."""

import difflib
import sys
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.fields import LARGEST_DIMENSION, check_number, check_whole
from llamajax.files import shortened

_NOTHING: Mapping[str, Any] = MappingProxyType({})
_REQUIRED = object()


class Keys:
    """A description, as the keys of one file: what is read is remembered, so that what nobody read can be refused.

    Attributes:
        source: what messages begin with.
        prefix: what the file has before every key, and the names here have not.
        read: keys that were asked for.
    """

    def __init__(
        self, fields: Mapping[str, Any], source: str, defaults: Mapping[str, Any] = _NOTHING, prefix: str = ""
    ):
        """`defaults` stand in for keys that are missing or null."""
        self._fields, self._defaults = fields, defaults
        self.source, self.prefix = source, prefix
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the file says something of a key."""
        return self._fields.get(name) is not None

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a key, the family's default where it is missing or null, or else `default`.

        Raises:
            LlamaJaxError: if there is none of them.
        """
        self.read.add(name)
        value = self._fields.get(name)
        if value is None:
            value = self._defaults.get(name, default)
        if value is _REQUIRED:
            raise LlamaJaxError(f"{self.source}: missing key {self.prefix + name!r}: expected a value")
        return value

    def peek(self, name: str) -> Any:
        """The value of a key, None where it is missing; it does not count as read."""
        return self._fields.get(name)

    def or_null(self, name: str) -> Any:
        """The value of a key at which null means something: None there, the family's default where it is missing."""
        self.read.add(name)
        return self._fields.get(name, self._defaults.get(name))

    def whole(self, name: str, most: int = LARGEST_DIMENSION) -> int:
        """A whole number from 1 on."""
        value = self.take(name)
        check_whole(f"{self.source}: {self.prefix}{name}", value, most)
        return value

    def whole_or_null(self, name: str, most: int = LARGEST_DIMENSION) -> Any:
        """A whole number from 1 on, or null, which `or_null` explains."""
        value = self.or_null(name)
        if value is not None:
            check_whole(f"{self.source}: {self.prefix}{name}", value, most)
        return value

    def number_or_null(self, name: str) -> Any:
        """A number above 0, or null, which `or_null` explains."""
        value = self.or_null(name)
        if value is not None:
            check_number(f"{self.source}: {self.prefix}{name}", value, low=0.0, above=True)
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Reads a key that may be missing, null, or one of some values, at which it does nothing."""
        self.read.add(name)
        value = self._fields.get(name)
        # Types as well, so that 1 is not taken for true.
        if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
            raise LlamaJaxError(
                f"{self.source}: {self.prefix}{name} is {shortened(value)}, which is not supported: expected "
                f"{' or '.join(map(repr, allowed)) or 'null'}"
            )

    def flag(self, name: str, default: bool = False) -> bool:
        """The value of a key that is true or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise LlamaJaxError(f"{self.source}: {self.prefix}{name} is {shortened(value)}: expected true or false")
        return value

    def number(
        self, name: str, default: Any = _REQUIRED, *, low: float = -sys.float_info.max, above: bool = False
    ) -> float:
        """The value of a key that is a finite number, of at least `low` or above it."""
        value = self.take(name, default)
        check_number(f"{self.source}: {self.prefix}{name}", value, low=low, above=above)
        return float(value)

    def choice(self, name: str, choices: Mapping[str, Any], default: Any = _REQUIRED) -> Any:
        """What one of some words stands for."""
        value = self.take(name, default)
        if not isinstance(value, str) or value not in choices:
            raise LlamaJaxError(
                f"{self.source}: {self.prefix}{name} is {shortened(value)}, which is not supported: expected one of "
                f"{', '.join(choices)}"
            )
        return choices[value]


class Names(NamedTuple):
    """What a format calls weights, where that is not what `parameters.Spec.foreign` says.

    Attributes:
        renamed: their names by ours, `{}` being the layer.
        fused: the weights of ours that one tensor of theirs is made of, its rows one behind the other: cut at load.
        pairs: whether the coordinates that RoPE turns stand beside each other, (2i, 2i + 1), not H/2 apart.
    """

    renamed: Mapping[str, str] = _NOTHING
    fused: Mapping[str, tuple[str, ...]] = _NOTHING
    pairs: bool = False


def _nothing(config: Config) -> dict[str, Any]:
    return {}


class Format(NamedTuple):
    """A family in one format.

    Attributes:
        kinds: by what a file says that it is of the family: `model_type`, `general.architecture`. The first is written.
        copies: other such names, of models that differ in defaults of keys, by what differs. They are read only.
        read: the family's switches, fields of `Config`, of a file's keys; what all families have is read before.
        write: the keys that say these switches.
        defaults: of keys, as the reference has them.
        architecture: what else names it: Hugging Face's class.
        names: of the weights.
        applies: tells the family from others of the same `kinds` by keys; None for the one that is left.
        partial_rope: whether RoPE may turn a part of each head only.
        window_rope: whether layers with windows have a RoPE of their own: unscaled, with `rope_local_base_freq` for
            theta if the family has a default of that key, but where `rope_parameters` says both.
        int8_tokens: whether ternary weights are multiplied with activations in int8, though the files do not say it.
    """

    kinds: tuple[str, ...]
    read: Callable[[Keys], dict[str, Any]] = lambda keys: {}
    write: Callable[[Config], dict[str, Any]] = _nothing
    defaults: Mapping[str, Any] = _NOTHING
    architecture: str = ""
    names: Names = Names()
    applies: Callable[[Keys], bool] | None = None
    partial_rope: bool = False
    window_rope: bool = False
    copies: Mapping[str, Mapping[str, Any]] = _NOTHING
    int8_tokens: bool = False


class Family(NamedTuple):
    """Models that differ from a LLaMA in switches.

    Attributes:
        name: `Config.family`.
        huggingface: config.json and safetensors, or None where transformers does not know it.
        gguf: as llama.cpp has it, or None.
    """

    name: str
    huggingface: Format | None = None
    gguf: Format | None = None


# Every family by its name.
FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Makes a family known: its files are recognised, and its configs may name it."""
    FAMILIES[family.name] = family
    Config.classes.setdefault(family.name, Config)
    return family


def family_of(kind: Any, format: str, what: str) -> Family:
    """The family of what a file says that it is.

    Args:
        kind: `model_type` or `general.architecture`.
        format: "huggingface" or "gguf".
        what: begins messages: the file, and the name of its key.

    Raises:
        LlamaJaxError: for one that is not known, with the nearest.
    """
    known = {
        name: family
        for family in FAMILIES.values()
        if getattr(family, format) is not None
        for name in (*getattr(family, format).kinds, *getattr(family, format).copies)
    }
    if not isinstance(kind, str) or kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=1, cutoff=0.6)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise LlamaJaxError(f"{what} is {shortened(kind)}: expected one of {', '.join(sorted(known))}{hint}")
    return known[kind]


def format_of(config: Config, format: str) -> Format:
    """A config's family in a format.

    Raises:
        LlamaJaxError: if it has none there.
    """
    found = getattr(FAMILIES.get(config.family, Family(config.family)), format)
    if found is None:
        able = ", ".join(name for name, family in FAMILIES.items() if getattr(family, format) is not None)
        raise LlamaJaxError(f"a model of family {config.family!r} has no {format} form: expected one of {able}")
    return found


def check_read(keys: Keys, fields: Collection[str], without_effect: Callable[[str], bool], remedy: str) -> None:
    """Refuses keys that nobody read and that are not known to be without effect; `remedy` may hold `{key}`."""
    unknown = sorted(str(key) for key in fields if str(key) not in keys.read and not without_effect(str(key)))
    if unknown:
        near = difflib.get_close_matches(unknown[0], keys.read, n=1, cutoff=0.8)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        shown = shortened(keys.prefix + unknown[0])
        raise LlamaJaxError(f"{keys.source}: unknown key {shown}{hint}: {remedy.format(key=shown[1:-1])}")
