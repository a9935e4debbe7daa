"""Boundaries hold: types of weights and caches are tested in one place, and packages meet at their façades."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Scripts for other Pythons and processes, which import nothing from this repository but a neighbour.
SCRIPTS = ("export/targets/", "export/runners/")
TYPES = (
    *("Weight", "QTensor", "Mixed", "Layout", "TiledWeight", "GpuWeight", "TpuWeight", "ExportedWeight", "Probe"),
    *("KVCache", "NoCache", "Part", "DensePart", "TiledPart", "QuantizedPart", "RotatedPart"),
)


def _files(*packages: str) -> Iterator[tuple[str, ast.Module]]:
    for package in packages:
        files = sorted((ROOT / package).rglob("*.py"))
        assert files, package
        for file in files:
            yield file.relative_to(ROOT).as_posix(), ast.parse(file.read_bytes(), str(file))


def test_nobody_else_asks_for_types_of_weights_and_caches() -> None:
    asked = [
        f"{file}:{node.lineno}"
        for file, tree in _files("llamajax", "export")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("isinstance", "issubclass", "type")
        and any(re.search(rf"\b{name}\b", ast.unparse(argument)) for argument in node.args for name in TYPES)
    ]
    assert [place for place in asked if not place.startswith("llamajax/caches/")] == []


def test_axis_letters_are_parsed_in_one_place() -> None:
    """Only llamajax/parameters.py parses a suffix of axes such as `_VD`; elsewhere it is part of a name."""
    parsed = [
        f"{file}:{node.lineno}"
        for file, tree in _files("llamajax", "quant", "export")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("endswith", "startswith", "removesuffix", "rpartition", "rsplit", "index", "find")
        and any(re.search(r"_[A-Z]{1,2}\b|\.axes\b", ast.unparse(part)) for part in (node.func.value, *node.args))
    ]
    assert [place.partition(":")[0] for place in parsed] == ["llamajax/parameters.py"]


@pytest.mark.parametrize(("package", "of"), [("llamajax", "quant"), ("export", "quant"), ("export", "llamajax")])
def test_packages_meet_at_their_facades(package: str, of: str) -> None:
    """Packages import names that a façade exports (`from quant import X`); commands may use `llamajax.cli.*`."""
    exported = set(importlib.import_module(of).__all__) | {"__version__"}
    wrong = []
    for file, tree in _files(package):
        if file.startswith(SCRIPTS):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wrong += [f"{file}:{node.lineno}" for alias in node.names if alias.name.startswith(f"{of}.")]
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                if file.startswith("export/cli/") and node.module.startswith("llamajax.cli."):
                    continue
                if node.module.startswith(f"{of}."):
                    wrong.append(f"{file}:{node.lineno} {node.module}")
                elif node.module == of:
                    wrong += [f"{file}:{node.lineno} {a.name}" for a in node.names if a.name not in exported]
    assert wrong == []


@pytest.mark.parametrize("package", ["llamajax", "quant", "export"])
def test_what_a_facade_exports_is_documented(package: str) -> None:
    module = importlib.import_module(package)
    page = (ROOT / "docs" / f"{package}.md").read_text(encoding="utf-8")
    described = re.findall(r"^\| `(\w+)` \| .{10,}", page, re.MULTILINE)
    assert sorted(described) == sorted(module.__all__)
    assert all(getattr(module, name).__doc__ or not callable(getattr(module, name)) for name in module.__all__)
    assert len(described) == len(set(described))
