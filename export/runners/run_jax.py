"""Runs a bundle with jax alone: its portable StableHLO programs are passed to XLA unchanged."""

import jax
import numpy as np
from jax.extend import backend
from jaxlib import _jax
from jaxlib.mlir.dialects import stablehlo

from export.runners.runner import main

# The XLA options that bundles use. Other options can write or load files.
OPTIONS = {"xla_cpu_prefer_vector_width": ["512"]}
# GPUs and TPUs round the factors of products to TensorFloat-32 and bfloat16.
ROUNDING_OF_PRODUCTS = {"gpu": 2.0**-11, "tpu": 2.0**-8}


class Session:
    """Weights and state on the first device; a program is compiled when it is first run."""

    def __init__(self, bundle):
        for name, value in bundle.manifest["compiler_options"].items():
            if value not in OPTIONS.get(name, []):
                raise SystemExit(f"{bundle.path}: compiler option {name}={value!r}: expected one of {OPTIONS}")
        self.name = f"jax {jax.__version__}"
        self._bundle, self._programs = bundle, {}
        self._client, self._device = backend.get_backend(), jax.devices()[0]
        self.product = ROUNDING_OF_PRODUCTS.get(self._device.platform, 0.0)
        arrays = bundle.tensors("weights.safetensors")
        names = [weight["name"] for weight in bundle.manifest["weights"]]
        self._weights = [jax.device_put(arrays[name], self._device) for name in names]
        if "prepare" in bundle.manifest["programs"]:
            self._weights = self._execute("prepare", [])

    def reset(self):
        make = lambda value: np.zeros(value["shape"], jax.numpy.dtype(value["dtype"]))  # noqa: E731
        self._state = [jax.device_put(make(value), self._device) for value in self._bundle.state]

    def _execute(self, name, arguments):
        program = self._bundle.manifest["programs"][name]
        if name not in self._programs:
            with open(self._bundle.file(program["file"]), "rb") as file:
                module = stablehlo.deserialize_portable_artifact_str(file.read())
            options = _jax.CompileOptions()
            options.env_option_overrides = list(self._bundle.manifest["compiler_options"].items())
            self._programs[name] = self._client.compile_and_load(module, _jax.DeviceList((self._device,)), options)
        results = self._programs[name].execute_sharded([*self._weights, *arguments])
        return [result[0] for result in results.disassemble_into_single_device_arrays()]

    def run(self, name, inputs):
        arguments = [jax.device_put(array, self._device) for array in inputs.values()]
        logits, *self._state = self._execute(name, [*arguments, *self._state])
        return np.asarray(logits)


if __name__ == "__main__":
    main(Session, __doc__)
