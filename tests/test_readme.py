"""The README tells the truth: its Python runs, its files exist, its commands are commands."""

import functools
import re
from pathlib import Path

import pytest

import llamajax
from llamajax.cli import COMMANDS
from llamajax.config import preset_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """As it stands there, but for stories that end sooner: what was compiled quickly runs slowly."""
    monkeypatch.chdir(tmp_path)
    for name in ("generate", "stream"):
        monkeypatch.setattr(llamajax, name, functools.partial(getattr(llamajax, name), max_new_tokens=48))
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert type(scope["gradient"]).__name__ == "Llama"
    assert (tmp_path / "box-int4" / "manifest.json").is_file()
    assert len(capsys.readouterr().out) > 100, "the streamed story"


def test_the_tree_names_what_there_is() -> None:
    tree = re.search(r"## The house\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert tree
    folder = ""
    for line in tree[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0].rstrip(",")
        folder = name if indent == 0 else folder
        path = ROOT / (name if indent == 0 else folder + name)
        assert path.exists(), f"{path} is in the README only"
    for package in ("llamajax", "quant"):
        for file in (ROOT / package).glob("*.py"):
            assert file.name == "__init__.py" or file.name in tree[1], f"{file} is not in the README"


def test_commands_and_presets() -> None:
    commands = set(re.findall(r"^llamajax (\w+)", README, flags=re.MULTILINE))
    assert commands == set(COMMANDS)
    assert "make demo" in README and "make test" in README
    listed = README[README.index("## Presets") : README.index("## Limitations")]
    assert all(size in listed for size in ("7B", "13B", "30B", "65B", "70B", "8B", "405B", "1B", "3B", "1.1B"))
    assert f"names {len(preset_names())}:" in listed
