"""Peak resident memory of `llamajax convert` on a random model of a preset's shape, beside the model's size.

    python benchmarks/convert_memory.py --preset=tinyllama-1.1b

Writes a Hugging Face folder of random bfloat16 weights (sharded like published ones), converts it to our own format in
a separate process, and prints the peak memory that the operating system reports for that process.
"""

import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import app, flags
from safetensors.numpy import save_file

from llamajax.config import preset
from llamajax.families import config_to_hf, tensors
from llamajax.parameters import specs

flags.DEFINE_string("preset", "tinyllama-1.1b", "shape of the model")
flags.DEFINE_string("scratch", None, "folder for the temporary files; the system's default if not given")

_SHARD_BYTES = 1 << 30


def write_random_model(name: str, folder: Path) -> None:
    """Writes a sharded Hugging Face folder with weights drawn from a normal distribution."""
    config = preset(name)
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    file = "model-00000.safetensors"
    for theirs, (place,) in tensors(config, "huggingface").items():
        spec = specs(config)[place]
        shape = spec.shape(config)[::-1] if spec.transposed else spec.shape(config)
        shard[theirs] = (generator.standard_normal(shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        weight_map[theirs] = file
        if sum(array.nbytes for array in shard.values()) >= _SHARD_BYTES:
            save_file(shard, folder / file, metadata={"format": "pt"})
            shard, file = {}, f"model-{len(set(weight_map.values())):05}.safetensors"
    if shard:
        save_file(shard, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))


def main(argv):
    """Writes the model, converts it and prints the peak."""
    del argv
    name = flags.FLAGS.preset
    with tempfile.TemporaryDirectory(dir=flags.FLAGS.scratch) as scratch:
        source, target = Path(scratch, "hf"), Path(scratch, "converted")
        command = [sys.executable, "-m", "llamajax", "convert", f"--model={source}", f"--output={target}"]
        # In a separate process: memory that this one holds when it starts the conversion would count as the child's.
        writer = multiprocessing.get_context("spawn").Process(target=write_random_model, args=(name, source))
        writer.start()
        writer.join()
        written = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        subprocess.run(command, check=True)
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        note = "" if peak > written else " (an upper bound: writing the random weights took as much)"
        print(f"{name}: {size / 2**30:.2f} GiB of weights, peak {peak / 2**20:.2f} GiB{note}")


if __name__ == "__main__":
    app.run(main)
