"""Shows an answer at a terminal while it streams: content as Markdown, thinking dim.

A finished block of Markdown (a paragraph, a list, code, a table) is printed once and scrolls like any text. The block
that is still growing is redrawn in place, up to ten times a second, and at most its last screenful is shown. The
model's text cannot control the terminal: control characters are escaped first.
"""

import io
import sys
import time

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.syntax import Syntax
from rich.text import Text

from llamajax.cli.terminal import harmless, write

_REFRESH_SECONDS = 0.1
# Drawing takes at most this share of the time, because it takes a thread from the model. The wait between two drawings
# is nevertheless at most _LONGEST_WAIT seconds.
_DRAWING_SHARE = 0.1
_LONGEST_WAIT = 1.0
_NARROWEST = 20


class Screen:
    """Writes one answer to standard output, which is a terminal.

    Attributes:
        console: the rich console of standard output.
    """

    def __init__(self, markdown: bool = True):
        """Sets up the console; writes nothing yet.

        Args:
            markdown: whether to show the text as Markdown, if the terminal can redraw text in place.
        """
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # table borders are not ASCII
        self.console = Console(markup=False, emoji=False, highlight=False)
        moves = not self.console.is_dumb_terminal and not self.console.legacy_windows
        self._markdown = markdown and moves and self.console.is_terminal
        self._text = ""  # the part of the content that is not yet printed for good
        self._kind: str | None = None
        self._tail = _Tail(self.console)
        self._next = 0.0
        self._ends_line = True

    def show(self, kind: str, text: str) -> None:
        """Adds a piece of the answer's "content" or "thinking"."""
        text = harmless(text)
        if kind != self._kind and self._kind is not None:
            self._finish_part()
            write("")
        self._kind = kind
        if self._markdown and kind == "content":
            self._text += text
            self._draw()
        elif text:
            self._ends_line = text.endswith("\n")
            self._write_plain(text, "dim" if kind == "thinking" else "")

    def finish(self) -> None:
        """Prints the remaining text and ends the line."""
        if self._kind is not None:
            self._finish_part()

    def _finish_part(self) -> None:
        if self._markdown and self._kind == "content":
            self._print(self._text)
            self._text = ""
        elif not self._ends_line:
            write("")
        self._ends_line = True

    def _write_plain(self, text: str, style: str) -> None:
        with self.console.capture() as capture:  # soft_wrap: the terminal itself breaks lines
            self.console.print(Text(text, style=style), end="", soft_wrap=True)
        write(capture.get(), end="")

    def _draw(self) -> None:
        """Prints finished blocks and redraws the growing block, unless the last drawing is too recent."""
        if time.monotonic() < self._next:
            return
        begun = time.thread_time()
        if done := finished(self._text):
            self._print(self._text[:done])
            self._text = self._text[done:]
        self._tail.draw(self._rendered(self._text))
        wanted = (time.thread_time() - begun) / _DRAWING_SHARE
        self._next = time.monotonic() + min(max(_REFRESH_SECONDS, wanted), _LONGEST_WAIT)

    def _print(self, text: str) -> None:
        """Prints blocks for good, replacing the tail."""
        self._tail.end(self._rendered(text))

    def _rendered(self, text: str) -> list[str]:
        """The text rendered as lines, with escape codes for styles."""
        # The last column stays free: terminals differ in how they wrap there, and in the width of some characters.
        width = max(self.console.width - 1, _NARROWEST)
        with self.console.capture() as capture:
            self.console.print(_Markdown(text), width=width)
        return capture.get().strip("\n").split("\n") if text.strip() else []


class _Tail:
    """The last lines on the screen, which can be redrawn. The cursor is at the end of the last line."""

    def __init__(self, console: Console):
        self._console = console
        self._lines: list[str] = []
        self._width = 0
        self._blocks = 0  # number of blocks printed for good

    def draw(self, lines: list[str]) -> None:
        """Replaces the lines drawn before; if the screen is too small for all lines, draws the last ones."""
        self._replace(self._spaced(lines)[-max(self._console.height - 1, 1) :])

    def end(self, lines: list[str]) -> None:
        """Draws all lines for good and moves the cursor to the next line."""
        if not lines:
            return
        self._replace(self._spaced(lines))
        write("")
        self._lines, self._blocks = [], self._blocks + 1

    def _spaced(self, lines: list[str]) -> list[str]:
        return ["", *lines] if lines and self._blocks else lines

    def _replace(self, lines: list[str]) -> None:
        """Rewrites the lines from the first that differs, in one write, so that nothing flickers."""
        before, width = self._lines, self._console.width
        if before and width != self._width:  # the terminal rewrapped its lines: their position is unknown
            write("")
            before = []
        self._lines, self._width = lines, width
        same = 0
        while same < min(len(before), len(lines)) and before[same] == lines[same]:
            same += 1
        if same == len(before) == len(lines):
            return
        same = min(same, max(len(before) - 1, 0), max(len(lines) - 1, 0))
        up = len(before) - 1 - same
        begin = ("\r" + (f"\x1b[{up}A" if up > 0 else "")) if before else ""
        write(begin + "\x1b[K\n".join(lines[same:]) + "\x1b[K\x1b[J", end="")


# ---- Markdown --------------------------------------------------------------------------------------------------------

# HTML, link definitions and images are shown as text; rich would leave them out.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable(["reference", "image"])


def finished(text: str) -> int:
    """Number of leading characters of a growing text that form finished Markdown blocks."""
    complete = text[: text.rfind("\n") + 1]
    begins = [
        token.map[0] for token in _PARSER.parse(complete) if token.level == 0 and token.map and token.nesting >= 0
    ]
    if len(begins) < 2:
        return 0
    return sum(len(line) for line in complete.splitlines(keepends=True)[: begins[-1]])


class _LeftHeading(Heading):
    """A left-aligned heading; rich centers the first level."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _Code(CodeBlock):
    """Code between dim fences, neither indented nor padded, so that it can be copied from the terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip("\n")
        name = "" if self.lexer_name == "text" else self.lexer_name
        yield Text(f"```{name}", style="dim")
        if code:
            yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, background_color="default")
        yield Text("```", style="dim")


class _Markdown(Markdown):
    """Markdown that a model wrote: its line breaks are kept, and links show their targets."""

    elements = {**Markdown.elements, "heading_open": _LeftHeading, "fence": _Code, "code_block": _Code}

    def __init__(self, text: str):
        super().__init__("", hyperlinks=False, code_theme="ansi_dark")
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                _keep_line(child)


def _keep_line(token: Token) -> None:
    """Turns a line break within a paragraph into a hard break."""
    if token.type == "softbreak":
        token.type = "hardbreak"
