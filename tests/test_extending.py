"""The pages of docs/extending: each diff applies to the tree, and the Python code of its page runs with it applied."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import ROOT, python_of

PAGES = sorted(page for page in (ROOT / "docs" / "extending").glob("*.md") if page.stem != "index")
FAMILY = "family"  # in the tree already: its diff is reversed first
_RUN = """
import json, sys, traceback
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
failed = {}
for name, blocks in json.load(sys.stdin).items():
    scope = {}
    try:
        for line, block in blocks:
            exec(compile("\\n" * (line - 1) + block, name, "exec"), scope)
    except BaseException:
        failed[name] = traceback.format_exc()
print(json.dumps(failed))
"""


def _apply(folder: Path, page: Path, *options: str) -> None:
    command = ["git", "apply", "--whitespace=error-all", *options, str(page.with_suffix(".diff"))]
    # git would look for a repository in the folders above; this prevents it.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{page.stem}.diff: {done.stderr}"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extending") / "tree"
    for package in ("llamajax", "quant", "export", "configs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_pages_are_these() -> None:
    assert [page.stem for page in PAGES] == ["backend", "cache", FAMILY, "format", "scheme", "target"]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert f'--8<-- "docs/extending/{page.stem}.diff"' in text and python_of(page)


def test_each_diff_applies_and_what_it_adds_works(tree: Path, tmp_path: Path) -> None:
    """Checks each diff by itself, then applies all of them to one copy and runs the pages' code in one process."""
    _apply(tree, ROOT / "docs" / "extending" / FAMILY, "--reverse")
    assert not (tree / "llamajax" / "families" / "exaone.py").exists()
    for page in PAGES:
        _apply(tree, page, "--check")
    for page in PAGES:
        _apply(tree, page)
    given = json.dumps({page.stem: python_of(page) for page in PAGES})
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-c", _RUN]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, input=given, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n".join(failed.values())


def test_the_diffs_keep_to_the_style(tree: Path) -> None:
    """The lines that they add pass ruff, where it is installed: `make lint` checks the tree, this test the copy."""
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if ruff is None:
        pytest.skip("no ruff: `make lint` installs it")
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *check, "."], cwd=tree, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
