"""Reads text from standard input."""

import sys

from llamajax.errors import LlamaJaxError
from llamajax.files import LARGEST_TEXT


def read_standard_input(remedy: str) -> str:
    """Returns all of standard input; an empty text if it is closed.

    Args:
        remedy: the remedy that the error message names for a text that is too long.

    Raises:
        LlamaJaxError: for more than `LARGEST_TEXT` bytes, or bytes that are not UTF-8.
    """
    data = sys.stdin.buffer.read(LARGEST_TEXT + 1) if sys.stdin is not None and not sys.stdin.closed else b""
    if len(data) > LARGEST_TEXT:
        raise LlamaJaxError(f"standard input has more than {LARGEST_TEXT} bytes: {remedy}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise LlamaJaxError(f"standard input: {error.reason} at byte {error.start}: expected UTF-8 text") from None
