"""Quantizing a 1.1B model to 4 bits, llamajax beside llama.cpp: time, memory and bytes; then decoding from the result.

    pip install 'llamajax[llamacpp]'
    python benchmarks/quantize_1b.py --rounds=3

Writes random bfloat16 weights of a preset's shape as a Hugging Face folder and as GGUF, and quantizes them in separate
processes, in turn: llamajax to int4-g32, llama.cpp with 2 threads to Q4_0. Both have 4.5 bits per weight, except that
llama.cpp gives an untied head more. Time is that of whole processes, memory is what the operating system reports for
them. Most of llama.cpp's memory is pages of its input, which it maps.
"""

import json
import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from absl import app, flags
from convert_memory import write_random_model  # and its flags --preset and --scratch
from gguf_files import tensors_of, write_gguf
from safetensors import safe_open

from llamajax.cli.sizes import readable_bytes, stored_bytes
from llamajax.config import Config, preset

flags.DEFINE_integer("rounds", 3, "number of times that each program quantizes; medians are printed", lower_bound=1)
flags.DEFINE_string("folder", None, "folder that keeps the two models for later runs; a temporary folder if not given")

RECIPE, KIND = "int4-g32", "Q4_0"
QUANTIZING_THREADS = 2
_BITS = 4.5  # per weight of the recipe: 4, and a float16 scale per 32 weights

# The program of llama.cpp's process, with as little Python as possible.
_LLAMACPP = f"""
import ctypes, sys, llama_cpp
llama_cpp._logger.set_verbose(False)
params = llama_cpp.llama_model_quantize_default_params()
params.nthread, params.ftype = {QUANTIZING_THREADS}, llama_cpp.LLAMA_FTYPE_MOSTLY_{KIND}
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""

# Decodes as `llamajax generate` does on a CPU; from ids, because random weights have no tokenizer.
_DECODE = """
import sys, llamajax
model, _ = llamajax.load(sys.argv[1], dtype="float32")
completion = llamajax.generate(model, None, [1, 2, 3], max_new_tokens=8, temperature=0, seed=0)
"""


class Run(NamedTuple):
    """The time and memory of one process."""

    seconds: float
    peak_bytes: int


def write_models(name: str, folder: Path) -> None:
    """Writes the same random weights as `huggingface/` and as `bfloat16.gguf`, the second from the first."""
    config = preset(name)
    source = folder / "huggingface"
    shutil.rmtree(source, ignore_errors=True)  # The rest of an interrupted run.
    write_random_model(name, source)
    files = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]

    def read(place, theirs):
        del place
        with safe_open(source / files[theirs], framework="np", backend="pread") as tensors:
            return tensors.get_tensor(theirs)

    write_gguf(folder / "unfinished.gguf", config, read, "BF16")
    (folder / "unfinished.gguf").rename(folder / "bfloat16.gguf")


def measured(command: list[str]) -> Run:
    """Runs a command to its end.

    A child's peak is at least the memory of this process at its start, so this process holds nothing large.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"exit code {process.returncode}: {' '.join(command)}")
    return Run(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def promised_bytes(config: Config) -> int:
    """Returns the bytes of our recipe's weights: 4.5 bits each, norms 16."""
    vectors = (2 * config.num_layers + 1) * config.width
    return math.ceil((config.num_parameters - vectors) * _BITS / 8) + 2 * vectors


def quantize_in_turn(folder: Path, scratch: Path, rounds: int) -> tuple[list[Run], list[Run]]:
    """Runs both programs in turn for all rounds; the last results stay in `scratch`."""
    ours, theirs = [], []
    for done in range(rounds):
        shutil.rmtree(scratch / "packed", ignore_errors=True)
        source, target = f"--model={folder / 'huggingface'}", f"--output={scratch / 'packed'}"
        ours.append(measured([sys.executable, "-m", "llamajax", "quantize", source, f"--recipe={RECIPE}", target]))
        (scratch / "packed.gguf").unlink(missing_ok=True)
        source, target = str(folder / "bfloat16.gguf"), str(scratch / "packed.gguf")
        theirs.append(measured([sys.executable, "-c", _LLAMACPP, source, target]))
        print(f"round {done + 1}: {ours[-1].seconds:.1f} s, {theirs[-1].seconds:.1f} s", file=sys.stderr)
    return ours, theirs


def table(config: Config, ours: list[Run], theirs: list[Run], scratch: Path) -> str:
    """Returns a Markdown table: medians, and ours divided by theirs."""
    promised = promised_bytes(config), tensors_of(scratch / "packed.gguf")[1]
    written = stored_bytes(scratch / "packed"), (scratch / "packed.gguf").stat().st_size
    seconds = [statistics.median(run.seconds for run in runs) for runs in (ours, theirs)]
    peaks = [statistics.median(run.peak_bytes for run in runs) for runs in (ours, theirs)]
    lines = [f"| | llamajax {RECIPE} | llama.cpp {KIND} | ratio |", "|---|---|---|---|"]
    lines.append(f"| wall time, s | {seconds[0]:.1f} | {seconds[1]:.1f} | {seconds[0] / seconds[1]:.2f} |")
    for label, (mine, other) in (
        ("peak resident memory", peaks),
        ("bytes written", written),
        ("bytes that the format promises", promised),
    ):
        lines.append(f"| {label} | {readable_bytes(mine)} | {readable_bytes(other)} | {mine / other:.2f} |")
    return "\n".join(lines)


def main(argv):
    """Writes the models, quantizes them in turn, decodes, and prints."""
    del argv
    name = flags.FLAGS.preset
    config = preset(name)
    with tempfile.TemporaryDirectory(dir=flags.FLAGS.scratch) as scratch:
        folder = Path(flags.FLAGS.folder or scratch, name)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "bfloat16.gguf").exists():
            # In a separate process: memory of this process would count as its children's.
            writer = multiprocessing.get_context("spawn").Process(target=write_models, args=(name, folder))
            writer.start()
            writer.join()
            if writer.exitcode:
                sys.exit(f"writing {folder} failed")
        ours, theirs = quantize_in_turn(folder, Path(scratch), flags.FLAGS.rounds)
        decoding = measured([sys.executable, "-c", _DECODE, str(Path(scratch, "packed"))])
        print(f"{name}, {config.num_parameters:,} weights, medians of {len(ours)}\n")
        print(table(config, ours, theirs, Path(scratch)))
    print(
        f"\nLoading the packed weights and decoding 8 tokens: peak {readable_bytes(decoding.peak_bytes)}, "
        f"{decoding.seconds:.1f} s; the bfloat16 weights take {readable_bytes(2 * config.num_parameters)}."
    )


if __name__ == "__main__":
    app.run(main)
