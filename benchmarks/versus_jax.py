"""A decode step of one shape in JAX's usual ways, beside our packed weights: tokens and gigabytes per second.

    python benchmarks/versus_jax.py --shape=tinyllama-1.1b --rounds=5

The same model, cache and program run with random weights in float32, in bfloat16, in int4-g32 as stored (the obvious
code: dequantize, then multiply), and in int4-g32 in the layout of `prepare`. If Qwix is installed (pip install qwix),
its int4 in groups of 32 is measured too: only the products of a step, without attention and without our program. All
are measured in turn. Figures are medians over the rounds; the memory bandwidth is of the same run.
"""

import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

import llamajax
from llamajax.evaluation.speed import measure_decode, memory_bandwidth, random_model
from llamajax.model import abstract_model
from llamajax.parameters import named_arrays

flags.DEFINE_string("shape", "tinyllama-1.1b", "preset of the shape")
flags.DEFINE_integer("rounds", 5, "number of rounds", lower_bound=1)
flags.DEFINE_integer("context", 128, "tokens in the cache", lower_bound=1)
flags.DEFINE_integer("steps", 4, "decode steps per measurement, whose mean is taken", lower_bound=1)
flags.DEFINE_bool("json", False, "print JSON instead of a table")

_RECIPE, _GROUP = "int4-g32", 32


class Way(NamedTuple):
    """One way to do a decode step.

    Attributes:
        label: the name for people.
        once: measures once; returns tokens per second and the bytes that a step reads.
        rates: tokens per second, one value per round.
    """

    label: str
    once: Callable[[], tuple[float, int]]
    rates: list[float]


def model_way(label: str, model: Any) -> Way:
    """Makes the way that runs our program with a model."""

    def once() -> tuple[float, int]:
        options = {"steps": flags.FLAGS.steps, "repeats": 1, "cache_dtype": "float32"}
        measured = measure_decode(model, flags.FLAGS.context, **options)
        return measured.tokens_per_second, measured.bytes_read

    return Way(label, once, [])


def qwix_way(config: llamajax.Config) -> Way:
    """Makes the way that computes the products of a decode step with Qwix's int4, layer after layer."""
    import qwix

    layers = {}
    for name, leaf in named_arrays(abstract_model(config)).items():
        if name.startswith("layers.") and leaf.ndim == 3:
            stack = jnp.stack([_weight(leaf.shape[1:], layer) for layer in range(config.num_layers)])
            layers[name.rsplit(".", 1)[-1]] = _packed(qwix, stack, (0, 2))
    head = _packed(qwix, _weight((config.width, config.vocab_size), 0), (1,))
    product = functools.partial(qwix.dot_general, dimension_numbers=(((1,), (0,)), ((), ())))

    def layer_step(x_BD, layer):
        query, key, value = (product(x_BD, layer[name]) for name in ("query_DQ", "key_DM", "value_DM"))
        x_BD = x_BD + product(query, layer["out_QD"]) + (key + value).mean()
        gate, up = (product(x_BD, layer[name]) for name in ("gate_DF", "up_DF"))
        return x_BD + product(jax.nn.silu(gate) * up, layer["down_FD"]), None

    @jax.jit
    def step(x_BD, layers, head):
        return product(jax.lax.scan(layer_step, x_BD, layers)[0], head)

    x_BD = jnp.ones((1, config.width))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves((layers, head)))
    jax.block_until_ready(step(x_BD, layers, head))

    def once() -> tuple[float, int]:
        start = time.perf_counter()
        for _ in range(flags.FLAGS.steps):
            jax.block_until_ready(step(x_BD, layers, head))
        return flags.FLAGS.steps / (time.perf_counter() - start), size

    return Way(f"Qwix int4, groups of {_GROUP}, products alone", once, [])


def _weight(shape: tuple[int, ...], seed: int) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(seed), shape)


def _packed(qwix: Any, weight: jax.Array, channelwise: tuple[int, ...]) -> Any:
    """Converts a weight, or a stack of weights, to Qwix's int4 with a scale per group along the inputs."""
    return qwix.quantize(weight, jnp.int4, channelwise_axes=channelwise, tiled_axes={weight.ndim - 2: _GROUP})


def ways(config: llamajax.Config) -> list[Way]:
    """Makes all ways; the last one is ours."""
    stored = random_model(config, _RECIPE)
    made = [
        model_way("float32", random_model(config, "float32")),
        model_way("bfloat16", random_model(config, "bfloat16")),
        model_way(f"{_RECIPE}, dequantized in the product", stored),
    ]
    if importlib.util.find_spec("qwix"):
        made.append(qwix_way(config))
    else:
        print("Qwix is not installed and not measured: pip install qwix", file=sys.stderr)
    return [*made, model_way(f"{_RECIPE}, prepared", llamajax.prepare(stored))]


def main(argv):
    """Measures all ways in turn and prints the table."""
    del argv
    made = ways(llamajax.preset(flags.FLAGS.shape))
    sizes = [way.once()[1] for way in made]  # compiles
    bandwidth = memory_bandwidth()
    for done in range(flags.FLAGS.rounds):
        for way in made:
            way.rates.append(way.once()[0])
        print(f"round {done + 1} of {flags.FLAGS.rounds}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    bandwidth = max(bandwidth, memory_bandwidth())
    rates = [statistics.median(way.rates) for way in made]
    rows = [
        {
            "way": way.label,
            "bytes_read": size,
            "tokens_per_second": rate,
            "gigabytes_per_second": rate * size / 1e9,
            "of_memory_bandwidth": rate * size / bandwidth,
            "ours_divided_by_it": rates[-1] / rate,
            "rounds": way.rates,
        }
        for way, size, rate in zip(made, sizes, rates, strict=True)
    ]
    if flags.FLAGS.json:
        print(json.dumps({"shape": flags.FLAGS.shape, "memory_gigabytes_per_second": bandwidth / 1e9, "rows": rows}))
        return
    print(
        f"{flags.FLAGS.shape}, 1 row, context {flags.FLAGS.context}, medians of {flags.FLAGS.rounds}; memory", end=" "
    )
    print(f"{bandwidth / 1e9:.1f} GB/s\n")
    print(
        "| | GB a step | tokens/s | GB/s | of memory bandwidth | ours is faster by |",
        "|---|---|---|---|---|---|",
        sep="\n",
    )
    for row in rows:
        print(f"| {row['way']} | {row['bytes_read'] / 1e9:.2f} | {row['tokens_per_second']:.2f} ", end="")
        print(f"| {row['gigabytes_per_second']:.1f} | {row['of_memory_bandwidth']:.0%} ", end="")
        print(f"| {row['ours_divided_by_it']:.1f} |")


if __name__ == "__main__":
    app.run(main)
