"""Stacks of layers whose weights are quantized differently: `LayerRuns`, a leaf of several arrays.

A stacked weight [L, ...] is one array while all layers have one scheme. Where they have not, it is cut into runs of
consecutive layers, and so is every other weight of the stack, at the same layers: a run is then a stack like any other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quant.kernels import Layout
from quant.qtensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LayerRuns:
    """A stacked weight [L, ...] in runs of layers.

    Attributes:
        parts: arrays or QTensors [L_i, ...], the sum of L_i being L. Their schemes, and so their arrays, may differ.
    """

    parts: tuple[jax.Array | QTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (sum(self.lengths), *self.parts[0].shape[1:])

    @property
    def lengths(self) -> tuple[int, ...]:
        """L_i, the number of layers of each run."""
        return tuple(part.shape[0] for part in self.parts)

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def __getitem__(self, layer: int) -> jax.Array | QTensor:
        """One layer, by its static number.

        Raises:
            IndexError: if there is none of that number.
        """
        start = 0
        for part, length in zip(self.parts, self.lengths, strict=True):
            if 0 <= layer - start < length:
                return part[layer - start]
            start += length
        raise IndexError(f"layer {layer}: expected 0 to {start - 1}")


def split_runs(layers: Any) -> list[tuple[int, int, Any]]:
    """Cuts a stack of layers into its runs.

    Args:
        layers: pytree whose leaves are arrays or QTensors [L, ...], or all of them `LayerRuns` cut at the same layers.

    Returns:
        For each run its first layer, its number of layers, and a tree of arrays and QTensors [L_i, ...]. One run, the
        tree itself, where nothing is cut.

    Raises:
        ValueError: if the leaves are not cut at the same layers.
    """
    leaves, structure = jax.tree.flatten(layers, is_leaf=lambda node: isinstance(node, LayerRuns | QTensor | Layout))
    cuts = {leaf.lengths if isinstance(leaf, LayerRuns) else (leaf.shape[0],) for leaf in leaves}
    if len(cuts) > 1:
        raise ValueError(f"weights of one stack are cut into runs of {sorted(cuts)} layers: expected the same cuts")
    runs, first = [], 0
    for i, length in enumerate(cuts.pop()):
        parts = [leaf.parts[i] if isinstance(leaf, LayerRuns) else leaf for leaf in leaves]
        runs.append((first, length, jax.tree.unflatten(structure, parts)))
        first += length
    return runs


def scan_layers(step: Callable[[Any, Any, jax.Array], Any], carry: Any, layers: Any) -> Any:
    """Applies a stack of layers one after the other, compiled once for each run of layers of the same schemes.

    Arrays and QTensors are sliced by `jax.lax.scan`, which reverse-mode differentiation needs. A `Layout` is not:
    each layer gets a view of the whole stack.

    Args:
        step: carry, one layer and its number (int32 scalar) -> carry.
        carry: pytree of arrays.
        layers: as `split_runs` takes it.

    Returns:
        The carry behind the last layer.
    """
    for first, length, run in split_runs(layers):
        leaves, structure = jax.tree.flatten(run, is_leaf=lambda node: isinstance(node, Layout | QTensor))
        sliced = [None if isinstance(leaf, Layout) else leaf for leaf in leaves]

        def one(carry, scanned, first=first, leaves=leaves, structure=structure):
            sliced, index = scanned
            layer = [
                whole.at_layer(index) if isinstance(whole, Layout) else part
                for whole, part in zip(leaves, sliced, strict=True)
            ]
            return step(carry, jax.tree.unflatten(structure, layer), first + index), None

        if length == 1:
            # A loop of one would only be in the way of those who read the program.
            first_layer = jax.tree.map(lambda array: array.reshape(array.shape[1:]), sliced)
            carry, _ = one(carry, (first_layer, jnp.zeros((), jnp.int32)))
        else:
            carry, _ = jax.lax.scan(one, carry, (sliced, jnp.arange(length, dtype=jnp.int32)))
    return carry
