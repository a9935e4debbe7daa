"""One lowering per backend for products with quantized weights: a layout, and the product with it.

The reference that each is compared with is `quant.product` with the QTensor itself.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from quant.weight import Weight, flat_stack, rounded

if TYPE_CHECKING:
    from quant.qtensor import QTensor


def start_indices(*values: jax.Array | int) -> list[jax.Array | np.int32]:
    """Where a dynamic slice starts, all int32: XLA takes indices of one type, and Python's are int64 under x64.

    What is known stays a number: JAX traces a comparison and a choice for each array that might be negative, which is
    half of what there is to trace where a product is unrolled.
    """
    return [np.int32(value) if isinstance(value, int) else jnp.asarray(value, jnp.int32) for value in values]


class Layout(Weight):
    """A quantized weight as one backend multiplies with it; made by `quant.prepare`, never saved.

    It stands where the QTensor stood, [..., K, M] or [..., M, K]. But `scan` should not slice it: that would copy a
    layer out of its stack at every use. A layer is a view, `at_layer`, and is found where its bytes are read; so is any
    other of its matrices.
    """

    # Of a stack; `QTensor.order`, where a layout has one.
    layer: jax.Array | None
    order: jax.Array | None = None
    group_size: Any

    def at_layer(self, layer: jax.Array) -> Self:
        """Layer `layer` of a stack, an int32 scalar known only at run time; nothing is copied."""
        return dataclasses.replace(self, layer=layer)  # type: ignore[type-var]

    def sliced(self) -> Self:
        """The layer itself instead of its number in a stack: a copy, unless there is no number."""
        if self.layer is None:
            return self
        whole = dataclasses.replace(self, layer=None)  # type: ignore[type-var]
        return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False), whole)

    def matrix(self, index: jax.Array | int) -> Self:
        """See `Weight.matrix`: a view, a layer of what is then a stack of all matrices."""
        whole = dataclasses.replace(self, layer=None)  # type: ignore[type-var]
        number = jnp.asarray(index, jnp.int32)
        if self.layer is not None:
            number = self.layer * self.matrices + number
        return flat_stack(whole, whole.ndim - 2).at_layer(number)

    def multiply(self, x: jax.Array) -> jax.Array:
        """See `Weight.multiply`, by the backend's product."""
        x = rounded(x, self, None)
        y_RM = self.matmul(x.reshape(-1, x.shape[-1]))
        return y_RM.reshape(*x.shape[:-1], -1)

    def values(self) -> jax.Array:
        """See `Weight.values`."""
        return self.restore().values()

    def take(self, number: int) -> Self:
        """See `Weight.take`: a copy."""
        return self.at_layer(jnp.asarray(number, jnp.int32)).sliced()

    def split(self) -> tuple[None, Callable[[Any, jax.Array], Any]]:
        """See `Weight.split`: a scan slices nothing."""
        return None, lambda part, place: self.at_layer(place)

    def matmul(self, x_RK: jax.Array) -> jax.Array:
        """Rows of activations times a matrix, which this is one of: float [R, K] -> float32 [R, M]."""
        raise NotImplementedError

    def restore(self) -> "QTensor":
        """The weight as a QTensor, one layer of it if `layer` is given."""
        raise NotImplementedError
