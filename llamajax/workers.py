"""Threads that work beside the main one, and do not keep it when it is interrupted."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of threads; the end of the block waits for their work, but not where an exception ends it.

    What is being worked on then goes on in its thread, to no use; what has not begun does not begin.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
