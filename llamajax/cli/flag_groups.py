"""Headings of flags in `--help`: a command declares them where it defines its flags.

    with group(values, COMMON):
        flags.DEFINE_string("prompt", "", "Continues `TEXT`.", flag_values=values)

The word in backquotes is the placeholder for the flag's value in `--help`: `--prompt=TEXT`.
"""

import contextlib
from collections.abc import Iterator

from absl import flags

COMMON = "Common"
MODEL = "Reading the model"
SPEED = "Speed and memory"
OUTPUT = "Output"
# The heading of flags that are defined outside of a group.
_OTHER = "Other"
# These groups come after the groups of the command itself.
_LAST = (MODEL, SPEED, OUTPUT, _OTHER)
# The flags that absl and `llamajax.cli` define for every command.
_EVERYWHERE = ("flagfile", "undefok", "help", "h")


@contextlib.contextmanager
def group(values: flags.FlagValues, heading: str) -> Iterator[None]:
    """Puts the flags that are defined inside the block under a heading; several blocks may share a heading."""
    before = set(values)
    yield
    for name in set(values) - before:
        values[name].heading = heading  # type: ignore[attr-defined]


def grouped(values: flags.FlagValues) -> dict[str, list[flags.Flag]]:
    """The flags of a command by heading, in the order of their definition: common flags first, without aliases."""
    found: dict[str, list[flags.Flag]] = {COMMON: []}
    last: dict[str, list[flags.Flag]] = {heading: [] for heading in _LAST}
    for flag in flags_of(values):
        heading = getattr(flag, "heading", _OTHER)
        (last if heading in last else found).setdefault(heading, []).append(flag)
    return {heading: members for heading, members in (found | last).items() if members}


def flags_of(values: flags.FlagValues) -> list[flags.Flag]:
    """The flags that the command defines, in the order of their definition, without aliases."""
    found = [values[name] for name in values if name not in _EVERYWHERE]
    return [flag for flag in found if not _is_alias(flag)]


def _is_alias(flag: flags.Flag) -> bool:
    return flag.help.startswith("Alias for --")
