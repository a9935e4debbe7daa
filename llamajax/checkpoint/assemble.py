"""Assembles a model from weights that are read one by one: stacks, converts, lays out and places them.

`Finish.stack` defines how a weight is transformed. It is pure, so `jax.eval_shape` of it gives the result of a load
before anything is read (`outcome`). Memory holds the result and the weight that is being read.
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llamajax.checkpoint.checks import check_fits, check_memory, is_finite
from llamajax.checkpoint.source import Source
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.model import Llama, model_from
from llamajax.parameters import Leaf, Place, leaves, named_weights, names_in_tree_order, parts_of
from llamajax.prepare import check_activations
from quant import Mixed, aligned_empty, has_nan_scales, is_weight, kind_of, nbytes, prepare, with_activations


@dataclasses.dataclass(frozen=True)
class Finish:
    """The transformation of stored weights into the model's.

    Attributes:
        dtype: dtype of float weights; as stored by default. Quantized weights stay as they are.
        activations: what activations are rounded to, as in `llamajax.with_activations`.
        backend: the backend whose layout quantized weights get.
    """

    dtype: jax.typing.DTypeLike | None = None
    activations: str | None = None
    backend: str | None = None

    def one(self, weight: Any) -> Any:
        """Converts the dtype of a single weight, of abstract, NumPy or JAX arrays."""
        if self.dtype is None or is_weight(weight):
            return weight
        if isinstance(weight, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(weight.shape, np.dtype(self.dtype))
        with np.errstate(over="ignore"):
            return weight.astype(self.dtype)

    def stack(self, leaf: Leaf, weight: Any) -> Any:
        """Sets the activations' dtype and the layout of a leaf of the model, whose weights are already stacked."""
        if self.activations is not None:
            weight = with_activations(weight, self.activations)
        if self.backend is None or leaf.spec.is_only_looked_up:
            return weight
        return prepare(weight, self.backend, donate=True)


def outcome(source: Source, finish: Finish = Finish()) -> Llama:
    """Returns what `assemble` will return, with `jax.ShapeDtypeStruct` leaves.

    Raises:
        LlamaJaxError: if `finish` does not fit the weights of this source.
    """
    stacked: dict[str, Any] = {}
    for name, leaf in leaves(source.config).items():
        stored = [finish.one(source.abstract[place]) for place in leaf.places]
        stacked[name] = stored[0] if leaf.layers is None else Mixed.of(stored, leaf.spec.axis)
    check_activations(stacked, finish.activations)
    made = {
        name: jax.eval_shape(lambda weight, leaf=leaf: finish.stack(leaf, weight), stacked[name])
        for name, leaf in leaves(source.config).items()
    }
    return model_from(made, source.config)


def assemble(
    path: Any,
    source: Source,
    finish: Finish = Finish(),
    shardings: Any = None,
    on_weight: Callable[[int, int], None] = lambda done, total: None,
) -> Llama:
    """Reads a model.

    Args:
        path: path of the checkpoint, for messages.
        source: the reader's description of it.
        finish: the transformation of the weights.
        shardings: a pytree of `jax.sharding.Sharding` shaped like the model as it is stored, or one for every array;
            "host" for NumPy arrays. The first device by default.
        on_weight: called with (weights read, weights in all); the weights of each layer count separately.

    Raises:
        LlamaJaxError: for damaged or missing weights, NaN or infinity, or a dtype that cannot hold them.
    """
    check_activations(list(source.abstract.values()), finish.activations)  # before anything is read
    foreseen = outcome(source, Finish(finish.dtype))
    check_memory(path, source.expanded, nbytes(foreseen))
    stacks = Stacks(source.config, lambda place: kind_of(finish.one(source.abstract[place])))
    where = _placements(foreseen, shardings)
    made: dict[str, Any] = {}
    done = 0
    for places in _together(source):
        if source.fill is not None and not _converts(source, finish, places):
            views = [stacks.view(place, source.abstract[place]) for place in places]
            source.fill(places, views)
            for place, view in zip(places, views, strict=True):
                check_weight(path, source, place, view)
        else:
            for place in places:
                weight = source.read(place)
                check_weight(path, source, place, weight)
                stacks.put(place, weight, finish.one(source.abstract[place]), f"{path}: {place}")
        done += len(places)
        on_weight(done, len(source.order))
        name = stacks.leaf_of[places[0]]
        if not stacks.missing[name]:
            made[name] = _finished(stacks, name, finish, where[name])
    return model_from(made, source.config)


def _together(source: Source) -> Iterator[Sequence[Place]]:
    """Yields weights one by one in the order of the source; all weights of a leaf together if the reader has `fill`."""
    if source.fill is None:
        yield from ((place,) for place in source.order)
    else:
        yield from (leaf.places for leaf in leaves(source.config).values())


def _converts(source: Source, finish: Finish, places: Sequence[Place]) -> bool:
    """Whether a weight gets another dtype, so that it cannot be read into a view of the stack."""
    if finish.dtype is None:
        return False
    return any(kind_of(finish.one(source.abstract[place])) != kind_of(source.abstract[place]) for place in places)


