"""The command line: `llamajax COMMAND --flag=value …`, or `python -m llamajax`."""

import os
import sys

from llamajax import process
from llamajax.cli import main


def run() -> None:
    """Runs the command that the process was started with, and ends it."""
    process.begin()
    code = main()
    if process.interrupted():
        os._exit(code)  # threads that still read or compile would be waited for
    sys.exit(code)


if __name__ == "__main__":
    run()
