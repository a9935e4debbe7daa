"""Products where each row has a matrix of its own (experts), beside products with one matrix: GB/s and GFLOP/s.

    python benchmarks/indexed.py --rounds=15

The weight has 8 experts in int4-g32, in the layout of this machine. Each token has two random experts. `quant.product`
with an index per row is compared with products that have one index each, read the same bytes and multiply the same
rows: for few rows one product after the other; for many rows one per expert, with the rows of that expert. For many
rows it is also compared with one product of all rows with a single expert, which unpacks an eighth of the weight. All
are measured in turn. Figures are medians of ratios and rates over the rounds; the memory bandwidth is of the same run.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import quant
from llamajax.evaluation.speed import memory_bandwidth

flags.DEFINE_integer("rounds", 15, "number of rounds", lower_bound=1)
flags.DEFINE_integer("experts", 8, "number of matrices in the weight", lower_bound=1)
flags.DEFINE_integer("width", 2048, "inputs of a matrix", lower_bound=32)
flags.DEFINE_integer("outputs", 5632, "outputs of a matrix", lower_bound=16)
flags.DEFINE_bool("json", False, "print JSON instead of a table")

_ROWS = (2, 16, 512)  # one token, eight tokens, and a prompt of 256, with two experts each


def main(argv: list[str]) -> None:
    """Measures all numbers of rows and prints the table."""
    del argv
    values = flags.FLAGS
    shape = (values.experts, values.width, values.outputs)
    backend, generator = jax.default_backend(), np.random.default_rng(0)
    weight = quant.prepare(
        quant.quantize_rtn(generator.normal(size=shape).astype(np.float32), "int4", group_size=32), backend, donate=True
    )
    bandwidth = memory_bandwidth()
    found = [measure(weight, rows, generator) for rows in _ROWS]
    if values.json:
        print(json.dumps({"bandwidth": bandwidth, "shape": shape, "rows": found}))
        return
    print(f"{backend}, {shape} in int4-g32; memory {bandwidth / 1e9:.1f} GB/s\n")
    print(
        "rows  experts   by row: GB/s  GFLOP/s     one number: GB/s  GFLOP/s  time, by row / one number   / one expert"
    )
    for row in found:
        rates = [
            f"{row['bytes'] / row[way] / 1e9:14.1f} {row['operations'] / row[way] / 1e9:8.0f}"
            for way in ("by_row", "one_number")
        ]
        one_expert = f"{row['ratio_one_expert']:.2f}" if "ratio_one_expert" in row else "-"
        print(
            f"{row['rows']:4} {row['used']:8} {rates[0]}   {rates[1]} {row['ratio_one_number']:27.2f} {one_expert:>14}"
        )


def measure(weight: Any, count: int, generator: np.random.Generator) -> dict[str, Any]:
    """Returns the median seconds of each product, and the medians of the ratios of a round."""
    experts, width = weight.shape[:2]
    chosen = np.concatenate([generator.choice(experts, 2, replace=False) for _ in range(count // 2)]).astype(np.int32)
    x = jnp.asarray(generator.normal(size=(count, width)), jnp.float32)
    options = quant.compiler_options(jax.default_backend())
    by_row = jax.jit(quant.product, compiler_options=options)
    one_number = jax.jit(lambda x, weight, number: quant.product(x, weight, number), compiler_options=options)
    if count <= 16:
        parts = [(x[row : row + 1], jnp.asarray(chosen[row])) for row in range(count)]
        read = count
    else:
        parts = [(x[chosen == expert], jnp.asarray(expert, jnp.int32)) for expert in np.unique(chosen)]
        read = len(parts)
    ways: dict[str, Callable[[], Any]] = {
        "by_row": lambda: by_row(x, weight, jnp.asarray(chosen)),
        "one_number": lambda: [one_number(part, weight, number) for part, number in parts],
    }
    if count > 16:
        ways["one_expert"] = lambda: one_number(x, weight, jnp.asarray(0, jnp.int32))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(flags.FLAGS.rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            jax.block_until_ready(way())
            if turn:  # the first round compiles
                seconds[name].append(time.perf_counter() - begin)
    ratios = {
        f"ratio_{name}": statistics.median(np.divide(seconds["by_row"], seconds[name])) for name in list(ways)[1:]
    }
    return {
        "rows": count,
        "used": len(np.unique(chosen)),
        "bytes": read * weight.nbytes // experts,
        "operations": 2 * count * width * weight.shape[2],
        **{name: statistics.median(times) for name, times in seconds.items()},
        **ratios,
    }


if __name__ == "__main__":
    app.run(main)
