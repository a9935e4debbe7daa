"""Measures the time to quantize with a calibration text, beside forward passes of the float model over the same text.

    python benchmarks/quantize_cost.py --shape=tinyllama-1.1b --tokens=8192
    python benchmarks/quantize_cost.py --shape=tinyllama-1.1b --layers=2,4 --json

Weights and text are random: the time of every step but the search for bits depends on shapes alone. A forward pass runs
the float32 model, head included, over the text in windows of 512 tokens, as the calibration does. The time of the
forward pass is without compilation. That of the recipe includes it, unless several numbers of layers are given: then
each is quantized twice and the second time counts, and the script also prints the times that the whole shape would
take, by a straight line through the first and the last number of layers.
"""

import dataclasses
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from yardstick_inputs import commit, machine, run_script, say

import llamajax
import quant
from llamajax.evaluation.speed import random_model
from llamajax.quantization.quantize import read_recipe

_WINDOW = 512


def forward_seconds(model: llamajax.Llama, tokens_WT: np.ndarray, rounds: int) -> float:
    """Returns the median time in which the float model computes the logits of all windows, without compilation."""
    logits = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])
    laid_out = llamajax.prepare(model)
    jax.block_until_ready(logits(laid_out, jnp.asarray(tokens_WT[:1])))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        for row in tokens_WT:
            jax.block_until_ready(logits(laid_out, jnp.asarray(row[None])))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measured(config: llamajax.Config, recipe: quant.Recipe, values: flags.FlagValues) -> dict[str, Any]:
    """Returns the figures of a model of random weights."""
    model = random_model(config, "float32", seed=values.seed)
    tokens = np.random.default_rng(values.seed).integers(0, config.vocab_size, values.tokens, np.int32)
    forward = forward_seconds(model, tokens[: len(tokens) // _WINDOW * _WINDOW].reshape(-1, _WINDOW), values.rounds)
    say(f"{config.num_layers} layers: a forward pass takes {forward:.1f} s")
    start = time.perf_counter()
    packed = llamajax.quantize(model, recipe, calibration=tokens, window=_WINDOW)
    jax.block_until_ready(jax.tree.leaves(packed))
    seconds = time.perf_counter() - start
    say(f"{config.num_layers} layers: {values.recipe} takes {seconds:.1f} s, {seconds / forward:.1f} passes")
    return {
        "layers": config.num_layers,
        "parameters": config.num_parameters,
        "forward_seconds": forward,
        "quantization_seconds": seconds,
        "passes": seconds / forward,
    }


def along(rows: list[dict[str, Any]], layers: int) -> dict[str, Any]:
    """Returns the figures for a number of layers, by a straight line through the first and the last row."""
    first, last = rows[0], rows[-1]
    made: dict[str, Any] = {"layers": layers}
    for key in ("parameters", "forward_seconds", "quantization_seconds"):
        slope = (last[key] - first[key]) / (last["layers"] - first["layers"])
        made[key] = first[key] + slope * (layers - first["layers"])
    return made | {"passes": made["quantization_seconds"] / made["forward_seconds"], "by_a_line": True}


def run(values: flags.FlagValues) -> None:
    """Measures and prints the figures.

    Raises:
        LlamaJaxError: for a number of layers that the shape does not have, or too few tokens.
    """
    config = llamajax.preset(values.shape)
    recipe = read_recipe(values.recipe)
    try:
        recipe = recipe if values.bits is None else recipe.with_target(values.bits)
    except ValueError as error:
        raise llamajax.LlamaJaxError(str(error)) from None
    counts = [int(text) if text.isdecimal() else 0 for text in values.layers] or [config.num_layers]
    if not all(1 <= count <= config.num_layers for count in counts) or len(set(counts)) != len(counts):
        raise llamajax.LlamaJaxError(
            f"--layers={','.join(values.layers)}: expected different numbers from 1 to {config.num_layers}"
        )
    shapes = [dataclasses.replace(config, num_layers=count) for count in counts]
    for shape in shapes if len(shapes) > 1 else ():  # each number of layers has programs of its own to compile
        measured(shape, recipe, values)
    rows = [measured(shape, recipe, values) for shape in shapes]
    if len(rows) > 1:
        rows.append(along(rows, config.num_layers))
    if values.json:
        print(json.dumps({"rows": rows, "tokens": values.tokens, "machine": machine(), "commit": commit()}, indent=1))
        return
    print(f"{values.shape}, {values.recipe}, {values.tokens} tokens, {machine()['processor']}\n")
    print("| layers | parameters | forward pass | quantizing | passes |\n|---|---|---|---|---|")
    for row in rows:
        note = " (by a line)" if row.get("by_a_line") else ""
        print(
            f"| {row['layers']}{note} | {row['parameters'] / 1e6:.0f}M | {row['forward_seconds']:.1f} s | "
            f"{row['quantization_seconds']:.1f} s | {row['passes']:.1f} |"
        )


if __name__ == "__main__":
    flags.DEFINE_string("shape", "tinyllama-1.1b", "preset of the shape")
    flags.DEFINE_list("layers", [], "numbers of layers to measure instead of the shape's own")
    flags.DEFINE_string("recipe", "calibrated", "recipe, by name or file")
    flags.DEFINE_float("bits", None, "bits per weight instead of the recipe's")
    flags.DEFINE_integer("tokens", 8192, "of the text", lower_bound=_WINDOW)
    flags.DEFINE_integer("rounds", 1, "forward passes to take the median of", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of weights and text")
    flags.DEFINE_boolean("json", False, "print JSON")
    run_script(run)
