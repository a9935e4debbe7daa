"""Runs a bundle's SavedModel (`targets/savedmodel`) with nothing but TensorFlow."""

import os

# Otherwise TensorFlow logs its findings to stderr. XLA runs the programs, not oneDNN.
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0")

import tensorflow as tf

from export.runners.runner import main


class Session:
    """Weights are the SavedModel's variables; XLA compiles a signature when it is first run."""

    def __init__(self, bundle):
        self.name = f"tensorflow {tf.__version__}"
        if "savedmodel" not in bundle.manifest["targets"]:
            raise SystemExit(f"{bundle.path}: no SavedModel: expected an export with --target=savedmodel")
        files = bundle.manifest["targets"]["savedmodel"]["files"]
        graph = next(bundle.file(name) for name in files if name.endswith("saved_model.pb"))
        self._bundle = bundle
        self._model = tf.saved_model.load(os.path.dirname(graph))

    def reset(self):
        make = lambda value: tf.zeros(value["shape"], value["dtype"])  # noqa: E731
        self._state = {value["name"]: make(value) for value in self._bundle.state}

    def run(self, name, inputs):
        tensors = {key: tf.constant(value) for key, value in inputs.items()}
        results = self._model.signatures[name](**tensors, **self._state)
        self._state = {key: results[key] for key in self._state}
        return results["logits"].numpy()


if __name__ == "__main__":
    main(Session, __doc__)