def _finished(stacks: "Stacks", name: str, finish: Finish, where: Mapping[str, Any]) -> Any:
    """Takes a finished stack, moves it to its devices, and applies `Finish.stack`."""
    weight = stacks.take(name)
    flat = [
        array if isinstance(target, str) else jax.device_put(array, target)
        for array, target in zip(jax.tree.leaves(weight), where.values(), strict=True)
    ]
    return finish.stack(stacks.leaves[name], jax.tree.unflatten(jax.tree.structure(weight), flat))


def check_weight(path: Any, source: Source, place: Place, weight: Any) -> None:
    """Refuses a weight that has not the shape that the model expects, or is not finite."""
    expected = source.abstract[place].shape
    if tuple(weight.shape) != tuple(expected):
        raise LlamaJaxError(f"{path}: {place} has shape {weight.shape}: expected {tuple(expected)}")
    if not source.is_checked and (has_nan_scales(weight) or not all(map(is_finite, jax.tree.leaves(weight)))):
        raise LlamaJaxError(f"{path}: {place} holds NaN or infinity: the weights are damaged")


def _placements(abstract: Any, shardings: Any) -> dict[str, dict[str, Any]]:
    """Returns where each array of each leaf goes: a sharding, None for the default device, "host" to stay in NumPy."""
    named = named_weights(abstract)
    if shardings is None or isinstance(shardings, str | jax.sharding.Sharding):
        return {name: dict.fromkeys(parts_of(weight), shardings) for name, weight in named.items()}
    flat, tree = iter(jax.tree.leaves(shardings)), {}
    for name in names_in_tree_order(abstract):
        tree[name] = {part: next(flat) for part in parts_of(named[name])}
    return tree


class Stacks:
    """Writes weights of single layers into stacked arrays, so that no weight is held twice."""

    def __init__(self, config: Config, kind: Callable[[Place], Hashable]):
        """Begins with empty stacks; weights of the same name for which `kind` is equal share one stack."""
        self.config = config
        self.leaves = leaves(config)
        self.leaf_of = {place: name for name, leaf in self.leaves.items() for place in leaf.places}
        self.missing = {name: len(leaf.places) for name, leaf in self.leaves.items()}
        self._kinds: dict[str, list[Any]] = {}
        for name, leaf in self.leaves.items():
            self._kinds[name] = [kind(place) for place in leaf.places]
        self._buffers: dict[str, list[Any]] = {}

    def view(self, place: Place, like: Any) -> Any:
        """Returns writable views, NumPy arrays, of one weight's place in its stack; `like` gives shapes and dtypes."""
        name = self.leaf_of[place]
        leaf, kinds = self.leaves[name], self._kinds[name]
        found = list(dict.fromkeys(kinds))
        buffers = self._buffers.setdefault(name, [None] * len(found))
        number = leaf.places.index(place)
        which = found.index(kinds[number])
        if buffers[which] is None:
            lead = () if leaf.layers is None else (kinds.count(kinds[number]),)
            empty = lambda array: aligned_empty((*lead, *array.shape), array.dtype)  # noqa: E731
            buffers[which] = jax.tree.map(empty, like)
        self.missing[name] -= 1
        if leaf.layers is None:
            return buffers[which]
        at = kinds[:number].count(kinds[number])
        return jax.tree.map(lambda array: array[at], buffers[which])

    def put(self, place: Place, weight: Any, like: Any = None, what: str | None = None) -> None:
        """Copies one weight, of NumPy or JAX arrays, into its stack.

        Args:
            place: the weight's place.
            weight: the weight.
            like: a weight with the dtypes to convert to; the weight's own by default.
            what: description of the weight for messages.

        Raises:
            LlamaJaxError: if a dtype cannot hold its numbers.
        """
        view = self.view(place, weight if like is None else like)
        for into, array in zip(jax.tree.leaves(view), jax.tree.leaves(weight), strict=True):
            with np.errstate(over="ignore"):
                into[...] = array
            if what is not None:
                check_fits(what, array, into)

    def take(self, name: str) -> Any:
        """Removes a finished leaf of the model from the stacks and returns it, with NumPy arrays."""
        leaf, kinds = self.leaves[name], self._kinds[name]
        stacks = self._buffers.pop(name)
        if leaf.layers is None:
            return stacks[0]
        found = list(dict.fromkeys(kinds))
        types = [found.index(kind) for kind in kinds]
        if len(stacks) > 1 and len({kind_of(jax.tree.map(lambda a: a[0], stack)) for stack in stacks}) < len(stacks):
            # Stacks of different kinds turned out to have one type: they are merged.
            places = [types[:number].count(which) for number, which in enumerate(types)]
            single = [
                jax.tree.map(lambda a, at=at: a[at], stacks[which]) for which, at in zip(types, places, strict=True)
            ]
            return Mixed.of(single, leaf.spec.axis)
        return stacks[0] if len(stacks) == 1 else Mixed(tuple(stacks), types=tuple(types), axis=leaf.spec.axis)

    def model(self) -> Llama:
        """Returns the whole model, on the default device."""
        return model_from({name: jax.tree.map(jax.device_put, self.take(name)) for name in self.leaves}, self.config)
