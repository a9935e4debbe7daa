"""README and docs are correct: commands run and print what is shown, Python code runs, links have targets."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest

import llamajax
from llamajax.cli import COMMANDS
from llamajax.config import preset_names
from tests import pages
from tests.pages import ROOT, Command, commands_of, python_of, why_not_run

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages.pages()}
README = PAGES["README.md"].read_text(encoding="utf-8")
# Pages whose Python code no test here runs, with the reason.
PYTHON_ELSEWHERE = {
    "docs/research.md": "tests/test_research.py runs it and compares what it finds",
    "docs/chat.md": "needs a chat model, of 98 MB; tests/test_chat_library.py says the same to a tiny one",
    "docs/tokenizers.md": "needs a model that fills in; tests/test_infill.py has its tokens",
}
PYTHON_ELSEWHERE |= {
    name: "tests/test_extending.py runs it, where the diff is applied" for name in PAGES if "/extending/" in name
}
# Part of a command -> the optional package it needs. Only `make test-extras` runs the commands of such pages.
EXTRAS = {"onnx": "onnxruntime", "iree": "iree.runtime"}


def _extra(page: str) -> str | None:
    texts = [one.text for one in commands_of(PAGES[page]) if not why_not_run(one)]
    return next((module for part, module in EXTRAS.items() if any(part in text for text in texts)), None)


def _check(commands: list[Command], results: list[tuple[int, str]]) -> None:
    """Asserts that every command succeeds and prints what its page shows."""
    for command, (code, printed) in zip(commands, results, strict=True):
        assert code == 0, f"{command.page}:{command.line}: {command.text}: {printed}"
        missing = pages.prints(command.shown, printed)
        assert missing is None, f"{command.page}:{command.line}: no line {missing!r} in:\n{printed}"


def test_the_check_sees_what_is_not_printed() -> None:
    shown = "a 12.5 MiB file\n…\nlast wo…\n"
    assert pages.prints(shown, "a 3 KiB file\nother\nlast word 3\n") is None
    assert pages.prints("first\n…\nsecond\n", "first\nsecond\n") is None
    assert pages.prints(shown, "a file\nlast word") == "a # unit file"
    assert pages.prints("first\nsecond\n", "second\nfirst\n") == "second"


def _run(names: list[str], folder: Path) -> None:
    work, groups = [], []
    for number, name in enumerate(names):
        place = folder / str(number)
        place.mkdir()
        groups.append([one for one in commands_of(PAGES[name]) if not why_not_run(one)])
        work.append((place, [one.text for one in groups[-1]]))
    for group, results in zip(groups, pages.run(work, folder / "report.json"), strict=True):
        _check(group, results)


def test_the_commands_run(tmp_path: Path) -> None:
    """All commands run in one process: otherwise each would start JAX."""
    names = [name for name in PAGES if not _extra(name)]
    assert "docs/commands.md" in names and "docs/index.md" in names
    _run(names, tmp_path)


@pytest.mark.extras
@pytest.mark.parametrize("name", [name for name in PAGES if _extra(name)])
def test_the_commands_run_with_other_runtimes(name: str, tmp_path: Path) -> None:
    pytest.importorskip(_extra(name) or "")
    _run([name], tmp_path)


def test_what_is_not_run_has_a_reason() -> None:
    """Every pattern in `NOT_RUN` matches a command, and most commands of docs/commands.md are run."""
    commands = [command for page in PAGES.values() for command in commands_of(page)]
    for pattern, why in pages.NOT_RUN.items():
        assert any(why_not_run(one, {pattern: why}) for one in commands), f"no page has a command like {pattern}"
    on_page = [one for one in commands if one.page == "docs/commands.md"]
    assert sum(not why_not_run(one) for one in on_page) >= 12


def test_every_command_has_a_part_of_the_page() -> None:
    headings = re.findall(r"^## (\w+)$", PAGES["docs/commands.md"].read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(COMMANDS)
    assert "make demo" in README and "make test" in README and "make chat" in README
    assert all(re.search(rf"\b{name}\b", README) for name in COMMANDS)


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if python_of(page)])
def test_the_python_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A page's Python runs as written, except that stories end sooner: code compiled without optimization is slow."""
    if name in PYTHON_ELSEWHERE:
        pytest.skip(PYTHON_ELSEWHERE[name])
    monkeypatch.chdir(tmp_path)
    for function in ("generate", "stream"):
        whole = getattr(llamajax, function)
        monkeypatch.setattr(llamajax, function, functools.partial(_shorter, whole))
    scope: dict[str, object] = {}
    for line, block in python_of(PAGES[name]):
        exec(compile("\n" * (line - 1) + block, name, "exec"), scope)
    if name in ("README.md", "docs/library.md"):
        assert type(scope["gradient"]).__name__ == "Llama"
        assert (tmp_path / "box-int4" / "manifest.json").is_file()
        assert len(capsys.readouterr().out) > 100, "the story was not printed"


def _shorter(function: Any, *arguments: Any, max_new_tokens: int = 48, **options: Any) -> Any:
    return function(*arguments, max_new_tokens=min(max_new_tokens, 48), **options)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180
    assert max(map(len, README.splitlines())) <= 160


def test_the_tree_names_what_there_is() -> None:
    page = PAGES["docs/architecture.md"].read_text(encoding="utf-8")
    tree = re.search(r"## The tree\n\n```\n(.*?)```", page, flags=re.DOTALL)
    assert tree
    folder = ""
    for line in tree[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0].rstrip(",")
        folder = name if indent == 0 else folder
        path = ROOT / (name if indent == 0 else folder + name)
        assert path.exists(), f"{path} is on the page but does not exist"
    for package in ("llamajax", "quant"):
        for file in (ROOT / package).glob("*.py"):
            assert file.name == "__init__.py" or file.name in tree[1], f"{file} is not on the page"
    for name in re.findall(r"^(\w+)/ ", README[README.index("## The house") :], re.MULTILINE):
        assert (ROOT / name).is_dir(), f"{name} is in the README but does not exist"


def test_presets() -> None:
    page = PAGES["docs/models.md"].read_text(encoding="utf-8")
    listed = page[page.index("## Presets") : page.index("## The model in the box")]
    assert all(size in listed for size in ("7B", "13B", "30B", "65B", "70B", "8B", "405B", "1B", "3B", "1.1B"))
    assert f"names {len(preset_names())}:" in listed


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_exist(name: str) -> None:
    """Links within the repository have targets, and files that a page names in code exist."""
    page = PAGES[name]
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), f"{name}: {link}"
    for path in re.findall(r"`((?:llamajax|quant|export|tests|configs|benchmarks|docs)/[\w/.-]*)`", text):
        assert (ROOT / path).exists(), f"{name}: {path}"


def test_every_page_is_in_the_navigation() -> None:
    """`make docs` checks this too, where mkdocs is installed."""
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2])
    assert sorted(f"docs/{each}" for each in listed) == sorted(name for name in PAGES if name != "README.md")
