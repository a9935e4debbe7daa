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
    # What Orbax had begun and an interrupt ended: Python and asyncio say so while they clean up, behind our line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    code = main()
    if code:
        os._exit(code)  # threads that still read, write or compile would be waited for
    sys.exit()


def _report_thread(args: threading.ExceptHookArgs) -> None:
    """A traceback of a library's thread, but for what the main thread, which gets it too, says in one line."""
    if not (process.interrupted() or (args.exc_value and explained(args.exc_value))):
        threading.__excepthook__(args)


if __name__ == "__main__":
    run()
