"""`Probe`: a weight that records its inputs. Calibration uses it to see a layer's activations."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A leaf that replaces a weight for one trace of a function.

        seen = {}
        probed = jax.tree.map(lambda weight: Probe(weight, "up", seen), layer)
        y = layer_function(probed, x)      # seen["up"] is now the input of that weight, as a value of this trace

    Attributes:
        weight: the weight; `product` uses it as it would without the probe.
        name: key in `seen`.
        seen: dictionary that `product` stores the activations in. Under jit, make it inside the traced function.
        added: None, or an array that `product` adds to its result, of the result's shape. Differentiating with respect
            to zeros here gives the gradient of that result.
    """

    weight: Any
    name: str = dataclasses.field(metadata={"static": True})
    seen: dict[str, jax.Array] = dataclasses.field(metadata={"static": True})
    added: jax.Array | None = None
