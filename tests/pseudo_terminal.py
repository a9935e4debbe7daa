"""A program in a pseudo-terminal, and what a person who scrolls up would see of it."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping, Sequence

import pyte

# A limit, not a measure of speed: a slow machine with other work may take ten times as long as an idle one.
_PATIENCE_SECONDS = 600
# Does what a shell does before it runs a program in the foreground: gives it the terminal's keys, and does not ignore
# SIGINT.
_IN_FRONT = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class PseudoTerminal:
    """A running program, its keyboard and its screen."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str], columns: int = 80, lines: int = 24):
        """Starts the program in the foreground of a terminal of some size."""
        self._screen = pyte.HistoryScreen(columns, lines, history=10_000, ratio=1)
        self._stream = pyte.ByteStream(self._screen)
        self.written = b""
        self._terminal, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-IS", "-c", _IN_FRONT, *argv],
            **dict.fromkeys(("stdin", "stdout", "stderr"), end),
            env=dict(environment),
            start_new_session=True,
        )
        os.close(end)

    def text(self) -> str:
        """Returns all lines that were ever shown, without trailing spaces."""
        gone = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*gone, *self._screen.display]).rstrip()

    def shows(self, text: str) -> bool:
        """Returns whether a text was ever shown; ignores white space, since the terminal breaks lines anywhere."""
        return "".join(text.split()) in "".join(self.text().split())

    def type(self, keys: str) -> None:
        """Presses keys."""
        os.write(self._terminal, keys.encode("utf-8", "surrogateescape"))

    def wait_for(self, condition: Callable[[str], bool], what: str) -> str:
        """Waits until the text satisfies a condition; returns the text."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not condition(self.text()):
            assert time.monotonic() < deadline and self._read(0.5), f"no {what} in:\n{self.text()}"
        return self.text()

    def end(self) -> int:
        """Waits until the program has ended; returns its exit code."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._read(0.5):
            assert time.monotonic() < deadline, f"still runs after:\n{self.text()}"
        return self.process.wait(_PATIENCE_SECONDS)

    def shows_keys(self) -> bool:
        """Returns whether the terminal echoes what is typed, as it does for a shell."""
        return bool(termios.tcgetattr(self._terminal)[3] & termios.ECHO)

    def _read(self, seconds: float) -> bool:
        """Reads what the program writes within some time; returns False when it has ended."""
        if not select.select([self._terminal], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._terminal, 1 << 16)
        except OSError:  # Linux reports the end so
            data = b""
        self.written += data
        self._stream.feed(data)
        return bool(data)

    def close(self) -> None:
        """Ends the program in any case."""
        self.process.kill()
        self.process.wait()
        os.close(self._terminal)
