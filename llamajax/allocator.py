"""Returns memory that the C library keeps after it is freed to the system; for glibc only.

glibc puts blocks of up to 32 MiB next to each other (its threshold grows to the largest freed block), and memory freed
between others stays with the process: 120 MiB after a load of 1.1B parameters in 4 bits, whose weights take 590. A
larger block, or one above a threshold that is set, is a mapping of its own and is returned when it is freed.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt, as malloc.h names them
_APART = 1 << 20
_LARGEST = 32 << 20  # the limit to which glibc's own threshold grows


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Maps blocks of 1 MiB and more separately inside the block, in all threads; then returns free memory.

    Afterwards the threshold is glibc's own maximum, so that temporaries of programs are not mapped for each call.
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
    """Returns free pages to the system: for use after work that took much memory, such as compiling."""
    if library := _glibc():
        library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    """Returns the C library if it is glibc, else None."""
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return None
        library.mallopt.argtypes, library.malloc_trim.argtypes = [ctypes.c_int, ctypes.c_int], [ctypes.c_size_t]
        return library
    except (OSError, TypeError, AttributeError):
        return None
