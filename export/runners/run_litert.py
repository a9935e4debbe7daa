"""Runs a bundle's LiteRT file (`targets/litert`) with nothing but ai-edge-litert and NumPy."""

import importlib.metadata

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from export.runners.runner import main


class Session:
    """The file holds the weights; the state enters and leaves the interpreter as NumPy arrays."""

    def __init__(self, bundle):
        self.name = f"ai-edge-litert {importlib.metadata.version('ai-edge-litert')}"
        if "litert" not in bundle.manifest["targets"]:
            raise SystemExit(f"{bundle.path}: no LiteRT file: expected an export with --profile=float --target=litert")
        (file,) = bundle.manifest["targets"]["litert"]["files"]
        self._bundle, self._programs = bundle, {}
        self._interpreter = Interpreter(bundle.file(file))

    def reset(self):
        self._state = {value["name"]: np.zeros(value["shape"], value["dtype"]) for value in self._bundle.state}

    def run(self, name, inputs):
        if name not in self._programs:
            self._programs[name] = self._interpreter.get_signature_runner(name)
        results = self._programs[name](**inputs, **self._state)
        self._state = {key: results[key] for key in self._state}
        return results["logits"]


if __name__ == "__main__":
    main(Session, __doc__)
