"""Rules about the source: imports run one way, flags live in one place, and importing has no effects."""

import ast
import fnmatch
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"quant": {"llamajax", "export"}, "llamajax": {"export"}, "export": set()}


def _modules(package: str) -> Iterator[tuple[Path, ast.Module]]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{ROOT / package} holds no module"
    for file in files:
        yield file.relative_to(ROOT), ast.parse(file.read_bytes(), str(file))


def _imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields every module that is imported anywhere in a file, inside functions too, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import: expected an absolute one"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from ((arg.value, node.lineno) for arg in node.args if isinstance(arg, ast.Constant))


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_run_one_way(package: str) -> None:
    wrong = [
        f"{file}:{line} imports {name}"
        for file, tree in _modules(package)
        for name, line in _imported(tree)
        if name.split(".")[0] in FORBIDDEN[package]
    ]
    assert not wrong


def test_the_check_sees_imports_of_every_kind() -> None:
    source = "import export.a\ndef f():\n    from export import b\n    importlib.import_module('export.c')\n"
    assert [name for name, _ in _imported(ast.parse(source))] == ["export.a", "export.b", "export.c"]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_flags_live_in_the_command_line_only(package: str) -> None:
    """absl's logging may be imported elsewhere; its flags and app may not."""
    allowed = ("llamajax/__main__.py", "llamajax/cli/", "export/cli/")
    wrong = [
        f"{file}:{line} imports {name}"
        for file, tree in _modules(package)
        for name, line in _imported(tree)
        if name.startswith(("absl.flags", "absl.app")) and not file.as_posix().startswith(allowed)
    ]
    assert not wrong


def test_no_module_reads_the_environment() -> None:
    """Only four modules read the environment.

    The command line keeps compiled programs in the cache folder that the environment names, and the chat's input adapts
    to the terminal that it names. The lookup of kept programs includes what XLA reads from the environment. `--threads`
    works only through the environment, where XLA reads it.

    Targets and runners are not modules but scripts, for processes of their own.
    """
    scripts = ("export/targets/", "export/runners/")
    wrong = [
        f"{file}:{node.lineno}"
        for package in FORBIDDEN
        for file, tree in _modules(package)
        if not file.as_posix().startswith(scripts)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv")
    ]
    assert {place.split(":")[0] for place in wrong} == {
        "llamajax/cli/__init__.py",
        "llamajax/cli/chat_input.py",
        "llamajax/generation/compilation.py",
        "llamajax/threads.py",
    }


# ---- Sizes and types -------------------------------------------------------------------------------------------------

MOST_LINES = {"module": 450, "function": 70}
STORY_WORDS = "llamajax/box/story_words.py"  # data, one word per line


def _too_long(file: Path, source: str) -> Iterator[str]:
    """Yields modules and functions with more lines than allowed; decorators and docstrings count."""
    lines = len(source.splitlines())
    if lines > MOST_LINES["module"]:
        yield f"{file}: {lines} lines"
    for node in ast.walk(ast.parse(source, str(file))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(each.lineno for each in (node, *node.decorator_list))
            lines = (node.end_lineno or first) + 1 - first
            if lines > MOST_LINES["function"]:
                yield f"{file}:{first} {node.name}: {lines} lines"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_module_and_no_function_is_too_long(package: str) -> None:
    files = [file for file, _ in _modules(package) if file.as_posix() != STORY_WORDS]
    assert [each for file in files for each in _too_long(file, (ROOT / file).read_text(encoding="utf-8"))] == []


def test_the_check_of_sizes_counts_lines() -> None:
    body = "".join("    pass\n" for _ in range(69))
    file = Path("a.py")
    assert list(_too_long(file, f"def f():\n{body}" * 6)) == []
    assert list(_too_long(file, f"class A:\n    @property\n    def f(self):\n{body.replace('    ', '        ')}")) == [
        "a.py:2 f: 71 lines"
    ]
    assert list(_too_long(file, "\n" * 451)) == ["a.py: 451 lines"]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_types_are_for_others_too(package: str) -> None:
    """The packages need PEP 561's marker, without which type checkers ignore an installed package's annotations."""
    assert (ROOT / package / "py.typed").is_file()
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert package in build["wheel"]["packages"] and package in build["sdist"]["include"], "packaged with all files"
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not [pattern for pattern in ignored if fnmatch.fnmatch("py.typed", pattern)], (
        "the build leaves out files that git ignores"
    )


# ---- Effects ---------------------------------------------------------------------------------------------------------

# Runs in a fresh interpreter. Flags of absl and of libraries, which exist without us, do not count.
_EFFECTS = """
import json, logging, os, sys, warnings
import absl.flags, flax.nnx, jax, optax, orbax.checkpoint, safetensors, sentencepiece
flags = set(absl.flags.FLAGS)
environment, handlers = dict(os.environ), list(logging.getLogger().handlers)
read = []
class Watched(type(os.environ)):
    def __getitem__(self, key):
        read.append(key)
        return super().__getitem__(key)
os.environ.__class__ = Watched
import llamajax
os.environ.__class__ = Watched.__mro__[1]
from jax._src import xla_bridge
print(json.dumps({
    "new flags": sorted(set(absl.flags.FLAGS) - flags),
    "environment read": [key for key in read if "LLAMAJAX" in key.upper()],
    "environment changed": dict(os.environ) != environment,
    "backends": sorted(xla_bridge._backends),
    "log handlers": len(logging.getLogger().handlers) - len(handlers),
    "exported": [name for name in llamajax.__all__ if not hasattr(llamajax, name)],
    "cli": [name for name in sys.modules if name.startswith(("llamajax.cli", "llamajax.__main__", "export"))],
}))
"""


def test_importing_has_no_effects() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _EFFECTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    effects = json.loads(done.stdout)
    assert effects == {
        "new flags": [],
        "environment read": [],
        "environment changed": False,
        "backends": [],
        "log handlers": 0,
        "exported": [],
        "cli": [],
    }
