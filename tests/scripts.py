"""Loads the scripts of benchmarks/ as modules, for their tests."""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@contextlib.contextmanager
def script(name: str) -> Iterator[types.ModuleType]:
    """Loads a script, which may import those beside it; none stays in `sys.modules`."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(SCRIPTS))
        for module in set(sys.modules) - before:
            if (SCRIPTS / f"{module}.py").exists():
                del sys.modules[module]
