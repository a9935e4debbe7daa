"""Defines families, as a table for each format, and reads the keys of a file's description."""

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
    """The keys of one file. Keys that were read are remembered, so that keys that nobody read can be refused.

    Attributes:
        source: the beginning of error messages.
        prefix: a prefix of every key in the file, which the names here omit.
        read: the keys that were asked for.
    """

    def __init__(
        self, fields: Mapping[str, Any], source: str, defaults: Mapping[str, Any] = _NOTHING, prefix: str = ""
    ):
        """Stores the keys; `defaults` replace values that are missing or null."""
        self._fields, self._defaults = fields, defaults
        self.source, self.prefix = source, prefix
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the file has a value for a key that is not null."""
        return self._fields.get(name) is not None

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """Returns the value of a key; if it is missing or null, the family's default, or else `default`.

        Raises:
            LlamaJaxError: if there is neither a value nor a default.
        """
        self.read.add(name)
        value = self._fields.get(name)
        if value is None:
            value = self._defaults.get(name, default)
        if value is _REQUIRED:
            raise LlamaJaxError(f"{self.source}: missing key {self.prefix + name!r}: expected a value")
        return value

    def peek(self, name: str) -> Any:
        """The value of a key, None if it is missing; does not count the key as read."""
        return self._fields.get(name)

    def or_null(self, name: str) -> Any:
        """The value of a key for which null has a meaning: None for null, the family's default if it is missing."""
        self.read.add(name)
        return self._fields.get(name, self._defaults.get(name))

    def whole(self, name: str, most: int = LARGEST_DIMENSION) -> int:
        """The value of a key that is a whole number from 1 to `most`."""
        value = self.take(name)
        check_whole(f"{self.source}: {self.prefix}{name}", value, most)
        return value

    def whole_or_null(self, name: str, most: int = LARGEST_DIMENSION) -> Any:
        """The value of a key that is a whole number from 1 to `most`, or null; see `or_null`."""
        value = self.or_null(name)
        if value is not None:
            check_whole(f"{self.source}: {self.prefix}{name}", value, most)
        return value

    def number_or_null(self, name: str) -> Any:
        """The value of a key that is a number above 0, or null; see `or_null`."""
        value = self.or_null(name)
        if value is not None:
            check_number(f"{self.source}: {self.prefix}{name}", value, low=0.0, above=True)
        return value

    def only(self, name: str, *allowed: Any) -> None:
        """Checks a key that must be missing, null, or one of the `allowed` values, for which it has no effect."""
        self.read.add(name)
        value = self._fields.get(name)
        # Types are compared as well, so that 1 does not count as true.
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
        """What the value of a key, one of the words in `choices`, stands for."""
        value = self.take(name, default)
        if not isinstance(value, str) or value not in choices:
            raise LlamaJaxError(
                f"{self.source}: {self.prefix}{name} is {shortened(value)}, which is not supported: expected one of "
                f"{', '.join(choices)}"
            )
        return choices[value]


class Names(NamedTuple):
    """The names of weights in a format, if they differ from `parameters.Spec.foreign`.

    Attributes:
        renamed: the format's names by our names; `{}` stands for the layer.
        fused: for a tensor of the format, our weights whose rows it holds one after the other; it is split at load.
        pairs: whether RoPE rotates adjacent coordinates, (2i, 2i + 1), instead of coordinates H/2 apart.
    """

    renamed: Mapping[str, str] = _NOTHING
    fused: Mapping[str, tuple[str, ...]] = _NOTHING
    pairs: bool = False


def _nothing(config: Config) -> dict[str, Any]:
    return {}


class Format(NamedTuple):
    """A family in one format.

    Attributes:
        kinds: the values of `model_type` or `general.architecture` that name the family; the first one is written.
        copies: further such names, each with the defaults in which its models differ. They are read, but not written.
        read: reads the family's switches, fields of `Config`, from a file's keys; the fields that all families share
            have been read before.
        write: returns the keys that express these switches.
        defaults: the defaults of keys in the reference implementation.
        architecture: the name of Hugging Face's model class.
        names: the names of the weights.
        applies: tells from the keys whether a file belongs to this family, if several have the same `kinds`; None for
            the family to which all other files belong.
        partial_rope: whether RoPE may rotate only a part of each head.
        window_rope: whether layers with a window have their own RoPE. It is unscaled, with `rope_local_base_freq` as
            theta if the family has a default for that key, unless `rope_parameters` gives both.
        int8_tokens: whether ternary weights are multiplied with activations in int8, though the files do not say so.
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
    """Models that differ from a LLaMA only in switches.

    Attributes:
        name: the value of `Config.family`.
        huggingface: the family in config.json and safetensors, or None if transformers does not have it.
        gguf: the family in llama.cpp's GGUF, or None.
    """

    name: str
    huggingface: Format | None = None
    gguf: Format | None = None


# Every family by its name.
FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Registers a family, so that its files are recognised and configs may name it."""
    FAMILIES[family.name] = family
    Config.classes.setdefault(family.name, Config)
    return family


def family_of(kind: Any, format: str, what: str) -> Family:
    """Returns the family that a file names.

    Args:
        kind: the value of `model_type` or `general.architecture`.
        format: "huggingface" or "gguf".
        what: the beginning of error messages: the file, and the name of its key.

    Raises:
        LlamaJaxError: for an unknown kind; the message names the nearest known one.
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
    """Returns the format table of a config's family.

    Raises:
        LlamaJaxError: if the family does not exist in that format.
    """
    found = getattr(FAMILIES.get(config.family, Family(config.family)), format)
    if found is None:
        able = ", ".join(name for name, family in FAMILIES.items() if getattr(family, format) is not None)
        raise LlamaJaxError(f"a model of family {config.family!r} has no {format} form: expected one of {able}")
    return found


def check_read(keys: Keys, fields: Collection[str], without_effect: Callable[[str], bool], remedy: str) -> None:
    """Refuses keys that were not read and are not known to be without effect; `remedy` may hold `{key}`."""
    unknown = sorted(str(key) for key in fields if str(key) not in keys.read and not without_effect(str(key)))
    if unknown:
        near = difflib.get_close_matches(unknown[0], keys.read, n=1, cutoff=0.8)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        shown = shortened(keys.prefix + unknown[0])
        raise LlamaJaxError(f"{keys.source}: unknown key {shown}{hint}: {remedy.format(key=shown[1:-1])}")
