"""Products with quantized weights: one lowering per backend, which is a layout and the product with it.

The reference for all of them is `quant.product` with the QTensor itself.
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
    """Returns the start indices of a dynamic slice as int32: XLA needs one dtype, and Python ints are int64 under x64.

    Static indices stay NumPy numbers: for each array that might be negative, JAX traces a comparison and a select,
    which would be half of all traced operations of an unrolled product.
    """
    return [np.int32(value) if isinstance(value, int) else jnp.asarray(value, jnp.int32) for value in values]


class Layout(Weight):
    """A quantized weight in the form that one backend multiplies with; made by `quant.prepare`, never saved.

    It replaces the QTensor, [..., K, M] or [..., M, K]. But `scan` should not slice it: that would copy a layer out of
    its stack at every use. A layer is a view (`at_layer`), whose bytes are located when they are read; the same holds
    for any other of its matrices.
    """

    # The layer of a stack; and `QTensor.order`, if the layout has one.
    layer: jax.Array | None
    order: jax.Array | None = None
    group_size: Any

    def at_layer(self, layer: jax.Array) -> Self:
        """Returns a view of layer `layer` of a stack, an int32 scalar that may be traced; nothing is copied."""
        return dataclasses.replace(self, layer=layer)  # type: ignore[type-var]

    def sliced(self) -> Self:
        """Copies the layer out of the stack if `layer` is given; else returns the weight itself."""
        if self.layer is None:
            return self
        whole = dataclasses.replace(self, layer=None)  # type: ignore[type-var]
        return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False), whole)

    def matrix(self, index: jax.Array | int) -> Self:
        """See `Weight.matrix`; the result is a view, a layer of a stack of all matrices."""
        whole = dataclasses.replace(self, layer=None)  # type: ignore[type-var]
        number = jnp.asarray(index, jnp.int32)
        if self.layer is not None:
            number = self.layer * self.matrices + number
        return flat_stack(whole, whole.ndim - 2).at_layer(number)

    def multiply(self, x: jax.Array) -> jax.Array:
        """See `Weight.multiply`; uses the backend's product."""
        x = rounded(x, self, None)
        y_RM = self.matmul(x.reshape(-1, x.shape[-1]))
        return y_RM.reshape(*x.shape[:-1], -1)

    def values(self) -> jax.Array:
        """See `Weight.values`."""
        return self.restore().values()

    def take(self, number: int) -> Self:
        """See `Weight.take`; the result is a copy."""
        return self.at_layer(jnp.asarray(number, jnp.int32)).sliced()

    def split(self) -> tuple[None, Callable[[Any, jax.Array], Any]]:
        """See `Weight.split`; a scan slices nothing."""
        return None, lambda part, place: self.at_layer(place)

    def matmul(self, x_RK: jax.Array) -> jax.Array:
        """Multiplies rows of activations with this single matrix: float [R, K] -> float32 [R, M]."""
        raise NotImplementedError

    def restore(self) -> "QTensor":
        """Returns the weight as a QTensor, or one layer if `layer` is given."""
        raise NotImplementedError
