"""Makes a TensorFlow SavedModel from a bundle: one signature per program, the packed weights as variables.

    python export/targets/to_savedmodel.py BUNDLE FOLDER savedmodel

Each signature holds the bundle's StableHLO unchanged, in TensorFlow's XlaCallModule operation. Neither jax nor llamajax
is needed. Shapes, names and dtypes are those of the manifest. TensorFlow's XLA runs the programs.
"""

import json
import os
import sys
from pathlib import Path

# Otherwise TensorFlow logs its findings to stderr, among this script's errors. oneDNN and GPUs are not needed here.
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", TF_ENABLE_ONEDNN_OPTS="0", CUDA_VISIBLE_DEVICES="-1")

import numpy as np

# The version of XlaCallModule. The newest, 10, adds only another partitioner, and older TensorFlow refuses it.
_CALL_VERSION = 9
_DTYPES = {"F32": "float32", "F16": "float16", "U8": "uint8", "I32": "int32"}


def read_manifest(bundle: Path) -> dict:
    """Reads the manifest of a bundle.

    Raises:
        ValueError: if its format is not supported, or its programs take weights in the layout of a backend.
    """
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    kind, version = manifest.get("format"), manifest.get("version")
    if (kind, version) != ("llamajax-bundle", 1):
        raise ValueError(f"{bundle}: format {kind!r} version {version!r}: expected 'llamajax-bundle' version 1")
    if "prepare" in manifest["programs"]:
        raise ValueError(f"{bundle}: profile {manifest['profile']!r}: expected packed weights: --profile=scanned")
    return manifest


def read_weights(bundle: Path, manifest: dict) -> list[np.ndarray]:
    """Reads the arrays that are the programs' first arguments, in order, mapped into memory."""
    file = bundle / "weights.safetensors"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    data, arrays = np.memmap(file, np.uint8, "r", offset=8 + length), []
    for weight in manifest["weights"]:
        entry = header[weight["name"]]
        first, last = entry["data_offsets"]
        if entry["dtype"] == "BF16":
            import ml_dtypes

            dtype = np.dtype(ml_dtypes.bfloat16)
        else:
            dtype = np.dtype(_DTYPES[entry["dtype"]])
        arrays.append(data[first:last].view(dtype).reshape(entry["shape"]))
    return arrays


def save(bundle: Path, folder: Path) -> list[str]:
    """Writes the SavedModel.

    Args:
        bundle: the folder of the bundle.
        folder: the folder to write.

    Returns:
        The names of the signatures, which are those of the bundle's programs.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if the folder is no bundle.
    """
    import tensorflow as tf
    from tensorflow.compiler.tf2xla.python import xla

    manifest = read_manifest(bundle)
    module = tf.Module()
    # Weights in variables are stored once for all signatures, and nothing unpacks them beforehand.
    module.weights = [tf.Variable(array, trainable=False) for array in read_weights(bundle, manifest)]

    def signature(program: dict) -> tf.types.experimental.ConcreteFunction:
        artifact, outputs = (bundle / program["file"]).read_bytes(), program["outputs"]

        def run(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
            arguments = module.weights if program["weights"] == "packed" else []
            results = xla.call_module(
                [*arguments, *(inputs[value["name"]] for value in program["inputs"])],
                version=_CALL_VERSION,
                module=artifact,
                # The programs do not depend on the platform; naming several platforms would add an argument.
                platforms=("CPU",),
                disabled_checks=(xla.call_module_disable_check_platform(),),
                Tout=[value["dtype"] for value in outputs],
                Sout=[value["shape"] for value in outputs],
            )
            return {value["name"]: result for value, result in zip(outputs, results, strict=True)}

        specs = {v["name"]: tf.TensorSpec(v["shape"], v["dtype"], name=v["name"]) for v in program["inputs"]}
        return tf.function(run, autograph=False).get_concrete_function(**specs)

    signatures = {name: signature(program) for name, program in manifest["programs"].items()}
    tf.saved_model.save(module, str(folder), signatures=signatures)
    return list(signatures)


def main(argv: list[str]) -> None:
    """Converts a bundle, and prints the target's entry for the manifest as one JSON object."""
    if len(argv) != 4 or argv[3] != "savedmodel":
        sys.exit(f"{' '.join(argv[1:])}: expected BUNDLE FOLDER savedmodel")
    folder = Path(argv[2])
    try:
        import tensorflow as tf

        save(Path(argv[1]), folder)
    except Exception as error:  # whatever the toolchain raises becomes one line
        sys.exit(" ".join(f"savedmodel: {type(error).__name__}: {error}".split()))
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    print(json.dumps({"target": "savedmodel", "files": files, "versions": {"tensorflow": tf.__version__}}))


if __name__ == "__main__":
    main(sys.argv)
