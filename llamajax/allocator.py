"""What the C library keeps of memory that was freed, and how a process gets it back to the system: of glibc alone.

glibc puts blocks of up to 32 MiB next to each other (its threshold grows to the largest block that was freed), and what
is freed between others stays with the process: 120 MiB behind a load of 1.1B parameters in 4 bits, which were 590. A
larger block, or one beyond a threshold that is set, is a mapping of its own, and goes back when it is freed.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, as malloc.h names them
_APART = 1 << 20
_LARGEST = 32 << 20  # what glibc's own threshold grows to


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Within it, blocks from 1 MiB on are mappings of their own, in all threads; behind it, what is free is given back.

    Then the threshold is what glibc's own grows to, so that temporaries of programs are not mapped for each call.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _APART)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)  # as glibc sets it with its threshold
        library.malloc_trim(0)


def give_back() -> None:
    """Gives pages that are free to the system: behind what took much memory for a while, such as compiling."""
    if library := _glibc():
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    """The C library, if it is glibc."""
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return None
        library.mallopt.argtypes, library.malloc_trim.argtypes = [ctypes.c_int, ctypes.c_int], [ctypes.c_size_t]
        return library
    except (OSError, TypeError, AttributeError):
        return None
