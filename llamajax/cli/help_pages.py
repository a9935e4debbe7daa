"""The pages that `llamajax`, `llamajax --help` and `llamajax COMMAND --help` print."""

import re
import shutil
import sys
import textwrap
from collections.abc import Mapping
from types import ModuleType

from absl import flags

from llamajax.cli.flag_groups import grouped
from llamajax.cli.terminal import bold, is_terminal, printable

_NARROWEST, _WIDEST = 60, 100
_LONGEST_NAME = 26  # of a flag with its placeholder; the text of a longer flag begins on the next line
_FIRST_STEPS = (
    ("llamajax generate --prompt='Once upon a time'", "writes a story with the small model that is included"),
    ("llamajax chat", "answers what you type; fetches a model of 98 MB once"),
    ("llamajax inspect --model=FILE", "shows what a model file holds"),
)


def first_steps() -> str:
    """The page of `llamajax` without a command: what to try first."""
    lines = ["llamajax runs, quantizes and exports LLaMA models.", "", bold("Try first:")]
    for command, text in _FIRST_STEPS:
        lines += [f"  {command}", *_wrapped(text, "      ")]
    return "\n".join([*lines, "", "llamajax --help lists all commands."])


def overview(summaries: Mapping[str, str]) -> str:
    """The page of `llamajax --help`: all commands with their summaries."""
    width = max(map(len, summaries), default=0)
    lines = ["llamajax runs, quantizes and exports LLaMA models.", ""]
    lines += [f"{bold('Usage:')} llamajax COMMAND [--flag=value …]", "", bold("Commands:")]
    for name, summary in summaries.items():
        lines += [f"  {name:{width}}  {summary}"]
    lines += ["", bold("Examples:"), *(f"  {command}" for command, _ in _FIRST_STEPS), ""]
    return "\n".join([*lines, "llamajax COMMAND --help shows the flags of a command, llamajax --version the version."])


def page(name: str, command: ModuleType, values: flags.FlagValues) -> str:
    """The page of `llamajax COMMAND --help`: what the command does, examples, and its flags by group."""
    positional = getattr(command, "POSITIONAL", None)
    argument = f"{_placeholder(values[positional])} " if positional else ""
    lines = _wrapped(f"llamajax {name}: {command.SUMMARY}", "")
    lines += ["", f"{bold('Usage:')} llamajax {name} {argument}[--flag=value …]"]
    lines += ["", bold("Examples:"), *(f"  {example}" for example in command.EXAMPLES)]
    groups = grouped(values)
    names = [len(_shown_name(flag)) for members in groups.values() for flag in members]
    column = max((length for length in names if length <= _LONGEST_NAME), default=0) + 4
    for heading, members in groups.items():
        lines += ["", bold(f"{heading}:")]
        for flag in members:
            lines += _entry(flag, column)
    return "\n".join(lines)


def _entry(flag: flags.Flag, column: int) -> list[str]:
    """The lines of a flag: its name, and its text in the second column."""
    name = f"  {_shown_name(flag)}"
    text = f"{_text(flag).replace('`', '')}{_choices_and_default(flag)}"
    lines = _wrapped(text, " " * column)
    if len(name) + 2 > column:
        return [name, *lines]
    return [name + lines[0][len(name) :], *lines[1:]]


def _shown_name(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"--{flag.name}" if flag.default is False else f"--[no]{flag.name}"
    return f"--{flag.name}={_placeholder(flag)}"


def _placeholder(flag: flags.Flag) -> str:
    """The placeholder for the value: the word in backquotes in the flag's text, or else a word for the flag's type."""
    if named := re.search(r"`([^`]+)`", _text(flag)):
        return named[1]
    return {"int": "N", "float": "X"}.get(flag.flag_type(), "VALUE")


def _text(flag: flags.Flag) -> str:
    """The flag's text without what absl adds: the values of an enumeration, and how to repeat a flag."""
    return re.sub(r"^<[^>]*>: ", "", flag.help.split(";\n")[0])


def _choices_and_default(flag: flags.Flag) -> str:
    parts = []
    choices = getattr(flag.parser, "enum_values", ())
    if len(choices) > 1:
        parts.append(f"one of {', '.join(choices)}")
    if flag.boolean:
        parts += ["on by default"] if flag.default else []
    elif flag.default not in (None, "", [], [""]):
        shown = flag.default if isinstance(flag.default, list) else [flag.default]
        parts.append(f"default: {', '.join(printable(str(value)) for value in shown)}")
    return f" ({'; '.join(parts)})" if parts else ""


def _wrapped(text: str, indent: str) -> list[str]:
    """Lines at most as wide as the terminal, or 100 columns; a longer word, such as a path, stays whole."""
    return textwrap.wrap(
        text,
        _width(),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _width() -> int:
    if not is_terminal(sys.stdout):
        return _WIDEST
    return min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
