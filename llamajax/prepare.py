"""Between loading and generating: weights in the layout of a backend, and what they are multiplied with."""

import dataclasses
from typing import Any

import jax

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.model import Llama
from quant import LayerRuns, QTensor
from quant import prepare as prepare_weight
from quant.kernels import Layout

ACTIVATIONS = ("float32", "bfloat16", "int8")


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


def with_activations(model: Any, kind: str) -> Any:
    """The same model, with other rounding of what its quantized weights are multiplied with.

    On a CPU prefill is faster with "bfloat16", because products of 16-bit floats are; nothing is with "int8".

    Args:
        model: or a weight, not prepared yet; leaves may be abstract.
        kind: "float32", not rounded; "bfloat16", each to 8 bits of precision; "int8", each group to 8 bits with a scale
            of its own, as llama.cpp does; all elements of a token as one where the weight's groups are reordered.

    Raises:
        LlamaJaxError: for another kind, a prepared model, or rounding for one without quantized weights.
    """
    if kind not in ACTIVATIONS:
        raise LlamaJaxError(f"activations {kind!r}: expected one of {', '.join(ACTIVATIONS)}")

    def change(leaf: Any) -> Any:
        if isinstance(leaf, Layout):
            raise LlamaJaxError("activations of a model that is laid out for a backend: change them before `prepare`")
        if not isinstance(leaf, QTensor):
            return leaf
        int8 = "int8-group" if leaf.order is None else "int8-token"
        return dataclasses.replace(leaf, activations={"float32": None, "bfloat16": "bfloat16", "int8": int8}[kind])

    is_packed = lambda node: isinstance(node, QTensor | Layout)  # noqa: E731
    if (
        isinstance(model, Llama)
        and kind != "float32"
        and not any(map(is_packed, jax.tree.leaves(model, is_leaf=is_packed)))
    ):
        raise LlamaJaxError(f"activations {kind!r} for a model without quantized weights: nothing would be rounded")
    return jax.tree.map(change, model, is_leaf=is_packed)


def only_looked_up(name: str, config: Config) -> bool:
    """Whether a weight is an embedding table that serves as no head, and so is multiplied with nothing."""
    return "embed_VD" in name and not config.tied_embeddings
