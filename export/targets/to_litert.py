"""A LiteRT (TensorFlow Lite) file of a bundle: one signature for each program, the packed weights once.

    python export/targets/to_litert.py BUNDLE FOLDER litert

The way leads over the SavedModel of the same bundle. The converter turns StableHLO into LiteRT's own operations, so any
build of its interpreter runs the file, with no delegate. It has no shifts on bytes and would unpack weights that go
through integers once and for all, into floats: hence the profile "float".
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent))

import to_savedmodel

# Beyond it weights were unpacked: 4-bit codes are 4 times as large in a byte each, 8 times as floats.
_LARGEST_RATIO = 2
_GRAPH_BYTES = 4 << 20


def convert(bundle: Path, file: Path) -> None:
    """Writes the file.

    Args:
        bundle: where to read.
        file: where to write.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if the folder is no bundle, or one of another profile; if the weights did not stay packed.
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
    """Converts, and prints what was made as one JSON object."""
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
