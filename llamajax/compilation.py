"""Compiling ahead of time, so that compilation is counted and timed apart from running."""

import time
from collections.abc import Callable
from typing import Any

import jax

from quant import compiler_options


class CompiledFunction:
    """`jax.jit` that compiles explicitly, once for each combination of shapes, dtypes and shardings.

    Attributes:
        compilations: how many programs were compiled so far.
        compile_seconds: how long that took, tracing included.
    """

    def __init__(self, function: Callable[..., Any], donate_argnames: tuple[str, ...] = ()):
        """Wraps a pure function of pytrees; arguments named in `donate_argnames` give their memory to the results."""
        self.compilations = 0
        self.compile_seconds = 0.0
        self._jitted = jax.jit(function, donate_argnames=donate_argnames)
        self._programs: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        """Runs the function, compiling it first if these shapes are new."""
        leaves, structure = jax.tree.flatten(args)
        key = structure, tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        program = self._programs.get(key)
        if program is None:
            start = time.perf_counter()
            program = self._programs[key] = self._jitted.lower(*args).compile(compiler_options(jax.default_backend()))
            self.compile_seconds += time.perf_counter() - start
            self.compilations += 1
        return program(*args)
