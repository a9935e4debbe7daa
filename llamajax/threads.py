"""Gets and sets the number of threads that XLA computes with on a CPU.

XLA makes its pool of threads when the backend starts, and divides compiled work for that number. JAX has no setting for
it: XLA reads PJRT_NPROC, else NPROC, from the environment (`DefaultThreadPoolSize` in xla/pjrt/utils.cc), else it takes
the number of processors that the process may use.
"""

import os

from jax._src import xla_bridge  # JAX's public functions do not tell whether a backend has started

from llamajax.errors import LlamaJaxError

_VARIABLES = ("PJRT_NPROC", "NPROC")  # the first one that holds a number is used


def processors() -> int:
    """The processors that this process may use, if the system reports them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count() -> int:
    """The number of threads that XLA computes with on a CPU, by the current environment."""
    for name in _VARIABLES:
        try:
            return max(1, int(os.environ.get(name, "")))
        except ValueError:
            continue
    return processors()


def use_threads(count: int) -> None:
    """Sets the number of XLA's threads in this process and its child processes.

    Reading files, compiling and other libraries use threads of their own.

    Args:
        count: from 1 to `processors()`; more threads would only wait for each other.

    Raises:
        LlamaJaxError: for a number out of range, or if a backend has started with another number.
    """
    if not 1 <= count <= processors():
        raise LlamaJaxError(
            f"threads is {count}: expected 1 to {processors()}, the processors that this process may use"
        )
    if xla_bridge.backends_are_initialized() and count != thread_count():
        raise LlamaJaxError(
            f"threads is {count}, but JAX already computes with {thread_count()} in this process: set it before "
            "anything runs, or in a new process"
        )
    os.environ[_VARIABLES[0]] = str(count)
