"""The command line: `llamajax COMMAND --flag=value …`, or `python -m llamajax`."""

import sys

from llamajax.cli import main

if __name__ == "__main__":
    sys.exit(main())
