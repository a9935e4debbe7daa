"""Which commands there are: entry points of the group `llamajax.commands`, by name, not imported before they are used.

    [project.entry-points."llamajax.commands"]
    translate = "their_package.cli.translate"

in the pyproject.toml of any installed distribution makes `llamajax translate` a command; what a command's module holds
is described in `llamajax.cli`. In a checkout of this project its own pyproject.toml says which commands are its own,
whatever was installed, from where and when: so they work with the checkout on PYTHONPATH alone. A package without both,
a checkout's file and installed metadata, has none.
"""

import dataclasses
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from llamajax.errors import LlamaJaxError
from llamajax.files import read_toml

GROUP = "llamajax.commands"
_OURS = "llamajax"  # our distribution's name
# In the overview these stand first, in the order in which a user meets them; others behind them, by name.
_ORDER = (
    *("generate", "chat", "inspect", "tokenize", "convert", "quantize", "eval", "bench", "plan", "train"),
    *("export", "verify", "run"),
)


@dataclasses.dataclass(frozen=True)
class Command:
    """What one or more distributions declare under a name.

    Attributes:
        name: as it is typed.
        modules: the module of each distribution that declares it, by the distribution's name; more than one is an error
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
        """The first that declares it: where to look for what is wrong with it."""
        return next(iter(self.modules))


def find_commands(checkout: Path = Path(__file__).parents[2]) -> dict[str, Command]:
    """All commands by name, in the overview's order.

    Args:
        checkout: the folder whose pyproject.toml, if it is this project's, says what our own commands are.
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
    """Name and module of each command in this project's pyproject.toml; None where it is not beside the package."""
    try:
        project = read_toml(checkout / "pyproject.toml").get("project", {})
    except (OSError, LlamaJaxError):  # none, or not ours: a distribution may have left one beside installed packages
        return None
    return project.get("entry-points", {}).get(GROUP) if project.get("name") == _OURS else None


def _installed() -> Iterator[tuple[str, str, str]]:
    """Name, distribution and module of each entry point of the group; of two copies the one found first counts."""
    seen = set()
    for distribution in importlib.metadata.distributions():
        # Of a few hundred distributions few declare a command: only those are parsed, and only they can fail here.
        if f"[{GROUP}]" not in (distribution.read_text("entry_points.txt") or "") or distribution.name in seen:
            continue
        seen.add(distribution.name)
        yield from (
            (entry.name, distribution.name, entry.value) for entry in distribution.entry_points.select(group=GROUP)
        )
