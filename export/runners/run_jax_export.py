"""Runs a bundle's `jax.export` programs: any batch, cache size and prompt length. Needs jax and flatbuffers."""

import jax
import jax.export
import numpy as np

from export.runners.runner import main

# GPUs and TPUs round the factors of products to TensorFloat-32 and bfloat16.
ROUNDING_OF_PRODUCTS = {"gpu": 2.0**-11, "tpu": 2.0**-8}


class Session:
    """Weights and state on the first device; jax compiles once for each shape."""

    def __init__(self, bundle):
        self.name = f"jax.export {jax.__version__}"
        self.product = ROUNDING_OF_PRODUCTS.get(jax.default_backend(), 0.0)
        self._bundle, self._programs = bundle, {}
        arrays = bundle.tensors("weights.safetensors")
        self._weights = [jax.device_put(arrays[weight["name"]]) for weight in bundle.manifest["weights"]]
        for name, file in bundle.manifest["jax"].items():
            with open(bundle.file(file), "rb") as opened:
                exported = jax.export.deserialize(bytearray(opened.read()))
            count = len(exported.in_avals)
            state = range(count - len(bundle.state), count)
            self._programs[name] = jax.jit(exported.call, donate_argnums=tuple(state))

    def reset(self):
        self._state = [jax.numpy.zeros(value["shape"], value["dtype"]) for value in self._bundle.state]

    def run(self, name, inputs):
        program = self._programs[name.partition("_")[0]]
        logits, *self._state = program(*self._weights, *inputs.values(), *self._state)
        return np.asarray(logits)


if __name__ == "__main__":
    main(Session, __doc__)
