"""Layers of two types in turn, beside layers of one type: ratios of decode, prefill and compile time in one process.

    python benchmarks/mixed_layers.py --rounds=5                                    # every weight of layers
    python benchmarks/mixed_layers.py --rounds=5 --weights='layers.*.ffn.down_FD'   # one
    python benchmarks/mixed_layers.py --rounds=5 --file=Q4_K_M                      # types of a GGUF file

Three models of random weights, in the layout of this machine, are compared: int4-g32 with float16 scales in all layers;
with bfloat16 scales in all layers; and with the two in turn, so that each weight of a layer (or the chosen ones) is a
`quant.Mixed` of two types. Both types have the same size and product, so the difference is the cost of choosing. With
--file=Q4_K_M the models have Q4_K in all layers, Q6_K in all layers, and the mixture of llama.cpp's quantizer; times of
a decode step are then per byte. Each round measures all models in turn and compiles the decode step anew. Figures are
medians over the rounds. "Beside one type" is the time of the mixed model over the mean time of the other two.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import llamajax
import quant
from llamajax.checkpoint.assemble import Finish, assemble
from llamajax.checkpoint.source import Source
from llamajax.evaluation.speed import measure_decode, measure_prefill, random_model
from llamajax.parameters import Place, specs

flags.DEFINE_string("shape", "tinyllama-1.1b", "preset of the shape")
flags.DEFINE_integer("layers", None, "number of layers instead of the preset's", lower_bound=1)
flags.DEFINE_string("weights", "layers.*", "glob of the weights that have two types")
flags.DEFINE_enum("file", None, ["Q4_K_M"], "types as in this GGUF file type, instead of scales of two dtypes")
flags.DEFINE_integer("rounds", 5, "number of rounds", lower_bound=1)
flags.DEFINE_integer("context", 128, "tokens in the cache, and in the prompt", lower_bound=1)
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
    """One model, and per round the seconds per token of decoding and prefill, and of compiling the decode step."""

    label: str
    model: Any
    bytes_read: int
    decode: list[float]
    prefill: list[float]
    compile: list[float]


def recipe(layers: int, first: str, second: str) -> str:
    """Makes a recipe with one dtype of scales for even layers and tables, and another for odd layers."""
    odd = _RULE.format(weights=flags.FLAGS.weights, scales=second, layers=f"layers = {list(range(1, layers, 2))}")
    return _RULES + odd + _RULE.format(weights="*", scales=first, layers="")


def ways() -> list[Way]:
    """Makes the models; the mixed one is the last."""
    config = llamajax.preset(flags.FLAGS.shape)
    if flags.FLAGS.layers is not None:
        config = dataclasses.replace(config, num_layers=flags.FLAGS.layers)
    if flags.FLAGS.file is not None:
        kinds = {"Q4_K": lambda place: "Q4_K", "Q6_K": lambda place: "Q6_K", flags.FLAGS.file: q4_k_m(config)}
        return [_way(label, of_types(config, kind)) for label, kind in kinds.items()]
    made = []
    for first, second in (("float16", "float16"), ("bfloat16", "bfloat16"), ("float16", "bfloat16")):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.toml"
            path.write_text(recipe(config.num_layers, first, second))
            model = llamajax.prepare(random_model(config, path), donate=True)
        made.append(_way(first if first == second else "in turn", model))
    return made


def _way(label: str, model: Any) -> Way:
    size = measure_decode(model, flags.FLAGS.context, steps=1, repeats=1, cache_dtype="float32").bytes_read
    return Way(label, model, size, [], [], [])


def q4_k_m(config: llamajax.Config) -> Callable[[Place], str]:
    """Returns each matrix's type in Q4_K_M: `llama_tensor_get_type` of llama.cpp's src/llama-quant.cpp."""

    def kind(place: Place) -> str:
        layer, eighth = place.layer or 0, config.num_layers // 8
        more = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        wide = place.name in ("attention.value_DM", "ffn.down_FD") and more
        return "Q6_K" if wide or place.name == "head_VD" else "Q4_K"

    return kind


def of_types(config: llamajax.Config, kind: Callable[[Place], str]) -> llamajax.Llama:
    """Makes a model of random codes in the backend's layout; `kind` gives the type of each matrix."""
    generator = np.random.default_rng(0)
    places = {place: spec for place, spec in specs(config).items()}

    def theirs(place: Place) -> tuple[int, ...]:
        shape = places[place].shape(config)
        return shape[::-1] if places[place].transposed else shape

    def ours(place: Place, weight: Any) -> Any:
        return quant.ggml.transposed(weight) if places[place].transposed else weight

    def abstract(place: Place) -> Any:
        if not places[place].is_matrix:
            return jax.ShapeDtypeStruct(theirs(place), np.float32)
        return ours(place, quant.ggml.abstract(kind(place), theirs(place)))

    def read(place: Place) -> Any:
        if not places[place].is_matrix:
            return np.ones(theirs(place), np.float32)
        form, (rows, columns) = quant.ggml.named(kind(place)), theirs(place)
        blocks = generator.integers(0, 256, (rows * columns // form.block, form.nbytes), np.uint8)
        for at in (208,) if form.name == "Q6_K" else (0, 2):
            blocks[:, at : at + 2] = np.frombuffer(np.float16(2.0**-12).tobytes(), np.uint8)
        return ours(place, quant.ggml.unpack(form.name, blocks.reshape(rows, -1)))

    source = Source("random", config, {place: abstract(place) for place in places}, tuple(places), read)
    return assemble("random", source, Finish(backend=jax.default_backend()))


def once(way: Way) -> None:
    """Measures one model once."""
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
    """Measures all models in turn and prints the table."""
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
            for value, *others in zip(*(_times(way, name) for way in (mixed, *alone)), strict=True)
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


def _times(way: Way, name: str) -> list[float]:
    """Returns the seconds of each round; for decode steps of models of different sizes, the seconds per byte."""
    size = way.bytes_read if flags.FLAGS.file is not None and name == "decode" else 1
    return [seconds / size for seconds in getattr(way, name)]


def _medians(way: Way) -> dict[str, float]:
    return {name: statistics.median(getattr(way, name)) for name in ("decode", "prefill", "compile")}


if __name__ == "__main__":
    app.run(main)
