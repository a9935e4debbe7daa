"""What every reader speaks: tensors under the model's own names, one at a time.

A name is the path of a leaf in `Llama`, for example `layers.attention.query_DQ`. Leaves under `layers` carry a leading
axis L; readers read them layer by layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from llamajax.config import Config
from llamajax.model import Llama, abstract_model
from llamajax.words import Words
from quant import LayerRuns, QTensor

STACKED = "layers."


class Place(NamedTuple):
    """Where one tensor of a foreign file belongs.

    Attributes:
        name: leaf of `Llama`.
        layer: index along the leaf's leading axis L, or None for a leaf without one.
    """

    name: str
    layer: int | None

    def __str__(self) -> str:
        """For people."""
        return self.name if self.layer is None else f"{self.name} of layer {self.layer}"


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that was recognised and whose header was checked; no weight has been read yet.

    Attributes:
        description: format and version, for people.
        config: the architecture.
        dtype: in which the weights are stored, or dequantized if they are stored quantized.
        order: every tensor once, in the order in which the files hold them.
        read: reads one tensor, in our orientation and RoPE layout and the file's dtype; may be a view.
        tokenizer_bytes: the `tokenizer.model` that came with it, if one did; it may be of another kind than is read.
        words: what it says of words beside that.
        notes: what of the files is not used, and why, for people.
    """

    description: str
    config: Config
    dtype: np.dtype
    order: tuple[Place, ...]
    read: Callable[[Place], np.ndarray]
    tokenizer_bytes: bytes | None = None
    words: Words = Words()
    notes: tuple[str, ...] = ()


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves of a model (or of any pytree shaped like one) by name, in tree order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {leaf_name(path): leaf for path, leaf in leaves}


def named_weights(tree: Any) -> dict[str, Any]:
    """Like `named_leaves`, with a quantized weight as one `QTensor` or `LayerRuns` rather than as its arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, QTensor | LayerRuns))[0]
    return {leaf_name(path): leaf for path, leaf in leaves}


def model_from(weights: Mapping[str, Any], config: Config) -> Llama:
    """The model whose `named_weights` these are, in the same order."""
    return jax.tree.unflatten(jax.tree.structure(abstract_model(config)), list(weights.values()))


def tensor_places(config: Config) -> tuple[Place, ...]:
    """Every tensor of a model, layer by layer: the embeddings, each layer's, the rest."""
    names = named_leaves(abstract_model(config))
    stacked = [name for name in names if name.startswith(STACKED)]
    single = [name for name in names if not name.startswith(STACKED)]
    layers = [Place(name, layer) for layer in range(config.num_layers) for name in stacked]
    return (Place(single[0], None), *layers, *(Place(name, None) for name in single[1:]))


def is_quantized(tree: Any) -> bool:
    """Whether any weight of a model is a `QTensor`, in runs of layers or not."""
    return any(isinstance(weight, QTensor | LayerRuns) for weight in named_weights(tree).values())


def placements(tree: Any, shardings: Any) -> dict[str, Any]:
    """Where each leaf goes, by name: a sharding, None for the default device, "host" for one that stays in NumPy.

    `shardings` is one of these for all leaves, or a pytree of shardings shaped like the model.
    """
    names = named_leaves(tree)
    if shardings is None or isinstance(shardings, str | jax.sharding.Sharding):
        return dict.fromkeys(names, shardings)
    return dict(zip(names, jax.tree.leaves(shardings), strict=True))


def place(array: np.ndarray, where: Any) -> Any:
    """The array where `placements` says."""
    return array if isinstance(where, str) else jax.device_put(array, where)


def leaf_name(path: tuple[Any, ...]) -> str:
    """`layers.attention.query_DQ` from a key path; the `value` of an `nnx.Param` is left out."""
    parts = [str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in path]
    return ".".join(part for part in parts if part != "value")


def halves_from_pairs(matrix: np.ndarray, head_size: int) -> np.ndarray:
    """Reorders the rows of a query or key projection [heads * H, D] from Meta's RoPE layout to ours.

    Meta rotates neighbours (2i, 2i + 1), we rotate (i, i + H/2): row 2i goes to i, row 2i + 1 to i + H/2.
    """
    heads = matrix.reshape(-1, head_size // 2, 2, matrix.shape[-1])
    return heads.swapaxes(1, 2).reshape(matrix.shape)
