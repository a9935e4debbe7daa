"""Ternary weights beside 4-bit weights on a CPU: products with the layer shapes of BitNet b1.58 2B4T, and memory speed.

    taskset -c 0 python benchmarks/ternary.py [--rows=1,4,16]

Times are processor times of one thread, interleaved, and the least of all rounds, so other load changes them little.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import quant

_ROWS = flags.DEFINE_list("rows", ["1"], "numbers of rows of activations to measure")
_ROUNDS = flags.DEFINE_integer("rounds", 12, "number of rounds")
_SHAPES = {"up": (2560, 6912), "down": (6912, 2560)}
_LAYERS = 8  # so that no cache holds the weights


def weights(length: int, outputs: int) -> dict[str, quant.Weight]:
    """Makes a stack of the same random matrix in each of several forms, prepared for a CPU."""
    weight_KM = jnp.asarray(np.random.default_rng(0).standard_normal((length, outputs)), jnp.float32)

    def stack(scheme: str, group: int | str, activations: str | None) -> quant.Weight:
        one = quant.quantize_rtn(weight_KM, scheme, group_size=group, scale_dtype=jnp.float16)
        one = dataclasses.replace(one, activations=activations)
        return quant.prepare(jax.tree.map(lambda array: jnp.stack([array] * _LAYERS), one), "cpu")

    return {
        "int4, groups of 32": stack("int4", 32, None),
        "ternary, floats": stack("ternary", "tensor", None),
        "ternary, int8 tokens": stack("ternary", "tensor", "int8-token"),
        "ternary in 256, int8 tokens": stack("ternary", 256, "int8-token"),
    }


def step(x_RK: jax.Array, weight: quant.Weight) -> jax.Array:
    """Computes the products with all layers, each of which waits for the one before."""

    def layer(i: jax.Array, sum_RM: jax.Array) -> jax.Array:
        return sum_RM + quant.product(x_RK + sum_RM[:, :1] * 1e-9, weight, i)

    return jax.lax.fori_loop(0, _LAYERS, layer, jnp.zeros((x_RK.shape[0], weight.shape[-1]), jnp.float32))


def main(_: list[str]) -> None:
    """Prints a table for each shape and number of rows."""
    memory = jnp.ones(1 << 25, jnp.float32)
    options = quant.compiler_options("cpu")
    for name, (length, outputs) in _SHAPES.items():
        forms = weights(length, outputs)
        for rows in map(int, _ROWS.value):
            x_RK = jnp.asarray(np.random.default_rng(1).standard_normal((rows, length)), jnp.float32)
            calls = {
                form: (jax.jit(step, compiler_options=options).lower(x_RK, weight).compile(), (x_RK, weight))
                for form, weight in forms.items()
            }
            calls["reading memory"] = (jax.jit(jnp.sum).lower(memory).compile(), (memory,))
            best = dict.fromkeys(calls, float("inf"))
            for _ in range(_ROUNDS.value):
                for form, (call, arguments) in calls.items():
                    start = time.process_time()
                    jax.block_until_ready(call(*arguments))
                    best[form] = min(best[form], time.process_time() - start)
            print(f"{name} {length} x {outputs}, {_LAYERS} layers, {rows} rows")
            for form, seconds in best.items():
                size = forms[form].nbytes if form in forms else memory.nbytes
                ratio = best["int4, groups of 32"] / seconds
                speed = f"{seconds * 1e3:8.2f} ms  {size / seconds / 1e9:6.2f} GB/s"
                print(f"  {form:28} {speed}  {ratio:5.2f} of int4's speed")


if __name__ == "__main__":
    app.run(main)
