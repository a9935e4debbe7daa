"""A model's weights in the layout of the backend that runs it: `prepare`, between loading and generating."""

from typing import Any

import jax

from llamajax.config import Config
from llamajax.model import Llama
from quant import LayerRuns, QTensor
from quant import prepare as prepare_weight


def prepare(model: Llama, backend: str | None = None, *, donate: bool = False) -> Llama:
    """The same model, with its quantized weights laid out for one backend.

    Not to be saved, exported or sharded: the format at rest is the QTensors'. A model without quantized weights comes
    back as it is. So does an embedding table that serves as no head: of it only rows are looked up.

    Args:
        model: of QTensors or arrays.
        backend: as `jax.default_backend` names it, which it is unless given.
        donate: whether each weight may be freed as soon as it has been laid out; then `model` must not be used any
            more, and memory never holds more than the model and one weight.

    Returns:
        The prepared model. Its logits are those of `model` up to the rounding of sums.
    """
    backend = backend or jax.default_backend()

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if only_looked_up(jax.tree_util.keystr(path), model.config):
            return leaf
        return prepare_weight(leaf, backend, donate=donate)

    return jax.tree_util.tree_map_with_path(one, model, is_leaf=lambda node: isinstance(node, QTensor | LayerRuns))


def only_looked_up(name: str, config: Config) -> bool:
    """Whether a weight is an embedding table that serves as no head, and so is multiplied with nothing."""
    return "embed_VD" in name and not config.tied_embeddings
