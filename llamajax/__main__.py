"""The command line: `llamajax COMMAND --flag=value …`, or `python -m llamajax`."""

import logging
import os
import sys
import threading
import warnings

from llamajax import process
from llamajax.cli import explained, main


def run() -> None:
    """Runs the command that the process was started with, and ends it."""
    process.begin()
    threading.excepthook = _report_thread
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what its threads raise, as its callers do
    # If an interrupt ends Orbax's work, Python and asyncio would warn during cleanup, after our own message.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    code = main()
    if code:
        os._exit(code)  # `sys.exit` would wait for threads that still read, write or compile
    sys.exit()


def _report_thread(args: threading.ExceptHookArgs) -> None:
    """Prints a traceback of a library's thread, unless the main thread gets the same error and prints one line."""
    if not (process.interrupted() or (args.exc_value and explained(args.exc_value))):
        threading.__excepthook__(args)


if __name__ == "__main__":
    run()
