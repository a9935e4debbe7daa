"""Finds the commands: entry points of the group `llamajax.commands`, which are imported only when they are used.

    [project.entry-points."llamajax.commands"]
    translate = "their_package.cli.translate"

These lines in the pyproject.toml of any installed distribution make `llamajax translate` a command. `llamajax.cli`
describes what a command's module holds. In a checkout of this project, the checkout's pyproject.toml declares this
project's commands, and installed metadata of the project is ignored: so the commands work with only the checkout on
PYTHONPATH. Without the checkout's file and without installed metadata there are no commands.
"""

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from llamajax.errors import LlamaJaxError
from llamajax.files import read_toml

GROUP = "llamajax.commands"
_OURS = "llamajax"  # our distribution's name
# The overview lists these first, in the order in which a user needs them, then all others by name.
_ORDER = (
    *("generate", "chat", "inspect", "tokenize", "convert", "quantize", "eval", "bench", "plan", "train"),
    *("export", "verify", "run"),
)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that one or more distributions declare.

    Attributes:
        name: the word that the user types.
        modules: the module of the command by the name of the distribution that declares it. More than one is an error
            when the command is used.
    """

    name: str
    modules: dict[str, str]

    @property
    def module(self) -> str:
        """The module of the first distribution."""
        return next(iter(self.modules.values()))

    @property
    def distribution(self) -> str:
        """The first distribution that declares the command, for error messages."""
        return next(iter(self.modules))


def find_commands(checkout: Path = Path(__file__).parents[2]) -> dict[str, Command]:
    """All commands by name, in the overview's order.

    Args:
        checkout: the folder whose pyproject.toml, if it is this project's, declares this project's commands.
    """
    ours = _of_checkout(checkout)
    declared = [] if ours is None else [(name, _OURS, module) for name, module in ours.items()]
    declared += [entry for entry in _installed() if ours is None or entry[1] != _OURS]
    commands: dict[str, Command] = {}
    for name, distribution, module in sorted(declared, key=_position):
        command = commands.setdefault(name, Command(name, {}))
        command.modules.setdefault(distribution, module)
    return commands


def _position(entry: tuple[str, str, str]) -> tuple[int, str, bool, str]:
    name, distribution, _ = entry
    place = _ORDER.index(name) if name in _ORDER else len(_ORDER)
    return place, name, distribution != _OURS, distribution


def _of_checkout(checkout: Path) -> dict[str, str] | None:
    """Name and module of each command in this project's pyproject.toml; None if `checkout` does not hold that file."""
    try:
        project = read_toml(checkout / "pyproject.toml").get("project", {})
    except (OSError, LlamaJaxError):  # missing, or not ours: another distribution may have left one beside the packages
        return None
    return project.get("entry-points", {}).get(GROUP) if project.get("name") == _OURS else None


def _installed() -> Iterator[tuple[str, str, str]]:
    """Name, distribution and module of each entry point of the group; of two copies of a distribution, the first."""
    seen = set()
    for distribution in importlib.metadata.distributions():
        # Only the few distributions that declare a command are parsed, so only these can fail here.
        if f"[{GROUP}]" not in (distribution.read_text("entry_points.txt") or "") or distribution.name in seen:
            continue
        seen.add(distribution.name)
        yield from (
            (entry.name, distribution.name, entry.value) for entry in distribution.entry_points.select(group=GROUP)
        )
