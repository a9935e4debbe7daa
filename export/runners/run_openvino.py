"""Runs a bundle with OpenVINO, from the same files as run_onnx.py: `targets/onnx/`."""

import os

import numpy as np
import openvino

from export.runners.runner import main


class Session:
    """A program is compiled when it is first run. The state alternates between two buffers, read and written."""

    def __init__(self, bundle):
        self.name = f"openvino {openvino.__version__.partition('-')[0]}"
        files = bundle.manifest["targets"].get("onnx", {"files": []})["files"]
        self._files = {os.path.basename(name): bundle.file(name) for name in files}
        self._core, self._programs, self._bundle = openvino.Core(), {}, bundle

    def reset(self):
        make = lambda value: openvino.Tensor(np.zeros(value["shape"], value["dtype"]))  # noqa: E731
        self._state = {value["name"]: (make(value), make(value)) for value in self._bundle.state}

    def run(self, name, inputs):
        if name not in self._programs:
            file = self._files.get(f"{name}.onnx")
            if file is None:
                raise SystemExit(f"{name}.onnx is not in the bundle: export it with the target onnx")
            # Activations stay float32: by default some CPUs round them to bfloat16 or 8 bits.
            options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
            self._programs[name] = self._core.compile_model(file, "CPU", options).create_infer_request()
        request = self._programs[name]
        for key, (read, written) in self._state.items():
            request.set_tensor(key, read)
            request.set_tensor(f"{key}_out", written)
            self._state[key] = (written, read)
        for key, array in inputs.items():
            request.set_tensor(key, openvino.Tensor(array))
        request.infer()
        return request.get_tensor("logits").data.copy()


if __name__ == "__main__":
    main(Session, __doc__)
