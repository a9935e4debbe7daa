"""The one way from weights that come one by one to a model: stacked, converted, laid out, placed.

`Finish.stack` says what becomes of a weight; it is pure, and by `jax.eval_shape` it says before anything is read what a
load will give (`outcome`). Memory holds the result and what is being read.
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
    """What is made of weights as they were stored.

    Attributes:
        dtype: of floats; as stored unless given. What is quantized stays as it is.
        activations: what quantized weights are multiplied with, as of `llamajax.with_activations`.
        backend: whose layout quantized weights get.
    """

    dtype: jax.typing.DTypeLike | None = None
    activations: str | None = None
    backend: str | None = None

    def one(self, weight: Any) -> Any:
        """A weight by itself: its dtype. Of abstract, NumPy or JAX arrays."""
        if self.dtype is None or is_weight(weight):
            return weight
        if isinstance(weight, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(weight.shape, np.dtype(self.dtype))
        with np.errstate(over="ignore"):
            return weight.astype(self.dtype)

    def stack(self, leaf: Leaf, weight: Any) -> Any:
        """A leaf of the model, once its weights are stacked: what it is multiplied with, and its layout."""
        if self.activations is not None:
            weight = with_activations(weight, self.activations)
        if self.backend is None or leaf.spec.is_only_looked_up:
            return weight
        return prepare(weight, self.backend, donate=True)


def outcome(source: Source, finish: Finish = Finish()) -> Llama:
    """What `assemble` will give, with `jax.ShapeDtypeStruct` leaves.

    Raises:
        LlamaJaxError: if `finish` asks for what this source does not have.
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
        path: where it is, for messages.
        source: what a reader says of it.
        finish: what is made of the weights.
        shardings: a pytree of `jax.sharding.Sharding` shaped like the model as it is stored, or one for every array;
            the first device unless given; "host" for NumPy arrays.
        on_weight: called with (weights read, weights in all), a layer's counting singly.

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
    """Weights in the order of the source; those of a leaf at once where the reader can fill them."""
    if source.fill is None:
        yield from ((place,) for place in source.order)
    else:
        yield from (leaf.places for leaf in leaves(source.config).values())


def _converts(source: Source, finish: Finish, places: Sequence[Place]) -> bool:
    """Whether a weight gets another dtype, and so is no view of the stack while it is read."""
    if finish.dtype is None:
        return False
    return any(kind_of(finish.one(source.abstract[place])) != kind_of(source.abstract[place]) for place in places)


def _finished(stacks: "Stacks", name: str, finish: Finish, where: Mapping[str, Any]) -> Any:
    """A leaf of the model, where it belongs."""
    weight = stacks.take(name)
    flat = [
        array if isinstance(target, str) else jax.device_put(array, target)
        for array, target in zip(jax.tree.leaves(weight), where.values(), strict=True)
    ]
    return finish.stack(stacks.leaves[name], jax.tree.unflatten(jax.tree.structure(weight), flat))


def check_weight(path: Any, source: Source, place: Place, weight: Any) -> None:
    """Refuses a weight that is not of the shape that the model expects, or not finite."""
    expected = source.abstract[place].shape
    if tuple(weight.shape) != tuple(expected):
        raise LlamaJaxError(f"{path}: {place} has shape {weight.shape}: expected {tuple(expected)}")
    if not source.is_checked and (has_nan_scales(weight) or not all(map(is_finite, jax.tree.leaves(weight)))):
        raise LlamaJaxError(f"{path}: {place} holds NaN or infinity: the weights are damaged")


def _placements(abstract: Any, shardings: Any) -> dict[str, dict[str, Any]]:
    """Where each array of each leaf goes: a sharding, None for the default device, "host" to stay in NumPy."""
    named = named_weights(abstract)
    if shardings is None or isinstance(shardings, str | jax.sharding.Sharding):
        return {name: dict.fromkeys(parts_of(weight), shardings) for name, weight in named.items()}
    flat, tree = iter(jax.tree.leaves(shardings)), {}
    for name in names_in_tree_order(abstract):
        tree[name] = {part: next(flat) for part in parts_of(named[name])}
    return tree


class Stacks:
    """Takes weights of single layers and writes them into stacked arrays: no weight is held twice."""

    def __init__(self, config: Config, kind: Callable[[Place], Hashable]):
        """Begins with nothing; `kind` says of each weight of a layer which others it shares a stack with."""
        self.config = config
        self.leaves = leaves(config)
        self.leaf_of = {place: name for name, leaf in self.leaves.items() for place in leaf.places}
        self.missing = {name: len(leaf.places) for name, leaf in self.leaves.items()}
        self._kinds: dict[str, list[Any]] = {}
        for name, leaf in self.leaves.items():
            self._kinds[name] = [kind(place) for place in leaf.places]
        self._buffers: dict[str, list[Any]] = {}

    def view(self, place: Place, like: Any) -> Any:
        """Where one weight goes, as NumPy arrays of its shapes to be written to; `like` gives shapes and dtypes."""
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
        """Takes one weight, of NumPy or JAX arrays.

        Args:
            place: of the weight.
            weight: the weight.
            like: of the dtypes that it is to have; its own unless given.
            what: it is, for messages.

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
        """A leaf of the model, of NumPy arrays; it is not held here any more."""
        leaf, kinds = self.leaves[name], self._kinds[name]
        stacks = self._buffers.pop(name)
        if leaf.layers is None:
            return stacks[0]
        found = list(dict.fromkeys(kinds))
        types = [found.index(kind) for kind in kinds]
        if len(stacks) > 1 and len({kind_of(jax.tree.map(lambda a: a[0], stack)) for stack in stacks}) < len(stacks):
            # Made differently, but of one type after all: brought together.
            places = [types[:number].count(which) for number, which in enumerate(types)]
            single = [
                jax.tree.map(lambda a, at=at: a[at], stacks[which]) for which, at in zip(types, places, strict=True)
            ]
            return Mixed.of(single, leaf.spec.axis)
        return stacks[0] if len(stacks) == 1 else Mixed(tuple(stacks), types=tuple(types), axis=leaf.spec.axis)

    def model(self) -> Llama:
        """The whole, on the default device."""
        return model_from({name: jax.tree.map(jax.device_put, self.take(name)) for name in self.leaves}, self.config)
