"""`Layer`: the number of a block's layer, its place in the cache, and its values to capture or replace."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from llamajax.caches import Scores, Where
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.parameters import Stack, locate

# Replacements of values, by the value's name and the number of the layer: an array, or a function of the value.
Hooks = Mapping[tuple[str, int], jax.Array | Callable[[jax.Array], jax.Array]]
NO_HOOKS: Hooks = MappingProxyType({})


@dataclasses.dataclass(eq=False)
class Layer:
    """The number of a layer, its place in the cache, and its captured or replaced values, for one call of its block.

    Attributes:
        number: from 0; known at run time only, in a stack that is scanned.
        part: number of the layer's part of the cache.
        place: place of the layer within that part.
        numbers: numbers that differ between layers (`Config.numbers`).
        capture: names of values to keep.
        hooks: replacements of values, by (name, number of the layer).
        kept: the captured values, by name.
        shown: the names of all values that can be captured.
    """

    number: jax.Array | int
    part: int = 0
    place: jax.Array | int = 0
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    capture: tuple[str, ...] = ()
    hooks: Hooks = dataclasses.field(default_factory=lambda: NO_HOOKS)
    kept: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    shown: set[str] = dataclasses.field(default_factory=set)

    def attend(
        self,
        cache: Any,
        query_BTNH: jax.Array,
        key_BTKH: jax.Array,
        value_BTKH: jax.Array,
        where: Where,
        scores: Scores | None = None,
    ) -> tuple[jax.Array, Any]:
        """Does what `KVCache.attend` does, for this layer; attention weights can be captured as "attention"."""
        scores = scores or Scores()
        self.shown.add("attention")
        if "attention" in self.capture or any(name == "attention" for name, _ in self.hooks):
            scores = dataclasses.replace(scores, see=lambda weight_BNTS: self.see("attention", weight_BNTS))
        return cache.attend(self.part, self.place, query_BTNH, key_BTKH, value_BTKH, where, scores)

    def see(self, name: str, value: jax.Array) -> jax.Array:
        """Replaces a named value if a hook asks for it, then keeps it if it is to be captured."""
        self.shown.add(name)
        for (hooked, number), hook in self.hooks.items():
            if hooked == name:
                changed = hook(value) if callable(hook) else jnp.broadcast_to(hook, value.shape).astype(value.dtype)
                value = jnp.where(jnp.asarray(self.number) == number, changed, value)
        if name in self.capture:
            self.kept[name] = value
        return value


def layers_of(config: Config, stack: Stack, position: int) -> Callable[..., Layer]:
    """Returns a function that makes the `Layer` of a scan's step from its index, its numbers, captures and hooks."""
    layers = stack.layers(position)
    found = [locate(config.stacks, layer) for layer in layers]
    (part,) = {_part(config.stacks, whole, at) for whole, at, _ in found}
    places = tuple(place for *_, place in found)
    constant = {name: values[0] for name, values in _numbers(config, layers).items() if len(set(values)) == 1}

    def make(index: jax.Array, varying: Mapping[str, Any], capture: tuple[str, ...], hooks: Hooks) -> Layer:
        numbers = constant | dict(varying)
        if len(layers) == 1:
            return Layer(layers[0], part, places[0], numbers, capture, hooks)
        place = index if places == tuple(range(len(places))) else jnp.asarray(places, jnp.int32)[index]
        return Layer(layers.start + index * layers.step, part, place, numbers, capture, hooks)

    return make


def _part(stacks: tuple[Stack, ...], stack: Stack, position: int) -> int:
    """Returns the number of a cache's part for a position of a stack's pattern."""
    return sum(len(before.pattern) for before in stacks[: stacks.index(stack)]) + position


def _numbers(config: Config, layers: range) -> dict[str, list[float]]:
    """Returns the numbers (`Config.numbers`) of some layers, by name."""
    each = [config.numbers(layer) for layer in layers]
    return {name: [numbers[name] for numbers in each] for name in each[0]}


def varying(config: Config, stack: Stack, position: int) -> dict[str, jax.Array]:
    """Returns the numbers that differ between the layers of a position, [R], which are scanned beside the weights."""
    numbers = _numbers(config, stack.layers(position))
    return {name: jnp.asarray(values) for name, values in numbers.items() if len(set(values)) > 1}


def check_shown(shown: list[set[str]], capture: tuple[str, ...], hooks: Hooks, num_layers: int) -> None:
    """Refuses names that no layer has, captured names that some layer lacks, and layers that do not exist."""
    for name, number in (*((name, 0) for name in capture), *hooks):
        names = set.intersection(*shown) if name in capture else set.union(*shown)
        if name not in names or not 0 <= number < num_layers:
            raise LlamaJaxError(
                f"{name!r} of layer {number}: expected one of {', '.join(sorted(names))}, and a layer from 0 to "
                f"{num_layers - 1}"
            )


def in_order(kept: list[Any], name: str) -> jax.Array:
    """Merges captured values of stacks, [R, …] at each position of the pattern, in the order of layers, [L, …]."""
    stacks = [jnp.stack([position[name] for position in positions], axis=1) for positions in kept]
    return jnp.concatenate([stack.reshape(-1, *stack.shape[2:]) for stack in stacks])
