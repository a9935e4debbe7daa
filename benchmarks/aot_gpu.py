"""Compiler reports for products with quantized weights on NVIDIA GPUs, compiled without the hardware.

    pip install jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2
    python benchmarks/aot_gpu.py [--json] [--cards=h100]

For the Triton kernel and for XLA's own product (dequantize, then `dot`), prints the size of temporaries beside the
packed bytes. Temporaries are written and read again, so decoding by XLA moves at least (packed + 2 * temporaries). If
CUDA's `ptxas` is installed, it also prints the kernel's registers and spills. This shows that the programs lower and
assemble. It does not show that they run, what autotuning would choose (it is off), or how long anything takes.
"""

import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# This script only compiles: it does not use an attached GPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import SingleDeviceSharding

import quant
from export.targets.ahead_of_time import CARDS, topology_of
from quant.kernels import gpu

_ARCHITECTURES = {"h100": "sm_90a", "a100": "sm_80"}
_LAYERS = 4
_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 11008))

flags.DEFINE_list("cards", list(CARDS), "cards to compile for")
flags.DEFINE_boolean("json", False, "print JSON")


class Row(NamedTuple):
    """One product. Temporaries are multiples of the packed bytes. Registers and spills are -1 without `ptxas`."""

    card: str
    scheme: str
    group_size: int
    K: int
    M: int
    R: int
    packed_bytes: int
    kernel: float
    xla: float
    registers: int
    spilled_bytes: int


def few(x_RK: jax.Array, weight: gpu.GpuWeight, layer: jax.Array) -> jax.Array:
    """Multiplies with one layer of a stack by `matmul`."""
    return gpu.matmul(x_RK, weight.at_layer(layer))


def written_out(x_RK: jax.Array, weight: gpu.GpuWeight, layer: jax.Array) -> jax.Array:
    """The same product by XLA alone, with the weight in the dtype of the activations."""
    weight_KM = quant.dequantize(gpu.restore(weight.at_layer(layer)), x_RK.dtype)
    return jnp.dot(x_RK, weight_KM, preferred_element_type=jnp.float32)


def assemble(card: str, folder: Path) -> tuple[int, int]:
    """Returns registers and spilled bytes of the kernel in a folder of XLA's intermediate files; -1 without `ptxas`."""
    files = [file for file in folder.glob("*.ptx") if ".entry _kernel" in file.read_text()]
    if not files or shutil.which("ptxas") is None:
        return -1, -1
    command = ["ptxas", "-v", f"-arch={_ARCHITECTURES[card]}", str(files[0]), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    spills = re.findall(r"(\d+) bytes spill", report)
    return int(re.findall(r"Used (\d+) registers", report)[0]), sum(map(int, spills))


def measure(card: str, device: Any, scheme: str, group_size: int, K: int, M: int, R: int) -> Row:
    """Compiles the kernel and XLA's product."""

    def make(weight: jax.Array) -> gpu.GpuWeight:
        return gpu.layout(quant.quantize_rtn(weight, scheme, group_size=group_size, scale_dtype=jnp.bfloat16))

    weight = jax.eval_shape(make, jax.ShapeDtypeStruct((_LAYERS, K, M), jnp.float32))
    packed = weight.nbytes // _LAYERS
    args = (jax.ShapeDtypeStruct((R, K), jnp.bfloat16), weight, jax.ShapeDtypeStruct((), jnp.int32))
    sharding = SingleDeviceSharding(device)
    args = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), args)
    with tempfile.TemporaryDirectory() as folder:
        kernel = jax.jit(few).lower(*args).compile({"xla_dump_to": folder})
        assembled = assemble(card, Path(folder))
    xla = jax.jit(written_out).lower(*args).compile()
    temporaries = [program.memory_analysis().temp_size_in_bytes / packed for program in (kernel, xla)]
    return Row(card, scheme, group_size, K, M, R, packed, *temporaries, *assembled)


def main(argv: list[str]) -> None:
    """Compiles all products and prints the table."""
    del argv
    rows = []
    if not flags.FLAGS.json:
        print("card  codes    g      K x     M   R     packed   temporaries / packed: kernel, XLA; registers, spills")
    for card in flags.FLAGS.cards:
        topology = topology_of(f"cuda:{card}")
        for scheme, group_size in (("int4", 32), ("int4", 128), ("uint4", 128), ("int8", 128)):
            for K, M in _SHAPES:
                for R in (1, 8):
                    row = measure(card, topology.devices[0], scheme, group_size, K, M, R)
                    rows.append(row)
                    if not flags.FLAGS.json:
                        shape = f"{row.scheme:5}{row.group_size:5}{row.K:7} x{row.M:6}{row.R:4}"
                        sizes = f"{row.packed_bytes / 2**20:9.2f} MiB {row.kernel:8.3f} {row.xla:7.2f}"
                        print(f"{card:5} {shape}{sizes} {row.registers:8} {row.spilled_bytes:4}", flush=True)
    if flags.FLAGS.json:
        print(json.dumps([row._asdict() for row in rows]))


if __name__ == "__main__":
    app.run(main)
