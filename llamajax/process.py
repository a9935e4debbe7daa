"""The process of a command: its standard streams, Ctrl-C and SIGTERM, and libraries that cannot be imported.

    process.begin()                  # first of all: before the libraries are imported, which takes a second
    with process.interruptible():
        work()                       # a signal raises KeyboardInterrupt here, so that unfinished files are removed

Outside of `interruptible` there is nothing to remove, and a signal ends the process at once. So does a second signal,
half a second or more after the first, and a first one while the main thread is in native code that does not return.

    with process.interrupt_calls(stop):
        converse()                   # Ctrl-C calls `stop` and ends nothing; SIGTERM raises as before
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

_MESSAGES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
# The main thread handles a signal between two instructions of Python. Native code (XLA compiling, say) may take longer.
_PATIENCE_SECONDS = 1.0
# `timeout`, `make` and terminals may send one signal twice; a repeat within this time is not a second request.
_REPEAT_SECONDS = 0.5
# Address space in bytes; the libraries' threads need most of it. With less, the libraries end the process themselves.
_FEW_ADDRESSES = 1750 << 20
_AGAIN = b"\0"  # tells the watcher that the exception was lost

_begun = False
_taken: list[signal.Signals] = []
_to_watcher: int | None = None
_working = False
_instead: Callable[[], None] | None = None
_lent_to: Callable[[], None] | None = None
_received: int | None = None
_handled = False
_ending = threading.Lock()


def begin() -> None:
    """Prepares the process: streams, signals and error reports. Has an effect only once, in the main thread."""
    global _begun, _to_watcher
    if _begun or threading.current_thread() is not threading.main_thread():
        return
    _begun = True
    _open_missing_streams()
    sys.excepthook = _report_uncaught
    _taken[:] = [
        number for number in _MESSAGES if signal.getsignal(number) is not signal.SIG_IGN
    ]  # `nohup` and `&` ask to ignore signals
    if os.name != "posix" or not _taken:  # elsewhere the main thread alone takes signals
        _take()
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()
    _to_watcher = writing
    _take()

    def lost(unraisable: Any) -> None:
        """Reports an interrupt that was lost: Python drops exceptions in finalizers and garbage collector callbacks.

        JAX has such a callback. Other dropped exceptions are not reported to the user of a command.
        """
        if _received is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
            os.write(writing, _AGAIN)

    sys.unraisablehook = lost


def interrupted() -> tuple[str, int] | None:
    """Returns the name and exit code of a signal that arrived, for example ("interrupted", 130); None if none did."""
    return None if _received is None else (_MESSAGES[signal.Signals(_received)], 128 + _received)


def few_addresses() -> str | None:
    """Returns a warning if `ulimit -v` is so low that native libraries end the process with their own messages."""
    if resource is None or not hasattr(resource, "RLIMIT_AS"):
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY or limit >= _FEW_ADDRESSES:
        return None
    return f"ulimit -v is {limit >> 10} KiB: libraries may end this process: allow {_FEW_ADDRESSES >> 10} or more"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes signals raise KeyboardInterrupt in the main thread inside the block, if `begin` was called."""
    global _working
    _working = True
    try:
        yield
    finally:
        _working = False


@contextlib.contextmanager
def interrupt_calls(function: Callable[[], None] | None) -> Iterator[None]:
    """Makes each SIGINT call a function in the main thread inside the block; it raises and ends nothing.

    Args:
        function: called between two instructions of the running code; None within such a block restores the handling of
            SIGINT outside of it.
    """
    global _instead
    before, _instead = _instead, function
    try:
        yield
    finally:
        _instead = before


@contextlib.contextmanager
def lend_signals(end: Callable[[], None]) -> Iterator[None]:
    """Lets a library such as asyncio handle signals inside the block; afterwards this module handles them again.

    Args:
        end: called in the main thread if a signal comes that the library did not handle; it should make the block end
            soon. An exception instead would be raised anywhere within the library. A second such signal ends the
            process.

    Raises:
        KeyboardInterrupt: after the block, for that signal.
    """
    global _lent_to
    _lent_to = end
    try:
        yield
    finally:
        _lent_to = None
        if _begun:
            _take()
    if _received is not None:
        raise KeyboardInterrupt


def _take() -> None:
    """Directs signals to `_on_signal` and, if there is one, to the watcher."""
    for number in _taken:
        signal.signal(number, _on_signal)
    if _to_watcher is not None:
        signal.set_wakeup_fd(_to_watcher, warn_on_full_buffer=False)


def _open_missing_streams() -> None:
    """Replaces closed standard streams before other files get their numbers.

    Writing to the replacement of standard output fails, so that the user sees an error; that of standard error discards
    what is written.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Handles a signal, in the main thread."""
    global _handled, _received
    if number == signal.SIGINT and _instead is not None:
        _instead()
        return
    again, _received, _handled = _received is not None, _received or number, True
    if not _working or (again and _lent_to is not None):
        _end(number)
    if _lent_to is None:
        raise KeyboardInterrupt
    _lent_to()


def _watch(reading: int) -> None:
    """Receives each signal as it arrives, in a separate thread, whatever the main thread is doing."""
    global _received
    signal.pthread_sigmask(signal.SIG_BLOCK, _MESSAGES)  # so that the main thread, which may sleep, gets them
    main = threading.main_thread().ident or 0
    resent, first = 0, 0.0
    while True:
        number = os.read(reading, 1)[0]
        if number == _AGAIN[0]:
            time.sleep(0.01)  # until the callback that lost the exception has returned
            resent += 1
            signal.pthread_kill(main, _received or signal.SIGINT)
        elif number not in _MESSAGES or (number == signal.SIGINT and _instead is not None):
            continue
        elif resent:
            resent -= 1
        elif _received is not None and first:
            if time.monotonic() - first > _REPEAT_SECONDS:
                _end(number)
        else:
            _received, first = number, time.monotonic()
            for attempt in itertools.count():
                time.sleep(0.02)
                if _handled:
                    break
                if attempt == 5:  # a library's thread got the signal, and the main thread still waits in a system call
                    resent += 1
                    signal.pthread_kill(main, number)
                if time.monotonic() - first > _PATIENCE_SECONDS:
                    _end(number)


def _end(number: int) -> None:
    """Ends the process, from any thread, without waiting for other threads."""
    if not _ending.acquire(blocking=False):
        return
    for module, leave in (("llamajax.files", "remove_unfinished"), ("llamajax.cli.terminal", "restore_keys")):
        with contextlib.suppress(AttributeError):  # the module may not be imported completely
            getattr(sys.modules.get(module), leave)()
    with contextlib.suppress(OSError):
        cursor = "\x1b[?25h" if os.isatty(2) else ""  # shows the cursor, which a progress bar hides
        os.write(2, f"{cursor}llamajax: {_MESSAGES[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def _report_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints one line if a library cannot be imported because memory ran out, and a traceback for other errors.

    Native libraries report failed callbacks here, too; these are ignored, because the main thread gets the errors that
    matter.
    """
    if _working or threading.current_thread() is not threading.main_thread():
        return
    text = str(error)
    if not issubclass(kind, MemoryError) and not any(sign in text for sign in ("failed to map", "Cannot allocate")):
        sys.__excepthook__(kind, error, trace)
        return
    reason = text.splitlines()[0] if text else "no memory"
    with contextlib.suppress(OSError):
        os.write(2, f"llamajax: out of memory while the libraries are loaded ({reason}): allow more\n".encode())
