"""Parses a command's arguments into its flags, or refuses them in one line that names the nearest spelling."""

import difflib
import re
from collections.abc import Iterable, Sequence
from types import ModuleType

from absl import flags

from llamajax.cli.flag_groups import flags_of

_ILLEGAL = re.compile(r"flag --(\w+)=(.*?): (.*)", re.DOTALL)
_MISSING = re.compile(r"Missing value for flag --?(\w+)")


class WrongCommandLineError(Exception):
    """Arguments that a command does not take; the message is one line for its user."""


def parse(argv: Sequence[str], command: ModuleType, values: flags.FlagValues) -> None:
    """Sets the flags of a command.

    Args:
        argv: the command's name and its arguments.
        command: the command's module.
        values: the flags that the command defined.

    Raises:
        WrongCommandLineError: for an unknown flag, a value that a flag does not take, or a surplus argument.
    """
    try:
        surplus = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise WrongCommandLineError(_unknown_flag(error.flagname, values)) from None
    except (flags.Error, ValueError) as error:  # absl raises ValueError for --noecho=3
        raise WrongCommandLineError(_wrong_value(str(error), values)) from None
    positional = getattr(command, "POSITIONAL", None)
    if surplus and positional and values[positional].value is None and not values.help:
        values[positional].value = surplus.pop(0)
    if surplus and not values.help:
        raise WrongCommandLineError(f"unexpected argument {surplus[0]!r}: expected --flag=value")


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The only candidate that begins with a word, or else the one spelt most like it; None if none is similar."""
    there = list(candidates)
    begun = [candidate for candidate in there if candidate.startswith(word)]
    if len(begun) == 1:
        return begun[0]
    return next(iter(difflib.get_close_matches(word, there, 1)), None)


def in_words(values: Sequence[str]) -> str:
    """Joins values as in a sentence: a, b or c."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"


def _unknown_flag(name: str, values: flags.FlagValues) -> str:
    there = flags_of(values)
    names = [flag.name for flag in there] + [f"no{flag.name}" for flag in there if flag.boolean]
    close = nearest(name.replace("-", "_"), names)
    return f"unknown flag --{name}" + (f": did you mean --{close}?" if close else "")


def _wrong_value(message: str, values: flags.FlagValues) -> str:
    """Converts absl's message about a wrong value to one that says what the flag expects."""
    if found := _MISSING.fullmatch(message):
        return f"--{found[1]}: no value is given: expected --{found[1]}=VALUE"
    if not (found := _ILLEGAL.fullmatch(message)):
        return message
    name, value, _ = found.groups()
    parser = values[name].parser
    choices = getattr(parser, "enum_values", None)
    if choices:
        close = nearest(value, choices)
        expected = f"{in_words(choices)}" + (f"; did you mean {close}?" if close else "")
    elif values[name].boolean:
        expected = f"--{name} or --no{name}"
    else:
        expected = re.sub(r"in the range \[(\S+), (\S+)\]", r"from \1 to \2", parser.syntactic_help)
    return f"--{name}={value}: expected {expected}"
