"""The commands and the Python code of README and docs: finds and runs them, and compares what they print.

    python -m tests.pages docs/commands.md       # writes what each command prints into its page

A page's commands stand in `console` blocks: a line that begins with `$ `, continued after a backslash, and below it the
output. They run in the order of the page, in one process and one empty folder.
"""

import contextlib
import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
MOST_LINES = 18  # of a command's output on a page
LONGEST_LINE = 132

# Commands of the pages that no test runs: pattern of the command, or of page and command -> reason.
NOT_RUN = {
    "make *": "installs, fetches or tests: .ci/run runs demo, lint, test, test-extras and docs",
    "*/pip install *": "changes an environment; .ci/run installs every extra that it needs",
    "llamajax chat*": "fetches 98 MB at its first use; tests/test_chat_terminal.py talks at a terminal",
    "*any-*.gguf*": "needs a model that is not in the box, of 100 MB or more",
    "*-Q4_K_M.gguf*": "needs a model that is not in the box, of 100 MB or more",
    "*Instruct*.gguf*": "needs a model that is not in the box, of 100 MB or more",
    "*=model.gguf*": "needs a model that is not in the box, of 100 MB or more",
    "*=path/to/*": "needs a model that is not in the box, or an environment with other packages",
    "*=Qwen*": "needs a model that is not in the box, of gigabytes",
    "*=OLMo*": "needs a model that is not in the box, of gigabytes",
    "llamajax train *": "trains for 95 minutes; tests/test_train.py trains in seconds",
    "llamajax bench *": "measures for minutes; tests/test_bench.py runs it on a tiny shape",
    "*box-cpu.bundle*": "compiles a second set of programs; tests/test_export_programs.py runs that profile",
    "docs/bundles.md: *": "an overview: pages of runtimes run these commands, tests/test_export_chat.py those of chat",
    "docs/runtimes/runners.md: *": "an overview of flags; tests/test_export_runners.py gives them to every runner",
    "docs/runtimes/openvino.md: *": "needs openvino beside onnx; benchmarks/export_runtimes.sh runs it",
    "docs/runtimes/web.md: *": "needs Node and Chromium; benchmarks/export_web.mjs is what it runs",
    "docs/runtimes/tensorflow.md: *": "needs tensorflow-cpu, 1 GB, in an environment of its own",
    "docs/runtimes/litert.md: *": "needs tensorflow-cpu and ai-edge-litert in an environment of their own",
    "docs/runtimes/coreml.md: *": "needs coremltools, and macOS to run what it makes",
    "docs/runtimes/pjrt.md: *": "compiles for minutes, and needs libtpu; tests/test_export_runtimes.py does it",
    "*benchmarks/*": "measures for minutes to hours",
}


class Command(NamedTuple):
    """A command of a page."""

    page: str
    line: int  # in the page, from 1
    text: str
    shown: str  # the output on the page; "" where the page shows none


def pages() -> list[Path]:
    """Returns README and all pages of docs, sorted."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def text_of(page: Path) -> str:
    """Returns a page with the files that it includes."""
    include = lambda match: (ROOT / match[1]).read_text(encoding="utf-8")  # noqa: E731
    return re.sub(r'^--8<-- "([^"]+)"$', include, page.read_text(encoding="utf-8"), flags=re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, int, str]]:
    """Yields language, first line and text of each fenced block; blocks in lists lose their indent."""
    text = text_of(page)
    for match in re.finditer(r"^( *)```(\w*)[^\n`]*\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        indent, language, body = match.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines(keepends=True)]
        yield language, text.count("\n", 0, match.start(3)) + 1, "".join(lines)


def python_of(page: Path) -> list[tuple[int, str]]:
    """Returns first line and text of each block of Python."""
    return [(line, text) for language, line, text in blocks(page) if language == "python"]


def commands_of(page: Path) -> list[Command]:
    """Returns a page's commands in order: those of `console` blocks, and command lines in blocks of other kinds."""
    name, found = page.relative_to(ROOT).as_posix(), []
    for language, first, text in blocks(page):
        if language == "console":
            parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
            at = first + parts[0].count("\n")
            for part in parts[1:]:
                command, shown = re.match(r"((?:[^\n]*\\\n)*[^\n]*)\n?(.*)", part, re.DOTALL).groups()
                found.append(Command(name, at, command, shown))
                at += part.count("\n")
        elif language in ("", "bash", "sh"):
            for number, line in enumerate(text.splitlines(), start=first):
                line = re.sub(r"\s+# .*", "", line)
                if re.match(r"(\S*bin/)?(llamajax|make|python|pip|node) |echo .*\| llamajax |LLAMAJAX_SHARED=", line):
                    found.append(Command(name, number, line, ""))
    return found


def why_not_run(command: Command, patterns: Mapping[str, str] = NOT_RUN) -> str | None:
    """Returns the reason of the first pattern that a command matches, or None."""
    texts = command.text, f"{command.page}: {command.text}"
    matches = lambda pattern: any(fnmatch.fnmatchcase(text, pattern) for text in texts)  # noqa: E731
    return next((why for pattern, why in patterns.items() if matches(pattern)), None)


