"""Conversion streams weights: peak memory is little more than the weights. `benchmarks/` measures 1.1B weights."""

import gc
import json
import os
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llamajax import Llama
from llamajax.checkpoint import Opened, open_checkpoint, save_checkpoint
from llamajax.checkpoint.source import Source, float_weights
from llamajax.config import Config
from llamajax.families import config_to_hf, tensors
from llamajax.parameters import Place, named_arrays, weights_of
from llamajax.quantization.quantize import quantize
from quant.recipe import Rule

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


def write_model(folder: Path, width: int) -> int:
    """Writes a Hugging Face folder in bfloat16, in two shards; returns the number of bytes of its weights."""
    config = Config(
        vocab_size=512,
        width=width,
        ffn_width=4 * width,
        num_layers=16,
        num_heads=4,
        num_kv_heads=4,
        head_size=width // 4,
        context_length=64,
    )
    matrices = {"q": (1, 1), "k": (1, 1), "v": (1, 1), "o": (1, 1), "gate": (4, 1), "up": (4, 1), "down": (1, 4)}
    shards: list[dict[str, np.ndarray]] = [{}, {}]
    for name, ((_, layer),) in tensors(config, "huggingface").items():
        shape: tuple[int, ...] = (width,)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            shape = (512, width)
        elif name.endswith("_proj.weight"):
            rows, columns = matrices[name.split(".")[-2].removesuffix("_proj")]
            shape = (rows * width, columns * width)
        shards[(layer or 0) % 2][name] = np.full(shape, 0.01, ml_dtypes.bfloat16)
    folder.mkdir()
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"{number}.safetensors")
    weight_map = {name: f"{number}.safetensors" for number, shard in enumerate(shards) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config_to_hf(config)))
    return sum(array.nbytes for shard in shards for array in shard.values())


def peak_of(command: str, source: Path, target: Path, option: str) -> int:
    """Runs a `llamajax` command in its own process; returns its peak resident bytes, as the kernel counts them."""
    script = (
        "import sys; from llamajax.cli import main\n"
        f"code = main(['{command}', '--model={source}', '{option}', '--output={target}'])\n"
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1]); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", ["llamajax", "huggingface", "gguf"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc for a process's peak memory")
def test_conversion_holds_the_weights_once(form: str, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", 64)
    large = write_model(tmp_path / "large", 896)
    assert large > 380 * MIB
    base = peak_of("convert", tmp_path / "small", tmp_path / f"small.{form}", f"--to={form}") - small
    extra = peak_of("convert", tmp_path / "large", tmp_path / f"large.{form}", f"--to={form}") - base - large
    # One layer's tensor takes 6 MiB, all layers' 98 MiB; a second copy of the weights would take 394 MiB.
    most = {"llamajax": 290, "huggingface": 40, "gguf": 40}[form]
    assert extra < most * MIB, f"{extra / MIB:.0f} MiB beyond the weights"


@pytest.mark.parametrize("form", ["huggingface", "gguf"])
def test_writing_holds_one_tensor(form: str, tmp_path: Path) -> None:
    """Saving a model to one shard allocates one tensor at a time, by tracemalloc (NumPy reports its arrays to it)."""
    write_model(tmp_path / "source", 64)
    opened = open_checkpoint(tmp_path / "source")
    model = opened.read(shardings="host")
    largest = max(leaf.nbytes // (16 if name.startswith("layers") else 1) for name, leaf in named_arrays(model).items())
    tracemalloc.start()
    try:
        save_checkpoint(model, tmp_path / f"out.{form}", form=form)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in named_arrays(model).values()) > 2 * MIB
    assert peak < largest + MIB // 2, f"{peak / MIB:.2f} MiB for tensors of at most {largest / MIB:.2f}"


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc for a process's peak memory")
def test_quantizing_holds_the_result_and_weights_in_work(tmp_path: Path) -> None:
    """Quantizing takes the result, what a small model's process takes (JAX, its programs) and three weights in work."""
    write_model(tmp_path / "small", 64)
    write_model(tmp_path / "large", 896)
    base = peak_of("quantize", tmp_path / "small", tmp_path / "small-out", "--recipe=int4-g32")
    peak = peak_of("quantize", tmp_path / "large", tmp_path / "large-out", "--recipe=int4-g32")
    result = sum(file.stat().st_size for file in (tmp_path / "large-out").rglob("*") if file.is_file())
    extra = peak - base - result
    # One layer's weight takes 6 MiB, the model 394 MiB. With parts four times as large, 78 MiB were measured here.
    assert extra < 60 * MIB, f"{extra / MIB:.0f} MiB beyond the result"


def test_few_weights_are_read_ahead(tiny_model: Llama) -> None:
    """However many weights a model has, few are alive at a time: each is released once it is packed."""
    weights, alive, most = weights_of(tiny_model), 0, 0

    def released() -> None:
        nonlocal alive
        alive -= 1

    def read(place: Place) -> np.ndarray:
        nonlocal alive, most
        array = np.array(weights[place])
        weakref.finalize(array, released)
        alive += 1
        most = max(most, alive)
        return array

    source = Source("", tiny_model.config, float_weights(tiny_model.config, np.float32), tuple(weights), read)
    opened = Opened(Path("x"), source, None)
    quantize(opened, (Rule(weights="*norm*", keep=True), Rule(weights="*", scheme="int4", group_size=8)))
    gc.collect()
    assert len(weights) > 15 and most <= 10
