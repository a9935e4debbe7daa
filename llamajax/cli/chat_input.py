"""Reads a user's messages at a terminal, with line editing and history; a message may have several lines.

Enter begins a new line after a backslash, and in a message that begins with three quotes until three quotes end it.
Alt-Enter always begins a new line. Pasted text may hold any number of lines.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.shortcuts import CompleteStyle

from llamajax import process
from llamajax.cli.terminal import keys_restored, write
from llamajax.errors import LlamaJaxError
from llamajax.files import new_file, parse_json, read_bytes

PROMPT = "> "
QUOTES = '"""'
# Limits of the history: longer messages are seldom typed again, and the oldest messages are dropped.
_LONGEST_REMEMBERED = 10_000
_MOST_REMEMBERED = 1000


class Typed:
    """Reads messages from a terminal, one at a time."""

    def __init__(self, completer: Completer, history: Path | None):
        """Sets up line editing; reads nothing yet.

        Args:
            completer: completions for the Tab key.
            history: file of messages from earlier conversations; None to begin without history and keep none.
        """
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=lambda width, *_: "." * (width - 1) + " ",
            key_bindings=_keys(),
            completer=completer,
            complete_style=CompleteStyle.READLINE_LIKE,
            history=InMemoryHistory() if history is None else FileOfLines(history),
            enable_suspend=os.name == "posix",
            output=_output(),
        )

    def read(self) -> str:
        """Reads the next message, exactly as typed.

        Raises:
            EOFError: at the end of input, which is Ctrl-D on an empty line.
            KeyboardInterrupt: for Ctrl-C, or a signal (`process.interrupted`).
        """
        with keys_restored(), process.lend_signals(self._leave):
            return self._session.prompt()

    def _leave(self) -> None:
        """Ends `read`, which may be just starting or just ending."""
        loop = self._session.app.loop
        if loop is None:
            raise KeyboardInterrupt
        loop.call_soon_threadsafe(self._exit)

    def _exit(self) -> None:
        if self._session.app.is_running and not self._session.app.is_done:
            self._session.app.exit(exception=KeyboardInterrupt())


class PlainlyTyped:
    """`Typed` for a terminal that cannot move its cursor: uses the system's own line editing."""

    def read(self) -> str:
        """Reads a message, as `Typed.read` does; Ctrl-C drops the line without an exception.

        Raises:
            EOFError: at the end of input.
        """
        lines = [self._line(PROMPT)]
        while _goes_on("\n".join(lines)):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._line(". "))
        return "\n".join(lines)

    def _line(self, prompt: str) -> str:
        write(prompt, end="")
        data = sys.stdin.buffer.readline()
        if not data:
            write("")
            raise EOFError
        return data.decode("utf-8", "surrogateescape").rstrip("\r\n")


def _goes_on(text: str) -> bool:
    """Whether the message that was typed so far goes on with another line."""
    return text.endswith("\\") or (text.lstrip().startswith(QUOTES) and text.count(QUOTES) == 1)


def message_of(typed: str) -> str:
    """Returns the message that was typed, without the three quotes around it.

    Raises:
        LlamaJaxError: for bytes that are not UTF-8.
    """
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise LlamaJaxError("the message was not sent: it contains bytes that are not UTF-8 text") from None
    text = typed.strip()
    if text.startswith(QUOTES):
        return text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text


def _output() -> Output | None:
    """Standard output without cursor position requests: the terminal's replies would mix with typed keys."""
    if os.name != "posix":
        return None
    from prompt_toolkit.output.vt100 import Vt100_Output

    output = Vt100_Output.from_pty(sys.stdout, term=os.environ.get("TERM"))
    output.enable_cpr = False
    return output


def _keys() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        before = buffer.document.text_before_cursor
        if not _goes_on(before):
            buffer.validate_and_handle()
            return
        if before.endswith("\\"):
            buffer.delete_before_cursor()
        buffer.insert_text("\n")

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


class FileOfLines(History):
    """A history in a file that only its user can read: one JSON string per line, the oldest first.

    If the file cannot be read or written, the conversation goes on without history.
    """

    def __init__(self, path: Path):
        """Stores the path; reads nothing yet."""
        super().__init__()
        self._path = path

    def load_history_strings(self) -> Iterable[str]:
        """Returns the messages in the file, the newest first; shortens a file that has grown too long."""
        found = []
        with contextlib.suppress(OSError, LlamaJaxError):
            lines = read_bytes(self._path).splitlines()
            for line in lines[-_MOST_REMEMBERED:]:
                with contextlib.suppress(LlamaJaxError, UnicodeDecodeError):
                    found.append(str(parse_json(line, str(self._path))))
            if len(lines) > 2 * _MOST_REMEMBERED:
                with new_file(self._path) as partial:
                    self._append(partial, found)
        return reversed(found)

    def store_string(self, string: str) -> None:
        """Appends a message to the file."""
        if len(string) <= _LONGEST_REMEMBERED:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._append(self._path, [string])

    @staticmethod
    def _append(path: Path, strings: list[str]) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(path, flags, 0o600), "ab") as file:
            file.write("".join(json.dumps(string) + "\n" for string in strings).encode())


class Words(Completer):
    """Completes the command name at the beginning of a message, and the command's argument."""

    def __init__(self, completers: dict[str, Completer | None]):
        """Takes command names, each with the completer of its argument."""
        self._completers = completers

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        """Yields completions, as prompt_toolkit requires."""
        name, space, rest = document.text_before_cursor.partition(" ")
        if not space:
            names = (each for each in self._completers if name and each.startswith(name))
            yield from (Completion(each, start_position=-len(name)) for each in names)
        elif completer := self._completers.get(name):
            yield from completer.get_completions(Document(rest, len(rest)), complete_event)