def normalized(text: str) -> list[str]:
    """Returns lines without what differs from run to run: numbers, units, table frames, white space."""
    lines = []
    for line in text.splitlines():
        line = re.sub(r"[─━│┃┏┓┗┛┡┩┠┨┯┷┼╇┌┐└┘├┤┬┴┳┻╈╉╊╋]+", " ", line)
        line = re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", line)
        line = re.sub(r"# ?([KMG]i?B|bytes|m?s)\b", "# unit", line)
        lines.append(" ".join(line.split()))
    # The number of compiled programs depends on what earlier runs kept.
    return [line for line in lines if line and not line.startswith("compile #")]


def prints(shown: str, printed: str) -> str | None:
    """Returns the first line that a page shows but the command did not print, in order; None if all were printed.

    "…" at the end of a line stands for the rest of the line; alone it stands for any number of lines.
    """
    lines = iter(normalized(printed))
    for line in normalized(shown):
        start, more, _ = line.partition("…")
        if line == "…":
            continue
        if not any(each.startswith(start) if more else each == line for each in lines):
            return line
    return None


def run(work: Sequence[tuple[Path, Sequence[str]]], report: Path) -> list[list[tuple[int, str]]]:
    """Runs the commands of each folder in order, all in one new process.

    Args:
        work: folders, and the commands to run in each.
        report: file that the process writes its results to.

    Returns:
        For each folder, the exit code and the output of every command, standard output first.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "PYTHONIOENCODING": "utf-8", "TERM": "dumb"}
    given = json.dumps([[str(folder), list(commands)] for folder, commands in work])
    command = [sys.executable, "-m", "tests.pages", "--run", str(report)]
    subprocess.run(command, cwd=ROOT, env=environment, input=given, encoding="utf-8", check=True)
    return [[(code, text) for code, text in results] for results in json.loads(report.read_text(encoding="utf-8"))]


def _run_here(report: Path) -> None:
    """Does the work of `run` in the new process: llamajax commands are function calls here, so JAX is imported once."""
    results = []
    for folder, commands in json.load(sys.stdin):
        os.chdir(folder)
        results.append([_run_one(command) for command in commands])
    report.write_text(json.dumps(results), encoding="utf-8")


def _run_one(command: str) -> tuple[int, str]:
    command = re.sub(r"(?m)^(\w*=\S* )?\.venv/bin/", "", command)
    words = shlex.split(command.replace("\\\n", " "))
    if words[0] != "llamajax" or set("|<>;") & set(words):  # another program, or syntax that only a shell reads
        names = f'shopt -s expand_aliases; alias llamajax="{sys.executable} -m llamajax" python={sys.executable}'
        done = subprocess.run(["bash", "-c", f"{names}\n{command}"], capture_output=True, encoding="utf-8", check=False)
        return done.returncode, _joined(done.stdout, done.stderr)
    from llamajax.cli import main

    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        with _descriptors(out.fileno(), err.fileno()):
            code = main(words[1:])
            sys.stdout.flush()
            sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return code, _joined(out.read(), err.read())


def _joined(out: str, err: str) -> str:
    """Joins texts as a terminal shows them; a text whose last line lacks a newline gets one."""
    return out + "\n" * (bool(out) and not out.endswith("\n") and not err.startswith("\n")) + err


@contextlib.contextmanager
def _descriptors(out: int, err: int) -> Iterator[None]:
    """Sends standard output and error to two files, also those of child processes."""
    kept = os.dup(1), os.dup(2)
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        yield
    finally:
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def _shown(text: str) -> str:
    lines = [line.rstrip() for line in text.splitlines()]
    lines = [line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 1]}…" for line in lines]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], "…"]
    return "".join(f"{line}\n" for line in lines)


def _write(pages: Sequence[Path]) -> None:
    """Runs the commands of pages, and writes their output below them."""
    commands = [[one for one in commands_of(page) if not why_not_run(one)] for page in pages]
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / str(number) for number in range(len(pages))]
        for each in folders:
            each.mkdir()
        work = [(each, [one.text for one in group]) for each, group in zip(folders, commands, strict=True)]
        results = run(work, Path(folder) / "report.json")
    for page, group, printed in zip(pages, commands, results, strict=True):
        _write_page(page, group, printed)


def _write_page(page: Path, commands: Sequence[Command], results: Sequence[tuple[int, str]]) -> None:
    text = page.read_text(encoding="utf-8")
    for command, (code, printed) in zip(commands, results, strict=True):
        if code:
            print(f"{command.page}:{command.line}: {command.text}: exit code {code}: {printed}", file=sys.stderr)
            continue
        shown = _shown(printed)
        text = text.replace(f"$ {command.text}\n{command.shown}", f"$ {command.text}\n{shown}", 1)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "--run":
        _run_here(Path(sys.argv[2]))
    else:
        _write([ROOT / name for name in sys.argv[1:]])
