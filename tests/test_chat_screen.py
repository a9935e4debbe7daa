"""Markdown at a terminal: in the end every line appears once, whatever its width, and no line controls the terminal."""

import io
import random
import re
import sys

import pytest

from llamajax.cli import chat_screen
from llamajax.cli.chat_screen import Screen, finished
from llamajax.cli.terminal import harmless

pyte = pytest.importorskip("pyte", reason="needs pyte, an emulated terminal: pip install -e '.[test]'")

TEXT = """# A heading

Roses are red,
violets are *blue*; a word with `code` and <b>HTML</b> & a [link](https://example.com).

1. the first
2. the second

   goes on here
10. the last
- another list

```python
def f(x):
    return "a string that is longer than a narrow terminal is wide" + x

f(1)
```

| name | value |
|------|------:|
| one  | 1     |
| two  | 2     |

> a quote, a snowman ☃, wide 漢字 and a family 👩‍👧
***
[ref]: https://example.org
![image](https://example.org/x.png)
"""


class Terminal(io.TextIOWrapper):
    """Standard output that claims to be a terminal, and a terminal that shows what is written to it."""

    def __init__(self, columns: int, lines: int, monkeypatch):
        super().__init__(io.BytesIO(), "utf-8")
        monkeypatch.setattr(sys, "stdout", self)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("LINES", str(lines))
        monkeypatch.setattr(chat_screen, "_REFRESH_SECONDS", 0)
        monkeypatch.setattr(chat_screen, "_DRAWING_SHARE", 1e9)
        self._size = (columns, lines)

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """Returns what was ever on the screen, from top to bottom, as a person sees it who scrolls up."""
        screen = pyte.HistoryScreen(*self._size, history=10_000, ratio=1)
        stream = pyte.ByteStream(screen)
        stream.feed(self.buffer.getvalue().replace(b"\n", b"\r\n"))  # type: ignore[attr-defined]
        gone = ["".join(line[x].data for x in range(screen.columns)) for line in screen.history.top]
        return [line.rstrip() for line in [*gone, *screen.display]]


def pieces(text: str, seed: int) -> list[str]:
    draw, made = random.Random(seed), []
    while text:
        size = draw.choice([1, 2, 5, 9, 30])
        made.append(text[:size])
        text = text[size:]
    return made


def shown(terminal: Terminal, made: list[str], **options: bool) -> list[str]:
    screen = Screen(**options)
    for piece in made:
        screen.show("content", piece)
    screen.finish()
    return terminal.lines()


@pytest.mark.parametrize(("columns", "lines"), [(80, 40), (80, 6), (40, 10), (24, 4)])
def test_what_streams_ends_as_what_came_at_once(columns: int, lines: int, monkeypatch) -> None:
    streamed = shown(Terminal(columns, lines, monkeypatch), pieces(TEXT, columns))
    monkeypatch.setenv("LINES", "200")
    at_once = shown(Terminal(columns, 200, monkeypatch), [TEXT])
    text = "\n".join(streamed).rstrip()
    # Lists whose end was not certain yet are two blocks, with an empty line between.
    assert [line for line in text.split("\n") if line] == [line for line in at_once if line]
    for word in ("A heading", "Roses are red,", "HTML", "the second", "the last", "f(1)", "value", "snowman", "ref"):
        assert text.count(word) == 1, word
    assert "example.com" in "".join(streamed) and "x.png" in "".join(streamed)


def test_what_markdown_becomes(monkeypatch) -> None:
    lines = shown(Terminal(60, 60, monkeypatch), pieces(TEXT, 1))
    for line in (
        *("A heading", "Roses are red,", '    return "a string that is longer than a narrow terminal', "```python"),
        *("violets are blue; a word with code and <b>HTML</b> & a link", "(https://example.com).", " 1 the first"),
    ):
        assert line in [each.rstrip() for each in lines], line


def test_plain_text_is_what_was_written(monkeypatch) -> None:
    for term, markdown in (("xterm", False), ("dumb", True)):
        terminal = Terminal(60, 6, monkeypatch)
        monkeypatch.setenv("TERM", term)
        shown(terminal, pieces(TEXT, 3), markdown=markdown)
        assert terminal.buffer.getvalue().decode() == TEXT  # type: ignore[attr-defined]


def test_thinking_is_dim_and_comes_before(monkeypatch) -> None:
    terminal = Terminal(60, 20, monkeypatch)
    screen = Screen()
    for kind, text in (("thinking", "2 + 2"), ("thinking", " is 4"), ("content", "**four**")):
        screen.show(kind, text)
    screen.finish()
    assert terminal.lines()[:3] == ["2 + 2 is 4", "", "four"]
    assert b"\x1b[2m2 + 2" in terminal.buffer.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("markdown", [True, False])
def test_the_model_does_not_steer_the_terminal(markdown: bool, monkeypatch) -> None:
    hostile = (
        "a\x1b[2Jb \x1b]0;title\x07 \x9b31m c\rd \u202egnirts [x](http://a/\x1b[5n) `\x1b[1m`\n\n```\x1bc\n\x1b[H\n"
    )
    terminal = Terminal(80, 20, monkeypatch)
    shown(terminal, pieces(hostile, 4), markdown=markdown)
    written = terminal.buffer.getvalue().decode()  # type: ignore[attr-defined]
    ours = r"\x1b\[(\d+A|K|J|[\d;]*m)"  # up, erase, styles
    assert not set(re.sub(ours, "", written)) & set("\x1b\x07\x9b\u202e")
    assert r"a\x1b[2Jb" in "\n".join(terminal.lines())


def test_text_of_other_languages_is_left_alone() -> None:
    text = "l’été\u00a0: 1\u202f000 €, 👩\u200d👧, שלום, x\u00ad"
    assert harmless(text) == text
    assert harmless("\u2066\x7f\udcff") == r"\u2066\x7f\udcff"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("a paragraph\n\n", ""),
        ("a paragraph\n\nanother", ""),
        ("a paragraph\n\nanother\n", "a paragraph\n\n"),
        ("not yet\n===\n", ""),
        ("- a list\n\n  goes on\n", ""),
        ("```\ncode\n\nmore\n", ""),
        ("```\ncode\n```\ntext\n", "```\ncode\n```\n"),
        ("a | b\n--|--\n1 | 2\n", ""),
    ],
)
def test_which_blocks_are_finished(text: str, expected: str) -> None:
    assert text[: finished(text)] == expected
