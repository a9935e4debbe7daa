"""One lowering per backend for products with quantized weights: a layout, and the product with it.

The reference that each is compared with is `quant.einsum` with the QTensor itself.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from quant.qtensor import QTensor


def start_indices(*values: jax.Array | int) -> list[jax.Array]:
    """Where a dynamic slice starts, all int32: XLA takes indices of one type, and Python's are int64 under x64."""
    return [jnp.asarray(value, jnp.int32) for value in values]


class Layout:
    """A quantized weight as one backend multiplies with it; made by `quant.prepare`, never saved.

    It stands where the QTensor stood, [..., K, M] or [..., M, K]. But `scan` should not slice it: that would copy a
    layer out of its stack at every use. A layer is a view, `at_layer`, and is found where its bytes are read.
    """

    # Of a stack; `QTensor.order`, where a layout has one.
    layer: jax.Array | None
    order: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, or of one layer of it."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def outlier_index(self) -> None:
        """As `QTensor.outlier_index`: no layout holds outliers."""

    def at_layer(self, layer: jax.Array) -> Self:
        """Layer `layer` of a stack, an int32 scalar known only at run time; nothing is copied."""
        return dataclasses.replace(self, layer=layer)  # type: ignore[type-var]

    def sliced(self) -> Self:
        """The layer itself instead of its number in a stack: a copy, unless there is no number."""
        if self.layer is None:
            return self
        whole = dataclasses.replace(self, layer=None)  # type: ignore[type-var]
        return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, self.layer, keepdims=False), whole)

    def matmul(self, x_RK: jax.Array) -> jax.Array:
        """Rows of activations times a matrix: float [R, K] -> float32 [R, M]."""
        raise NotImplementedError

    def restore(self) -> "QTensor":
        """The weight as a QTensor, one layer of it if `layer` is given."""
        raise NotImplementedError

    def take_rows(self, row_n: jax.Array) -> jax.Array:
        """Rows of a table [M, K], int32 indices in [0, M) -> float32 [n, K]."""
        raise NotImplementedError

    # Of the weight; each layout knows where it keeps them.
    axis: int
    dtype: Any
    group_size: Any
    activations: Any
    nbytes: Any
