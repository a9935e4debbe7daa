"""What commands print: results to standard output, lines for people to standard error, tables, progress bars.

Text goes out as UTF-8, whatever the terminal's language. Names come from files and command lines: they are no markup,
and what would steer a terminal is escaped.
"""

import contextlib
import errno
import io
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from llamajax.errors import LlamaJaxError

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

# Tables of narrower terminals are this wide: the terminal breaks their lines, and nothing is left out.
_NARROWEST = 60
_PIPE_WIDTH = 160
# What an error that concerns it names as its file.
OUTPUT = "standard output"


class ReaderLeftError(Exception):
    """Nobody reads standard output any more, as behind `| head`: the command can stop, and nothing is wrong."""


def write(text: str, end: str = "\n") -> None:
    """Writes a result to standard output, at once. Bytes of a command line that are not UTF-8 go out as they came.

    Raises:
        ReaderLeftError: if the reader has left.
        OSError: if it cannot be written.
    """
    write_bytes((text + end).encode("utf-8", "surrogateescape"))


def write_bytes(data: bytes) -> None:
    """`write`, of text that is encoded already; it may end within a character."""
    try:
        if sys.stdout is None or sys.stdout.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        _put(sys.stdout, data)
    except BrokenPipeError:
        raise ReaderLeftError from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, OUTPUT) from None


def note(text: str) -> None:
    """Writes a line for people to standard error. Work does not end because nobody reads about it."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            _put(sys.stderr, (printable(text, keep="\n") + "\n").encode())


def tell(text: str, style: str = "") -> None:
    """A `note` in a style, as "dim", with lines broken between words where standard error is a terminal that can."""
    console = _error_console()
    if _moves(console):
        with contextlib.suppress(OSError, ValueError):
            console.print(Text(printable(text, keep="\n"), style=style))
    else:
        note(text)


def printable(text: str, keep: str = "") -> str:
    """Text with control characters escaped, but for those to keep."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def harmless(text: str) -> str:
    r"""Text in which what would steer a terminal is escaped: control characters but \n and \t, marks that turn lines.

    Other than `printable` it keeps what texts of all languages are made of, as spaces that do not break and
    joiners of emojis.
    """
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _is_harmless(character: str) -> bool:
    turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return character in "\n\t" or not (turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def drop_output() -> None:
    """Leads standard output nowhere: what could not be written would be tried again, and complained of, at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, in one line unless `indent` is given.

    Raises:
        LlamaJaxError: for a number that is not finite, which JSON does not have.
    """
    if found := next(_not_finite(value, ""), None):
        raise LlamaJaxError(f"{found}: expected a finite number: the model overflows: try --dtype=float32")
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)  # which UTF-8 does not have


def show(table: Table | str) -> None:
    """Prints a table: as wide as the terminal, or as it needs where standard output is a file or a pipe.

    What a column has no room for is broken, not cut.
    """
    for column in table.columns if isinstance(table, Table) else ():
        column.overflow = "fold"
    terminal = is_terminal(sys.stdout)
    page = io.StringIO()
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    console = Console(file=page, width=1 << 16, force_terminal=terminal, **plain)
    if terminal:
        console.width = max(Console().width, _NARROWEST)
    else:
        console.width = max(_PIPE_WIDTH, Measurement.get(console, console.options, table).maximum)
    if isinstance(table, Table) and table.title:
        # By itself: above its table it would be broken at the table's width, names and all.
        console.print(Text(str(table.title), style="table.title"), soft_wrap=not terminal)
        table.title = None
    console.print(table)
    write(page.getvalue(), end="")


def bold(text: str) -> str:
    """Text in bold where standard output is a terminal that can, and the user has not set NO_COLOR."""
    console = Console()
    plain = not is_terminal(sys.stdout) or console.is_dumb_terminal or console.no_color
    return text if plain else f"\x1b[1m{text}\x1b[0m"


def is_dumb() -> bool:
    """Whether the terminal cannot move its cursor, by TERM."""
    return Console().is_dumb_terminal


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr: call what it yields with (done, total). Silent where stderr is not a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        *(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
    )
    console = _error_console()
    with Progress(*columns, console=console, transient=True, disable=not _moves(console)) as bars:
        task = bars.add_task(printable(label), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextlib.contextmanager
def spinner(label: str) -> Iterator[None]:
    """A sign of life on stderr for work that does not say how far it is. Silent where stderr is not a terminal."""
    console = _error_console()
    with console.status(Text(printable(label))) if _moves(console) else contextlib.nullcontext():
        yield


_keys_before: list[Any] | None = None


@contextlib.contextmanager
def keys_restored() -> Iterator[None]:
    """Keys are as they were behind the block, and where the process ends within it."""
    global _keys_before
    if termios is not None and is_terminal(sys.stdin):
        _keys_before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        restore_keys()


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """Inside, a terminal does not show keys, in the middle of what is drawn; who reads standard input next gets them.

    Ctrl-C and Ctrl-Z do what they always do.
    """
    with keys_restored():
        if termios is not None and is_terminal(sys.stdin):
            unseen = termios.tcgetattr(sys.stdin)
            unseen[3] &= ~termios.ECHO
            termios.tcsetattr(sys.stdin, termios.TCSANOW, unseen)
        yield


def restore_keys() -> None:
    """Ends `keys_restored`; also for a process that is about to end within."""
    global _keys_before
    before, _keys_before = _keys_before, None
    if before is not None:
        with contextlib.suppress(OSError, ValueError, termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _put(stream: TextIO, data: bytes) -> None:
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # a stream of text alone, as in a notebook
        stream.write(data.decode(errors="replace"))
    else:
        buffer.write(data)
    stream.flush()


def _error_console() -> Console:
    if isinstance(sys.stderr, io.TextIOWrapper) and not sys.stderr.closed:
        sys.stderr.reconfigure(encoding="utf-8")  # bars are drawn with characters that ASCII does not have
    return Console(stderr=True)


def _moves(console: Console) -> bool:
    """Whether something can be drawn over what was drawn before."""
    return is_terminal(sys.stderr) and not console.is_dumb_terminal


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """Names and values of the numbers in a JSON value that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name or 'the result'} is {value}"
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _not_finite(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _not_finite(each, f"{name}[{i}]")
