"""From the format at rest to the layout that a backend multiplies with, once, when a model is loaded."""

import types
from typing import Any

import jax

from quant.kernels import cpu
from quant.qtensor import QTensor
from quant.runs import LayerRuns

# Those with a layout of their own.
BACKENDS = ("cpu", "gpu", "tpu")


def prepare(weight: Any, backend: str, *, donate: bool = False) -> Any:
    """Lays a weight out for `quant.einsum` on a backend.

    Args:
        weight: QTensor [K, M], [M, K], or a stack [L, ...] of them; or `LayerRuns`.
        backend: as `jax.default_backend` names it.
        donate: whether the weight's memory may be freed as soon as it has been laid out: the weight is unusable then.
            Otherwise there are two of it.

    Returns:
        The weight in its layout; or itself, where it is an array, or the backend has no layout for it (`refusal`).
    """
    if isinstance(weight, LayerRuns):
        return LayerRuns(tuple(prepare(part, backend, donate=donate) for part in weight.parts))
    if not isinstance(weight, QTensor) or refusal(weight, backend):
        return weight
    laid_out = jax.block_until_ready(jax.jit(_lowering(backend).layout)(weight))
    if donate:
        # What the layout has as it was, jax returns as the same array.
        kept = {id(array) for array in jax.tree.leaves(laid_out)}
        for array in jax.tree.leaves(weight):
            if id(array) not in kept:
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


def compiler_options(backend: str) -> dict[str, str | bool]:
    """What to compile programs with prepared weights with: `compiler_options` of `jax.jit`, or of `compile`."""
    return dict(cpu.COMPILER_OPTIONS) if backend == "cpu" else {}


def _lowering(backend: str) -> types.ModuleType:
    """The module of a backend. Pallas, which the others need, takes a while to import."""
    if backend == "gpu":
        from quant.kernels import gpu

        return gpu
    if backend == "tpu":
        from quant.kernels import tpu

        return tpu
    return cpu
