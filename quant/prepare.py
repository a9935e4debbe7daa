"""Lays weights out for a backend: from the format at rest to the backend's layout, once, when a model is loaded."""

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
        weight: QTensor [..., K, M] or [..., M, K], or a `Mixed` of QTensors.
        backend: name of the backend, as returned by `jax.default_backend`.
        donate: whether to free the weight's memory once it has been laid out, which makes the weight unusable.
            Otherwise memory holds both.

    Returns:
        The weight in its layout; or the weight itself if it is an array or the backend has no layout for it
        (`refusal`).
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
        # jax returns arrays that the layout does not change as they are: those must not be deleted.
        kept = {id(array) for array in jax.tree.leaves(laid_out)}
        for array in arrays:
            if id(array) not in kept and isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer):
                array.delete()
    return laid_out


def refusal(weight: QTensor, backend: str) -> str | None:
    """Returns why a backend has no layout for a weight, which the reference then multiplies; None if it has one."""
    if backend not in BACKENDS:
        return f"backend {backend!r} has no layout of its own"
    sharding = getattr(weight.planes[0], "sharding", None)
    if sharding is not None and len(sharding.device_set) > 1:
        return "it is spread over several devices"
    return _lowering(backend).refusal(weight)


def lowerings(weight: Any, backend: str) -> list[str]:
    """Describes how a backend multiplies with a weight; the list has several entries if the layers differ."""
    if isinstance(weight, Mixed):
        return list(dict.fromkeys(one for stack in weight.stacks for one in lowerings(stack, backend)))
    if not isinstance(weight, QTensor):
        return ["float"]
    reason = refusal(weight, backend)
    return [f"reference: {reason}" if reason else f"{backend} layout"]


def compiler_options(backend: str) -> dict[str, str | bool]:
    """Returns the `compiler_options` (of `jax.jit` or `compile`) for programs with prepared weights."""
    return dict(getattr(_lowering(backend), "COMPILER_OPTIONS", {})) if backend in ("cpu", "gpu") else {}


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Allocates an array, aligned so that XLA on a CPU uses its buffer instead of making a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def aligned_copy(view: np.ndarray) -> np.ndarray:
    """Copies a view into memory allocated by NumPy, which uses huge pages where the system has them, unlike XLA.

    It uses several threads, because most of the time goes to the operating system, which has to provide the pages.
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
    """Returns the module of a backend. The GPU and TPU modules are imported here: they need Pallas, which is slow."""
    if backend == "gpu":
        from quant.kernels import gpu

        return gpu
    if backend == "tpu":
        from quant.kernels import tpu

        return tpu
    return cpu
