"""Runs a bundle with ONNX Runtime, from the target made by export/targets/to_onnx.py: `targets/onnx/`."""

import os

import numpy as np
import onnxruntime

from export.runners.runner import main


class Session:
    """A program is loaded when it is first run. State into which programs only write slices is updated in place."""

    def __init__(self, bundle):
        self.name = f"onnxruntime {onnxruntime.__version__}"
        target = bundle.manifest["targets"].get("onnx", {"files": []})
        self._files = {os.path.basename(name): bundle.file(name) for name in target["files"]}
        # Manifests of the first releases lack this entry: their keys and values are updated in place.
        self._in_place = target.get("in_place", ["key", "value"])
        self._programs, self._bundle, self._options = {}, bundle, onnxruntime.SessionOptions()
        # Constant folding would unpack the weights that the program itself dequantizes.
        self._options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")

    def reset(self):
        make = lambda value: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(value["shape"], value["dtype"]))  # noqa: E731
        self._state = {value["name"]: [make(value)] for value in self._bundle.state}
        for value in self._bundle.state:
            if value["name"] not in self._in_place:
                self._state[value["name"]].append(make(value))

    def run(self, name, inputs):
        if name not in self._programs:
            file = self._files.get(f"{name}.onnx")
            if file is None:
                raise SystemExit(f"{name}.onnx is not in the bundle: export it with the target onnx")
            if os.path.getsize(self._files["weights.bin"]) > 256 << 20:
                self._programs.clear()  # each program has its own copy of the weights: keep one
            self._programs[name] = onnxruntime.InferenceSession(file, self._options, ["CPUExecutionProvider"])
        binding = self._programs[name].io_binding()
        for key, array in inputs.items():
            binding.bind_cpu_input(key, array)
        for key, values in self._state.items():
            # In place, input and output share memory: one last node writes all slices and copies nothing else. Other
            # state alternates between two buffers: a program may write the new value before it has read all of the old.
            binding.bind_ortvalue_input(key, values[0])
            binding.bind_ortvalue_output(f"{key}_out", values[-1])
            values.reverse()
        binding.bind_output("logits")
        self._programs[name].run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()


if __name__ == "__main__":
    main(Session, __doc__)
