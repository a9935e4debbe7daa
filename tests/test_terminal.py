"""What commands print: names unchanged, JSON without NaN, and output to streams that are closed."""

import io
import json
import sys

import pytest
from rich.table import Table

from llamajax import LlamaJaxError
from llamajax.cli import terminal
from llamajax.cli.terminal import as_json, note, printable, progress, show, spinner, write

# Markup, an emoji's name and a link, which rich would remove or shorten.
NAMES = ["a[/2024]b", "[bold]x", "box[red]", ":smile:", "a  b", "[link=https://example.com]n[/link]"]


class Terminal(io.TextIOWrapper):
    """A stream that says that it is a terminal."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), "ascii")

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_as_they_are(name: str, capsys, monkeypatch) -> None:
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    table.caption = name
    show(table)
    show(name)
    assert capsys.readouterr().out.count(name) == 5
    note(f"{name}: done")
    assert capsys.readouterr().err == f"{name}: done\n"
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    with progress(name) as on_step:
        on_step(1, 2)
    with spinner(name):
        pass
    assert stream.buffer.getvalue().decode().count(name) >= 2  # type: ignore[attr-defined]


def test_control_characters_do_not_steer_the_terminal(capsys) -> None:
    assert printable("a\x1b[2Jb\nc\udcff") == r"a\x1b[2Jb\nc\udcff"
    note("a\x1b[2Jb\nc")
    assert capsys.readouterr().err == "a\\x1b[2Jb\nc\n"


def test_json_has_no_nan() -> None:
    value = {"tokens": [1], "log_probabilities": [-0.5, float("nan")], "more": float("inf")}
    with pytest.raises(LlamaJaxError, match=r"log_probabilities\[1\] is nan: expected a finite number: .*float32"):
        as_json(value)
    with pytest.raises(LlamaJaxError, match="the result is -inf"):
        as_json(float("-inf"))
    text = as_json({"prompt": "café \udcff"})  # bytes of a command line that are not UTF-8
    assert "café" in text and json.loads(text.encode()) == {"prompt": "café \udcff"}


def test_text_goes_out_as_utf8(monkeypatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    write("café \udcff", end="")
    assert stream.buffer.getvalue() == b"caf\xc3\xa9 \xff"  # type: ignore[attr-defined]


def test_a_stream_that_is_not_there(monkeypatch) -> None:
    for missing in (None, io.StringIO()):
        if missing is not None:
            missing.close()
        monkeypatch.setattr(sys, "stdout", missing)
        monkeypatch.setattr(sys, "stderr", missing)
        with pytest.raises(OSError, match="standard output"):
            write("text")
        note("text")
        with progress("work") as on_step:
            on_step(1, 1)


def test_narrow_and_wide_tables_lose_nothing(capsys, monkeypatch) -> None:
    table = Table()
    table.add_column("name")
    table.add_column("more")
    table.add_row("n" * 300, "m" * 30)
    show(table)
    assert "n" * 300 in capsys.readouterr().out, "a table in a pipe is as wide as its content"
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "1")
    show(table)
    out = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert out.count("n") == 301 and out.count("m") >= 30 and "…" not in out
    assert len(out.splitlines()[0]) == terminal._NARROWEST
