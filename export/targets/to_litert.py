"""Makes a LiteRT (TensorFlow Lite) file from a bundle: one signature for each program, the packed weights once.

    python export/targets/to_litert.py BUNDLE FOLDER litert

The script first makes a SavedModel from the bundle. The converter turns its StableHLO into LiteRT's own operations, so
any build of the interpreter runs the file, without a delegate. LiteRT has no shifts on bytes, and the converter would
store weights that are unpacked through integers as floats; therefore the bundle needs the profile "float".
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import to_savedmodel

# Largest ratio of the file to the packed weights. Beyond it, weights were unpacked: 4-bit codes become 8 times as large
# when they are stored as floats.
_LARGEST_RATIO = 2
_GRAPH_BYTES = 4 << 20


def convert(bundle: Path, file: Path) -> None:
    """Writes the file.

    Args:
        bundle: the folder of the bundle.
        file: the file to write.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if the folder is no bundle, the bundle has another profile, or the weights did not stay packed.
    """
    import tensorflow as tf

    profile = to_savedmodel.read_manifest(bundle)["profile"]
    if profile != "float":
        raise ValueError(f"{bundle}: profile {profile!r}: LiteRT unpacks in floats: export it with --profile=float")
    with tempfile.TemporaryDirectory() as folder:
        signatures = to_savedmodel.save(bundle, Path(folder))
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=signatures)
        data = converter.convert()
    packed = (bundle / "weights.safetensors").stat().st_size
    if len(data) > _LARGEST_RATIO * packed + _GRAPH_BYTES:
        raise ValueError(f"{len(data)} bytes for {packed} bytes of weights: the converter unpacked or repeated them")
    file.write_bytes(data)


def main(argv: list[str]) -> None:
    """Converts a bundle, and prints the target's entry for the manifest as one JSON object."""
    if len(argv) != 4 or argv[3] != "litert":
        sys.exit(f"{' '.join(argv[1:])}: expected BUNDLE FOLDER litert")
    try:
        import tensorflow as tf

        convert(Path(argv[1]), Path(argv[2]) / "model.tflite")
    except Exception as error:  # whatever the toolchain raises becomes one line
        sys.exit(" ".join(f"litert: {type(error).__name__}: {error}".split()))
    print(json.dumps({"target": "litert", "files": ["model.tflite"], "versions": {"tensorflow": tf.__version__}}))


if __name__ == "__main__":
    main(sys.argv)
