"""`Mixed`: a stacked weight whose layers have several types, as one leaf; and functions over all weights of a tree."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quant.kernels import Layout
from quant.qtensor import QTensor
from quant.weight import Weight, by_row, inside, is_weight, layer_of, nbytes, product, values, view


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stacks", "layer"], meta_fields=["types", "axis"])
@dataclasses.dataclass(frozen=True, eq=False)
class Mixed(Weight):
    """A stack [L, ..., K, M] or [L, ..., M, K] of layers of different types, such as different bits or floats.

    The layers of each type form a stack of their own, in order. A product chooses the type of its layer by
    `lax.switch`: each type is compiled once, however the layers alternate, and no weight is copied.

    Attributes:
        stacks: arrays or `Weight`s [L_i, ...], one for each type.
        layer: int32 scalar or None. If given, the object represents that layer.
        types: for each of the L layers the index of its type.
        axis: the contraction axis.
    """

    stacks: tuple[Any, ...]
    layer: jax.Array | None = None
    _: dataclasses.KW_ONLY
    types: tuple[int, ...]
    axis: int = -2

    @classmethod
    def of(cls, layers: Sequence[Any], axis: int = -2) -> Any:
        """Stacks layers, arrays or `Weight`s, to [L, ...]; the result is a `Mixed` only if their types differ.

        Args:
            layers: layers of NumPy or JAX arrays, of one shape.
            axis: the contraction axis.

        Raises:
            ValueError: if their shapes differ, or there are no layers.
        """
        if len({tuple(layer.shape) for layer in layers}) != 1:
            shapes = sorted({tuple(layer.shape) for layer in layers})
            raise ValueError(f"layers of shapes {shapes}: expected one shape, and at least one layer")
        kinds = [kind_of(layer) for layer in layers]
        found = list(dict.fromkeys(kinds))
        stacks = tuple(
            _stacked([layer for layer, kind in zip(layers, kinds, strict=True) if kind == each]) for each in found
        )
        types = tuple(map(found.index, kinds))
        return stacks[0] if len(stacks) == 1 else cls(stacks, types=types, axis=axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight, or of one layer if `layer` is given."""
        rest = tuple(self.stacks[0].shape[1:])
        return (len(self.types), *rest) if self.layer is None else rest

    @property
    def dtype(self) -> Any:
        """Dtype of the weight that this object represents, taken from its first type."""
        return self.stacks[0].dtype

    @property
    def activations(self) -> str | None:
        """See `QTensor.activations`; taken from the first type that has it set."""
        return next((stack.activations for stack in self.stacks if is_weight(stack) and stack.activations), None)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(map(nbytes, self.stacks))

    @property
    def places(self) -> tuple[int, ...]:
        """For each layer its position in the stack of its type."""
        return tuple(self.types[:layer].count(kind) for layer, kind in enumerate(self.types))

    def product(self, x: jax.Array, index: jax.Array | int | None = None) -> jax.Array:
        """See `Weight.product`; if `layer` is given, the index refers to matrices of that layer."""
        if self.layer is None:
            if index is None:
                return super().product(x)  # raises an error that says what is missing
            if jnp.ndim(index):
                return by_row(x, index, self.matrices, self.product)
            layer, rest = jnp.divmod(inside(index, self.matrices), self.matrices // len(self.types))
            return dataclasses.replace(self, layer=layer).product(x, None if self.ndim == 3 else rest)

        def of_type(stack: Any) -> Callable[..., jax.Array]:
            def multiply(x: jax.Array, place: jax.Array) -> jax.Array:
                return product(x, view(stack, place), index, axis=self.axis, dtype=jnp.float32)

            return multiply

        place = jnp.asarray(self.places, jnp.int32)[self.layer]
        kind = jnp.asarray(self.types, jnp.int32)[self.layer]
        return jax.lax.switch(kind, [of_type(stack) for stack in self.stacks], x, place)

    def multiply(self, x: jax.Array) -> jax.Array:
        """See `product`."""
        return self.product(x)

    def values(self) -> jax.Array:
        """See `Weight.values`; of all layers, or of `layer`, which may be traced."""
        if self.layer is None:
            return jnp.stack([values(self.take(number)) for number in range(len(self.types))])
        return jax.lax.dynamic_index_in_dim(dataclasses.replace(self, layer=None).values(), self.layer, keepdims=False)

    def take(self, number: int) -> Any:
        """See `Weight.take`."""
        return layer_of(self.stacks[self.types[number]], self.places[number])

    def split(self) -> tuple[None, Callable[[Any, jax.Array], Any]]:
        """See `Weight.split`; a scan slices nothing."""
        return None, lambda part, place: dataclasses.replace(self, layer=place)


def kind_of(weight: Any) -> Any:
    """Returns what must be equal for weights to share a stack: the tree structure, and shapes and dtypes of arrays."""
    leaves, structure = jax.tree.flatten(weight)
    return structure, tuple((tuple(leaf.shape), jnp.dtype(leaf.dtype).name) for leaf in leaves)


def _stacked(layers: Sequence[Any]) -> Any:
    """Stacks layers of one type."""

    def stack(*arrays: Any) -> Any:
        if isinstance(arrays[0], jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((len(arrays), *arrays[0].shape), arrays[0].dtype)
        return (np if isinstance(arrays[0], np.ndarray) else jnp).stack(arrays)

    return jax.tree.map(stack, *layers)


def with_layer(weight: Any, number: int, layer: Any, axis: int = -2) -> Any:
    """Replaces one layer of a stack [L, ...], by static number; a layer of another type makes the stack a `Mixed`.

    Raises:
        ValueError: if the layer has another shape.
    """
    layer = _alone(layer)
    if not is_weight(weight) and kind_of(weight[number]) == kind_of(layer):
        return weight.at[number].set(layer)
    layers = [layer_of(weight, i) for i in range(weight.shape[0])]
    layers[number] = layer
    return Mixed.of(layers, axis)


def _alone(weight: Any) -> Any:
    """Returns a layer of its own if the weight is a view of a stack."""
    if isinstance(weight, Layout):
        return weight.sliced()
    if isinstance(weight, Mixed) and weight.layer is not None:
        return dataclasses.replace(weight, layer=None).take(int(weight.layer))
    return weight


def map_quantized(function: Callable[[QTensor], Any], tree: Any) -> Any:
    """Applies `function` to each QTensor of a tree, also inside a `Mixed`; layouts stay as they are."""
    one = lambda leaf: function(leaf) if isinstance(leaf, QTensor) else leaf  # noqa: E731
    return jax.tree.map(one, tree, is_leaf=lambda node: isinstance(node, QTensor | Layout))


def quantized(tree: Any) -> list[QTensor]:
    """Returns every QTensor of a tree, also inside a `Mixed`, in the tree's order."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, QTensor))
    return [leaf for leaf in leaves if isinstance(leaf, QTensor)]


def is_laid_out(tree: Any) -> bool:
    """Whether any weight of a tree is laid out for a backend."""
    is_layout = lambda node: isinstance(node, Layout)  # noqa: E731
    return any(map(is_layout, jax.tree.leaves(tree, is_leaf=is_layout)))


def with_activations(weight: Any, kind: str) -> Any:
    """Sets how activations are rounded for a weight: "float32" (not), "bfloat16" or "int8"; arrays are unchanged."""

    def change(qtensor: QTensor) -> QTensor:
        int8 = "int8-group" if qtensor.order is None else "int8-token"
        return dataclasses.replace(qtensor, activations={"float32": None, "bfloat16": "bfloat16", "int8": int8}[kind])

    return map_quantized(change, weight)
