"""Output of commands: results on standard output; messages and progress bars on standard error.

Text is written as UTF-8, whatever the terminal's locale. Names from files and command lines are not read as markup,
and their control characters are escaped.
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

# Least width of a table: a narrower terminal breaks its lines, and nothing is left out.
_NARROWEST = 60
_PIPE_WIDTH = 160
# The file name in errors about standard output.
OUTPUT = "standard output"


class ReaderLeftError(Exception):
    """The reader of standard output has gone, as with `| head`: the command stops, which is no failure."""


def write(text: str, end: str = "\n") -> None:
    """Writes a result to standard output and flushes it. Bytes of a command line that are not UTF-8 stay as they are.

    Raises:
        ReaderLeftError: if the reader of standard output has gone.
        OSError: if standard output cannot be written.
    """
    write_bytes((text + end).encode("utf-8", "surrogateescape"))


def write_bytes(data: bytes) -> None:
    """Writes encoded text, as `write` does; the text may end within a character."""
    try:
        if sys.stdout is None or sys.stdout.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        _put(sys.stdout, data)
    except BrokenPipeError:
        raise ReaderLeftError from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, OUTPUT) from None


def note(text: str) -> None:
    """Writes a message to standard error. A failure to write it is ignored, so that the work goes on."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr is not None:
            _put(sys.stderr, (printable(text, keep="\n") + "\n").encode())


def tell(text: str, style: str = "") -> None:
    """Writes a `note` in a style such as "dim", broken between words, if standard error is a capable terminal."""
    console = _error_console()
    if _moves(console):
        with contextlib.suppress(OSError, ValueError):
            console.print(Text(printable(text, keep="\n"), style=style))
    else:
        note(text)


def printable(text: str, keep: str = "") -> str:
    """Text with characters that are not printable escaped, except those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def harmless(text: str) -> str:
    r"""Text with characters that control a terminal escaped: controls except \n and \t, and marks of direction.

    Unlike `printable` it keeps the other characters of all languages, such as no-break spaces and joiners of emojis.
    """
    return "".join(c if _is_harmless(c) else c.encode("unicode_escape").decode() for c in text)


def _is_harmless(character: str) -> bool:
    turns = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return character in "\n\t" or not (turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"))


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a standard stream is a terminal."""
    return stream is not None and not stream.closed and stream.isatty()


def drop_output() -> None:
    """Redirects standard output to the null device: otherwise Python would try the failed write again at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_json(value: Any, indent: int | None = None) -> str:
    """Returns a value as JSON, in one line unless `indent` is given.

    Raises:
        LlamaJaxError: for a number that is not finite, which JSON does not have.
    """
    if found := next(_not_finite(value, ""), None):
        raise LlamaJaxError(f"{found}: expected a finite number: the model overflows: try --dtype=float32")
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)  # UTF-8 has no surrogates


def show(table: Table | str) -> None:
    """Prints a table: as wide as the terminal, or as wide as it needs if standard output is a file or a pipe.

    Text that is too wide for its column is broken into lines, not cut.
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
        # Printed separately: as part of the table it would be broken at the table's width, even within names.
        console.print(Text(str(table.title), style="table.title"), soft_wrap=not terminal)
        table.title = None
    console.print(table)
    write(page.getvalue(), end="")


def bold(text: str) -> str:
    """Text in bold, if standard output is a terminal that has bold and NO_COLOR is not set."""
    console = Console()
    plain = not is_terminal(sys.stdout) or console.is_dumb_terminal or console.no_color
    return text if plain else f"\x1b[1m{text}\x1b[0m"


def is_dumb() -> bool:
    """Whether the terminal cannot move its cursor, according to TERM."""
    return Console().is_dumb_terminal


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on stderr; yields a function to call with (done, total). Silent without a terminal."""
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
    """Shows a spinner on stderr during work that does not report its progress. Silent without a terminal."""
    console = _error_console()
    with console.status(Text(printable(label))) if _moves(console) else contextlib.nullcontext():
        yield


_keys_before: list[Any] | None = None


@contextlib.contextmanager
def keys_restored() -> Iterator[None]:
    """Restores the terminal's key settings after the block, also if the process ends within it."""
    global _keys_before
    if termios is not None and is_terminal(sys.stdin):
        _keys_before = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        restore_keys()


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """Turns off the echo of keys inside the block, so that they do not mix with output; they stay in standard input.

    Ctrl-C and Ctrl-Z work as usual.
    """
    with keys_restored():
        if termios is not None and is_terminal(sys.stdin):
            unseen = termios.tcgetattr(sys.stdin)
            unseen[3] &= ~termios.ECHO
            termios.tcsetattr(sys.stdin, termios.TCSANOW, unseen)
        yield


def restore_keys() -> None:
    """Restores the key settings that `keys_restored` saved; also called when the process is about to end."""
    global _keys_before
    before, _keys_before = _keys_before, None
    if before is not None:
        with contextlib.suppress(OSError, ValueError, termios.error):
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _put(stream: TextIO, data: bytes) -> None:
    buffer = getattr(stream, "buffer", None)
    if buffer is None:  # a text stream without bytes, as in a notebook
        stream.write(data.decode(errors="replace"))
    else:
        buffer.write(data)
    stream.flush()


def _error_console() -> Console:
    if isinstance(sys.stderr, io.TextIOWrapper) and not sys.stderr.closed:
        sys.stderr.reconfigure(encoding="utf-8")  # bars are not ASCII
    return Console(stderr=True)


def _moves(console: Console) -> bool:
    """Whether standard error is a terminal that can redraw text in place."""
    return is_terminal(sys.stderr) and not console.is_dumb_terminal


def _not_finite(value: Any, name: str) -> Iterator[str]:
    """Yields the name and value of each number in a JSON value that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{name or 'the result'} is {value}"
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _not_finite(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from _not_finite(each, f"{name}[{i}]")
