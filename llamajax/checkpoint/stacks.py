"""Weights that come one by one, as the arrays of the model that they make."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from llamajax.checkpoint.naming import STACKED, Place, model_from, named_leaves
from llamajax.config import Config
from llamajax.model import Llama, abstract_model
from quant import LayerRuns, aligned_copy, aligned_empty
from quant.recipe import Rule


class LayerStacks:
    """Takes quantized weights of single layers and writes them into stacked arrays: no weight is held twice."""

    def __init__(self, rules: Mapping[tuple[str, int | None], Rule], config: Config):
        """Begins with nothing; neighbouring layers with the same rules for all weights will make a run."""
        self._config = config
        names = [name for name, layer in rules if layer == 0]
        of_layer = [[rules[name, layer] for name in names] for layer in range(config.num_layers)]
        self._firsts = [i for i in range(config.num_layers) if i == 0 or of_layer[i] != of_layer[i - 1]]
        self._buffers: dict[tuple[str, int], Any] = {}

    def put(self, place: Place, weight: Any) -> None:
        """Takes one weight, of one layer."""
        if place.layer is None:
            self._buffers[place.name, 0] = jax.tree.map(lambda leaf: aligned_copy(np.asarray(leaf)), weight)
            return
        run = sum(first <= place.layer for first in self._firsts) - 1
        ends = [*self._firsts[1:], self._config.num_layers]
        length = ends[run] - self._firsts[run]
        if (place.name, run) not in self._buffers:
            empty = lambda leaf: aligned_empty((length, *leaf.shape), leaf.dtype)  # noqa: E731
            self._buffers[place.name, run] = jax.tree.map(empty, weight)
        stacks = jax.tree.leaves(self._buffers[place.name, run])
        for stack, leaf in zip(stacks, jax.tree.leaves(weight), strict=True):
            stack[place.layer - self._firsts[run]] = leaf

    def model(self) -> Llama:
        """The whole, on the default device."""
        weights: dict[str, Any] = {}
        for name in named_leaves(abstract_model(self._config)):
            count = len(self._firsts) if name.startswith(STACKED) else 1
            runs = [jax.tree.map(jax.device_put, self._buffers.pop((name, run))) for run in range(count)]
            weights[name] = LayerRuns(tuple(runs)) if count > 1 else runs[0]
        return model_from(weights, self._config)
