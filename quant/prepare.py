"""From the format at rest to the layout that a backend multiplies with, once, when a model is loaded."""

import dataclasses
import math
import os
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from quant.kernels import cpu
from quant.mixed import Mixed
from quant.qtensor import QTensor

# Those with a layout of their own.
BACKENDS = ("cpu", "gpu", "tpu")
_ALIGNMENT = 64  # bytes
_MOST_THREADS = 8


def prepare(weight: Any, backend: str, *, donate: bool = False) -> Any:
    """Lays a weight out for `quant.product` on a backend.

    Args:
        weight: QTensor [..., K, M] or [..., M, K]; or a `Mixed` of such.
        backend: as `jax.default_backend` names it.
        donate: whether the weight's memory may be freed as soon as it has been laid out: the weight is unusable then.
            Otherwise there are two of it.

    Returns:
        The weight in its layout; or itself, where it is an array, or the backend has no layout for it (`refusal`).
    """
    if isinstance(weight, Mixed):
        stacks = tuple(prepare(stack, backend, donate=donate) for stack in weight.stacks)
        return dataclasses.replace(weight, stacks=stacks)
    if not isinstance(weight, QTensor) or refusal(weight, backend):
        return weight
    arrays = jax.tree.leaves(weight)
    if backend == "cpu" and all(isinstance(array, jax.Array) and _is_on_a_cpu(array) for array in arrays):
        views = cpu.layout(jax.tree.map(np.asarray, weight), np)
        laid_out = jax.device_put(jax.tree.map(aligned_copy, views), arrays[0].sharding)
    else:
        laid_out = jax.block_until_ready(jax.jit(_lowering(backend).layout)(weight))
    if donate:
        # What the layout has as it was, jax returns as the same array.
        kept = {id(array) for array in jax.tree.leaves(laid_out)}
        for array in arrays:
            if id(array) not in kept and isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
                array.delete()
    return laid_out


def refusal(weight: QTensor, backend: str) -> str | None:
    """Why a weight is multiplied by the reference on a backend, or None if there is a layout for it."""
    if backend not in BACKENDS:
        return f"backend {backend!r} has no layout of its own"
    sharding = getattr(weight.planes[0], "sharding", None)
    if sharding is not None and len(sharding.device_set) > 1:
        return "it is spread over several devices"
    return _lowering(backend).refusal(weight)


def lowerings(weight: Any, backend: str) -> list[str]:
    """How a backend multiplies with a weight, for people; several where its layers differ in that."""
    if isinstance(weight, Mixed):
        return list(dict.fromkeys(one for stack in weight.stacks for one in lowerings(stack, backend)))
    if not isinstance(weight, QTensor):
        return ["float"]
    reason = refusal(weight, backend)
    return [f"reference: {reason}" if reason else f"{backend} layout"]


def compiler_options(backend: str) -> dict[str, str | bool]:
    """What to compile programs with prepared weights with: `compiler_options` of `jax.jit`, or of `compile`."""
    return dict(getattr(_lowering(backend), "COMPILER_OPTIONS", {})) if backend in ("cpu", "gpu") else {}


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory for an array at an address that XLA on a CPU accepts, so that it uses the buffer instead of a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_copy(view: np.ndarray) -> np.ndarray:
    """A copy of a view, in memory that NumPy asked for: in huge pages, where the system has them, unlike XLA's.

    On several threads, because most of the time is the system's, which has to find the pages.
    """
    array = aligned_empty(view.shape, view.dtype)
    threads = min(_MOST_THREADS, os.cpu_count() or 1, len(view))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(np.copyto, np.array_split(array, threads), np.array_split(view, threads)):
            pass
    return array


def _is_on_a_cpu(array: jax.Array) -> bool:
    return not isinstance(array, jax.core.Tracer) and all(device.platform == "cpu" for device in array.devices())


def _lowering(backend: str) -> types.ModuleType:
    """The module of a backend. Pallas, which the others need, takes a while to import."""
    if backend == "gpu":
        from quant.kernels import gpu

        return gpu
    if backend == "tpu":
        from quant.kernels import tpu

        return tpu
    return cpu
