"""Pools of threads that do not delay the main thread when it is interrupted."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor


@contextlib.contextmanager
def workers(count: int) -> Iterator[ThreadPoolExecutor]:
    """Makes a pool of threads. The end of the block waits for their work, unless an exception ends the block.

    In that case running work continues in its thread without effect, and pending work does not begin.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
