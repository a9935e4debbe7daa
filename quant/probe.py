"""`Probe`: a weight that notes what it is multiplied with. This is how calibration sees a layer's inputs."""

import dataclasses
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """A leaf that stands where a weight stood, for one trace of a function.

        seen = {}
        probed = jax.tree.map(lambda weight: Probe(weight, "up", seen), layer)
        y = layer_function(probed, x)      # seen["up"] is now the input of that weight, as a value of this trace

    Attributes:
        weight: what it stands for; `product` uses it as it would without the probe.
        name: key in `seen`.
        seen: dictionary that `product` puts the activations in. Under jit make it inside the traced function.
        added: None, or what `product` adds to its result, of the result's shape: zeros with respect to which a function
            is differentiated give the gradient of that result.
    """

    weight: Any
    name: str = dataclasses.field(metadata={"static": True})
    seen: dict[str, jax.Array] = dataclasses.field(metadata={"static": True})
    added: jax.Array | None = None
