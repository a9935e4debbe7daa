"""Layers of two types in turn beside layers of one: a decode step, prefill, and compiling, in ratios of one process.

    python benchmarks/mixed_layers.py --rounds=5                                    # every weight of layers
    python benchmarks/mixed_layers.py --rounds=5 --weights='layers.*.ffn.down_FD'   # one, as in GGUF files

Models of random weights, laid out for this machine: int4-g32 with scales in float16 in all layers; with scales in
bfloat16 in all; and the two in turn, for each weight of a layer (or some) a `quant.Mixed` of two types. The types are
of one size and multiplied alike: what is compared is choosing. Each round measures all in turn; figures are medians
over the rounds. "Beside one type" is the time of the mixed model over the mean of the other two's. The decode step is
traced and compiled anew in each round.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

import llamajax
import quant
from llamajax.evaluation.speed import measure_decode, measure_prefill, random_model

flags.DEFINE_string("shape", "tinyllama-1.1b", "preset of the shape")
flags.DEFINE_string("weights", "layers.*", "glob: those that are of two types")
flags.DEFINE_integer("rounds", 5, "how often everything is measured", lower_bound=1)
flags.DEFINE_integer("context", 128, "tokens in the cache, and of the prompt", lower_bound=1)
flags.DEFINE_bool("json", False, "print JSON instead of a table")

_RULES = """
[[rules]]
weights = "*norm*"
keep = true
"""
_RULE = """
[[rules]]
weights = "{weights}"
scheme = "int4"
group_size = 32
scale_dtype = "{scales}"
{layers}
"""


class Way(NamedTuple):
    """One model: seconds of a decode step and of a prompt, and of compiling the decode step, one a round."""

    label: str
    model: Any
    bytes_read: int
    decode: list[float]
    prefill: list[float]
    compile: list[float]


def recipe(layers: int, first: str, second: str) -> str:
    """One dtype of scales for even layers and tables, another for odd layers."""
    odd = _RULE.format(weights=flags.FLAGS.weights, scales=second, layers=f"layers = {list(range(1, layers, 2))}")
    return _RULES + odd + _RULE.format(weights="*", scales=first, layers="")


def ways() -> list[Way]:
    """The models."""
    config = llamajax.preset(flags.FLAGS.shape)
    made = []
    for first, second in (("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.toml"
            path.write_text(recipe(config.num_layers, first, second))
            model = llamajax.prepare(random_model(config, path), donate=True)
        size = measure_decode(model, flags.FLAGS.context, steps=1, repeats=1, cache_dtype="float32").bytes_read
        made.append(Way(first if first == second else "in turn", model, size, [], [], []))
    return made


def once(way: Way) -> None:
    """Measures all of one way."""
    options = {"repeats": 3, "cache_dtype": "float32"}
    context = flags.FLAGS.context
    decoded = measure_decode(way.model, context, steps=4, **options)
    way.decode.append(1 / decoded.tokens_per_second)
    prefilled = measure_prefill(way.model, context, **options)
    way.prefill.append(1 / prefilled.tokens_per_second)
    begin = time.perf_counter()
    compile_step(way.model)
    way.compile.append(time.perf_counter() - begin)


def compile_step(model: Any) -> None:
    """Traces and compiles a step of one token."""
    cache = jax.eval_shape(lambda: llamajax.KVCache.empty(model.config, 1, 256, jnp.float32))
    options = quant.compiler_options(jax.default_backend())
    step = jax.jit(lambda model, tokens_BT, cache: model(tokens_BT, cache), compiler_options=options)
    step.lower(model, jax.ShapeDtypeStruct((1, 1), jnp.int32), cache).compile()


def main(argv: list[str]) -> None:
    """Measures in turn, prints."""
    del argv
    jax.config.update("jax_enable_compilation_cache", False)
    made = ways()
    for done in range(flags.FLAGS.rounds):
        for way in made:
            once(way)
        print(f"round {done + 1} of {flags.FLAGS.rounds}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    *alone, mixed = made
    ratios = {
        name: statistics.median(
            value / statistics.mean(others)
            for value, *others in zip(*(getattr(way, name) for way in (mixed, *alone)), strict=True)
        )
        for name in ("decode", "prefill", "compile")
    }
    if flags.FLAGS.json:
        rows = [{"label": way.label, "bytes_read": way.bytes_read, **_medians(way)} for way in made]
        print(json.dumps({"shape": flags.FLAGS.shape, "rows": rows, "ratios": ratios}))
        return
    print(f"{flags.FLAGS.shape}, 1 row, context {flags.FLAGS.context}, medians of {flags.FLAGS.rounds}\n")
    print("| | GB a step | decode, tokens/s | prefill, tokens/s | compiling a step, s |")
    print("|---|---|---|---|---|")
    for way in made:
        found = _medians(way)
        print(f"| {way.label} | {way.bytes_read / 1e9:.2f} | {1 / found['decode']:.1f} ", end="")
        print(f"| {1 / found['prefill']:.0f} | {found['compile']:.2f} |")
    print(f"| time beside one type | | {ratios['decode']:.2f} | {ratios['prefill']:.2f} | {ratios['compile']:.2f} |")


def _medians(way: Way) -> dict[str, float]:
    return {name: statistics.median(getattr(way, name)) for name in ("decode", "prefill", "compile")}


if __name__ == "__main__":
    app.run(main)
