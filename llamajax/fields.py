"""Checks of the fields of a config: each error names the field, its value and what was expected."""

import dataclasses
import sys
from collections.abc import Collection, Mapping
from typing import Any

from llamajax.errors import LlamaJaxError
from llamajax.files import shortened

# Far above any LLaMA's dimensions. A header with more is damaged or hostile, and refused before anything is allocated.
LARGEST_DIMENSION = 1 << 27


def check_whole(name: str, value: Any, most: int = LARGEST_DIMENSION) -> None:
    """Refuses a value other than a whole number from 1 to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected a whole number from 1 to {most}")


def check_number(name: str, value: Any, *, low: float, above: bool = False) -> None:
    """Refuses a value other than a finite number of at least `low`, or above it."""
    # Compared rather than math.isfinite, which raises for whole numbers beyond the range of float.
    inside = not isinstance(value, bool) and isinstance(value, int | float) and low <= value <= sys.float_info.max
    if not inside or (above and value == low):
        bound = "" if low == -sys.float_info.max else f", {'above' if above else 'at least'} {low}"
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected a finite number{bound}")


def check_flag(name: str, value: Any) -> None:
    """Refuses a value other than True and False."""
    if not isinstance(value, bool):
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected true or false")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuses a value outside of a list of words."""
    if not isinstance(value, str) or value not in choices:
        raise LlamaJaxError(f"{name} is {shortened(value)}: expected one of {', '.join(choices)}")


def only_known(cls: type, fields: Any) -> dict[str, Any]:
    """Returns `fields` after checking that `cls` has each of them and that none without a default is missing."""
    if not isinstance(fields, Mapping):
        raise LlamaJaxError(f"{cls.__name__} is {shortened(fields)}: expected a table of fields")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in fields if key not in known)
    if unknown:
        raise LlamaJaxError(f"unknown key {shortened(unknown[0])}: {cls.__name__} has {', '.join(known)}")
    required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in fields]
    if missing:
        raise LlamaJaxError(f"missing key {missing[0]!r}: {cls.__name__} needs {', '.join(required)}")
    return dict(fields)
