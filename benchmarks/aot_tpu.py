"""XLA's costs of products with quantized weights on each TPU generation, compiled without the hardware.

    pip install libtpu==0.0.52
    python benchmarks/aot_tpu.py [--json] [--generations=v5e,v6e] [--models=tinyllama-1.1b]

Each product multiplies with one layer of a stack in a loop, as the model does. The first table shows the bytes accessed
by XLA's cost model, for XLA's own product and for the kernel, beside the bytes of codes and scales. The cost model
counts VMEM like HBM, and for a kernel it uses the cost that the kernel declares. The second table shows the memory on a
chip of whole decode steps. Nothing is run: this shows that the programs compile and fit, not how long they take.
"""

import json
import os
from typing import Any, NamedTuple

# This script only compiles: it does not use an attached TPU.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import llamajax
import quant
from quant.kernels import tpu

_GENERATIONS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
_LAYERS = 4
_SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 11008))
_SLOTS = 2048

flags.DEFINE_list("generations", list(_GENERATIONS), "TPU generations to compile for")
flags.DEFINE_list("models", ["tinyllama-1.1b", "llama3-8b"], "presets whose decode step is compiled; may be empty")
flags.DEFINE_boolean("json", False, "print JSON")


class Product(NamedTuple):
    """One product. Bytes are those of one layer; `xla` and `kernel` are bytes accessed in units of them."""

    generation: str
    scheme: str
    group_size: int
    K: int
    M: int
    R: int
    packed_bytes: int
    xla: float
    kernel: float


class Step(NamedTuple):
    """One decode step of a model: the bytes of its weights, of the program's arguments and of its temporaries."""

    generation: str
    model: str
    batch: int
    weight_bytes: int
    argument_bytes: int
    temporary_bytes: int


def compile_for(device: Any, function: Any, *args: Any, donate: tuple[int, ...] = ()) -> Any:
    """Compiles a function for abstract arguments on one device."""
    sharding = SingleDeviceSharding(device)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.jit(function, donate_argnums=donate).lower(*jax.tree.map(place, args)).compile()


def abstract_weight(shape: tuple[int, ...], scheme: str, group_size: int, axis: int, kernel: bool = True) -> Any:
    """Returns the shapes and dtypes of a weight in the TPU layout."""

    def make(weight: jax.Array) -> tpu.TpuWeight:
        quantized = quant.quantize_rtn(weight, scheme, group_size=group_size, axis=axis, scale_dtype=jnp.bfloat16)
        return tpu.layout(quantized, kernel=kernel)

    return jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.float32))


def layer_loop(x_RK: jax.Array, weight: tpu.TpuWeight) -> jax.Array:
    """Multiplies with every layer of a stack; each product depends on the one before it."""

    def body(layer: jax.Array, x_RK: jax.Array) -> jax.Array:
        return x_RK + tpu.matmul(x_RK, weight.at_layer(layer))[:, :1].astype(x_RK.dtype)

    return jax.lax.fori_loop(0, _LAYERS, body, x_RK)


def measure_product(generation: str, device: Any, scheme: str, group_size: int, K: int, M: int, R: int) -> Product:
    """Compiles both lowerings. XLA counts the body of a loop once, so the figures are those of one layer."""
    ratio = {}
    x_RK = jax.ShapeDtypeStruct((R, K), jnp.bfloat16)
    for name in ("xla", "kernel"):
        weight = abstract_weight((_LAYERS, K, M), scheme, group_size, -2, name == "kernel")
        packed = weight.nbytes // _LAYERS
        ratio[name] = compile_for(device, layer_loop, x_RK, weight).cost_analysis()["bytes accessed"] / packed
    return Product(generation, scheme, group_size, K, M, R, packed, ratio["xla"], ratio["kernel"])


def abstract_model(name: str) -> Any:
    """A preset with matrices in int4 with groups of 32 in the TPU layout; embeddings and norms stay in bfloat16."""

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        keys = jax.tree_util.keystr(path)
        if "norm" in keys or "embed" in keys:
            return leaf
        return abstract_weight(leaf.shape, "int4", 32, -1 if "head" in keys else -2)

    model = llamajax.abstract_model(llamajax.preset(name), jnp.bfloat16)
    return jax.tree_util.tree_map_with_path(one, model)


def measure_step(generation: str, device: Any, name: str, batch: int) -> Step:
    """Compiles one forward pass of one token per row, with the cache donated."""
    model = abstract_model(name)
    cache = jax.eval_shape(lambda: llamajax.KVCache.empty(model.config, batch, _SLOTS, jnp.bfloat16))
    tokens_BT = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    step = lambda model, tokens_BT, cache: model(tokens_BT, cache)  # noqa: E731
    memory = compile_for(device, step, model, tokens_BT, cache, donate=(2,)).memory_analysis()
    leaves = jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, tpu.TpuWeight))
    weight_bytes = sum(
        leaf.nbytes if isinstance(leaf, tpu.TpuWeight) else leaf.size * leaf.dtype.itemsize for leaf in leaves
    )
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Step(generation, name, batch, weight_bytes, arguments, temporaries)


def print_product(row: Product) -> None:
    """Prints one line of the first table."""
    shape = f"{row.scheme:5}{row.group_size:5}{row.K:7} x{row.M:6}{row.R:4}"
    packed = f"{row.packed_bytes / 2**20:9.2f} MiB"
    print(f"{row.generation:4} {shape}{packed} {row.xla:7.2f} {row.kernel:7.2f}", flush=True)


def print_step(row: Step) -> None:
    """Prints one line of the second table."""
    sizes = [f"{size / 2**30:9.3f}" for size in (row.weight_bytes, row.argument_bytes, row.temporary_bytes)]
    print(f"{row.generation:4} {row.model:16}{row.batch:3} {' '.join(sizes)} GiB", flush=True)


def main(argv: list[str]) -> None:
    """Compiles everything and prints both tables."""
    del argv
    values, products, steps = flags.FLAGS, [], []
    devices = {
        name: topologies.get_topology_desc(_GENERATIONS[name], platform="tpu").devices[0] for name in values.generations
    }
    if not values.json:
        print("TPU  codes    g      K x     M   R     packed    bytes accessed / packed: XLA, kernel")
    for name, device in devices.items():
        for scheme, group_size in (("int4", 32), ("int4", 128), ("int8", 128)):
            for K, M in _SHAPES:
                for R in (1, 8):
                    products.append(measure_product(name, device, scheme, group_size, K, M, R))
                    if not values.json:
                        print_product(products[-1])
    if values.models and not values.json:
        print("\nTPU  decode step     batch  weights arguments temporaries")
    for name, device in devices.items():
        for model in values.models:
            for batch in (1, 8):
                steps.append(measure_step(name, device, model, batch))
                if not values.json:
                    print_step(steps[-1])
    if values.json:
        print(json.dumps({"products": [row._asdict() for row in products], "steps": [row._asdict() for row in steps]}))


if __name__ == "__main__":
    app.run(main)
