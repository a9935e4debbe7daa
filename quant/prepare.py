"""From the format at rest to the layout that a backend multiplies with, once, when a model is loaded."""

from typing import Any

import jax

from quant.kernels import cpu
from quant.qtensor import QTensor
from quant.runs import LayerRuns

# Backends with a layout of their own. On others a QTensor is multiplied as it is.
BACKENDS = ("cpu",)


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
    tiled = jax.block_until_ready(cpu.layout(weight))
    if donate:
        jax.tree.map(lambda array: array.delete(), weight)
    return tiled


def refusal(weight: QTensor, backend: str) -> str | None:
    """Why a weight is multiplied by the reference on a backend, or None if there is a layout for it."""
    if backend not in BACKENDS:
        return f"backend {backend!r} has no layout of its own"
    return cpu.refusal(weight)


def compiler_options(backend: str) -> dict[str, str | bool]:
    """What to compile programs with prepared weights with: `compiler_options` of `jax.jit`, or of `compile`."""
    return {**cpu.COMPILER_OPTIONS} if backend == "cpu" else {}
