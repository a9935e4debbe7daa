"""`llamajax bench`: measures how fast a model runs on this machine, and compares that with the machine's limits."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import flags
from rich.table import Table

from llamajax.caches import CACHE_DTYPES
from llamajax.cli.flag_groups import COMMON, SPEED, group
from llamajax.cli.model_flags import (
    A_MODEL,
    chosen_activations,
    chosen_dtype,
    define_activations,
    define_dtype,
    define_ignore_key,
    define_threads,
    open_named,
    read_model,
)
from llamajax.cli.sizes import memory_bytes, readable_bytes
from llamajax.cli.terminal import as_json, printable, progress, show, spinner, write
from llamajax.config import preset
from llamajax.errors import LlamaJaxError
from llamajax.evaluation.plots import Speed, check_picture, speed_bars
from llamajax.evaluation.speed import (
    Measurement,
    measure_decode,
    measure_prefill,
    memory_bandwidth,
    product_rate,
    random_model,
)
from llamajax.generation.programs import DECODE_BLOCK
from llamajax.model import Llama
from llamajax.prepare import prepare, with_activations
from llamajax.quantization.foreseen import FLOATS
from llamajax.threads import thread_count

SUMMARY = "measure prefill and decode speed, and compare it with what the machine can do"
EXAMPLES = (
    "llamajax bench --model=any-llama.gguf",
    "llamajax bench --shape=tinyllama-1.1b --prefill=16,128,512 --context=128,1024 --batch=1,8",
    "llamajax bench --model=box-int4 --cache_dtype=int8 --plot=speed.svg",
)
_RECIPE = "int4-g32"


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    with group(values, COMMON):
        flags.DEFINE_string(
            "model",
            None,
            f"`MODEL` to measure: {A_MODEL}. Without this flag and without --shape it is box.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "shape",
            None,
            "Measures random weights in the shape of `PRESET` instead, such as tinyllama-1.1b.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "recipe",
            None,
            f"Type of the random weights: {', '.join(FLOATS)}, a .toml `FILE`, or a recipe such as int8. Without this "
            f"flag it is {_RECIPE}.",
            flag_values=values,
        )
        flags.DEFINE_boolean("json", False, "Prints one JSON object instead of a table.", flag_values=values)
        flags.DEFINE_string(
            "plot",
            None,
            "Draws a picture to `FILE`, .svg or .png: tokens per second beside the limits of memory and arithmetic. "
            "Needs pip install 'llamajax[plot]'.",
            flag_values=values,
        )
    _define_measurements(values)
    define_ignore_key(values)
    define_dtype(values)
    define_activations(values)
    with group(values, SPEED):
        flags.DEFINE_enum(
            "cache_dtype",
            "auto",
            ["auto", *CACHE_DTYPES],
            "Keeps the KV cache in numbers of this `TYPE`. auto is the type that the model computes in.",
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "prepare",
            True,
            "Converts quantized weights to this backend's layout first, as generate does. --noprepare multiplies them "
            "in the stored layout.",
            flag_values=values,
        )
    define_threads(values)


def _define_measurements(values: flags.FlagValues) -> None:
    with group(values, "Measurements"):
        flags.DEFINE_list(
            "prefill",
            ["16", "128", "512"],
            "Prompt lengths in tokens, such as `16,128`. An empty value measures no prefill.",
            flag_values=values,
        )
        flags.DEFINE_list(
            "context",
            ["128"],
            "Tokens that are already in the cache when decoding, such as `128,1024`. An empty value measures no "
            "decoding.",
            flag_values=values,
        )
        flags.DEFINE_list("batch", ["1"], "Rows that are decoded at once, such as `1,8`.", flag_values=values)
        flags.DEFINE_integer(
            "repeats", 5, "Measures each figure `N` times and shows the median.", lower_bound=1, flag_values=values
        )
        flags.DEFINE_integer(
            "steps",
            8,
            "Decode steps of one measurement.",
            lower_bound=1,
            upper_bound=DECODE_BLOCK,
            flag_values=values,
        )


def run(values: flags.FlagValues) -> None:
    """Measures, prints a table or JSON, and draws a picture if asked."""
    lengths, contexts, batches = (_numbers(values, name) for name in ("prefill", "context", "batch"))
    _check(values, lengths, contexts, batches)
    model, name, weights = _model(values)
    if activations := chosen_activations(values):
        model = with_activations(model, activations)
    longest = max(lengths + contexts)
    if longest > model.config.context_length:
        raise LlamaJaxError(
            f"--context or --prefill has {longest} tokens: expected at most {model.config.context_length}, the context "
            f"of {name}"
        )
    size = memory_bytes(model)
    with spinner("measuring the machine"):
        bandwidth, flops = memory_bandwidth(), product_rate(model.config, model.dtype)
    if values.prepare:
        with spinner("preparing"):
            model = prepare(model, donate=True)
    cache_dtype = model.dtype if values.cache_dtype == "auto" else values.cache_dtype
    work = list(_work(model, values, lengths, contexts, batches, cache_dtype))
    with progress("measuring") as on_figure:
        measured = []
        for done, measure in enumerate(work):
            on_figure(done, len(work))
            measured.append(measure())
    result = {
        "model": name,
        "weights": weights,
        "parameters": model.config.num_parameters,
        "bytes": size,
        "prepared": values.prepare,
        "activations": values.activations,
        "cache_dtype": str(cache_dtype),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "threads": thread_count() if jax.default_backend() == "cpu" else None,
        "memory_gigabytes_per_second": bandwidth / 1e9,
        "product_gigaflops_per_second": flops / 1e9,
        "compile_seconds": sum(each.compile_seconds for each in measured),
        "programs": sum(each.programs for each in measured),
        "figures": [_figure(each, bandwidth, flops) for each in measured],
    }
    if values.json:
        write(as_json(result))
    else:
        _print(result)
    if values.plot:
        bars = [Speed(_label(each), each.tokens_per_second, each.limit(bandwidth, flops)) for each in measured]
        speed_bars(f"{name}, {weights}", bars, values.plot)


def _numbers(values: flags.FlagValues, name: str) -> list[int]:
    """The value of a list flag as whole numbers."""
    given = getattr(values, name)
    numbers = [int(text) for text in given if text.isdecimal()]
    if len(numbers) < len(given) or 0 in numbers:
        raise LlamaJaxError(f"--{name}={','.join(given)}: expected whole numbers from 1, separated by commas")
    return numbers


def _check(values: flags.FlagValues, lengths: list[int], contexts: list[int], batches: list[int]) -> None:
    """Checks the flags, as far as that needs no model."""
    if values.model and values.shape:
        raise LlamaJaxError("--model and --shape are both given: expected one of them")
    if values.recipe and not values.shape:
        raise LlamaJaxError(
            "--recipe is given without --shape: it chooses the type of random weights: add --shape, or quantize a "
            "model with llamajax quantize"
        )
    if values.recipe in FLOATS and values.dtype != "auto":
        raise LlamaJaxError(
            f"--dtype={values.dtype} and --recipe={values.recipe} both choose the type: leave --dtype out"
        )
    if not lengths and not (contexts and batches):
        raise LlamaJaxError(
            "--prefill and --context are empty: there is nothing to measure: expected a length in one of them"
        )
    if values.plot:
        check_picture(values.plot)


def _model(values: flags.FlagValues) -> tuple[Llama, str, str]:
    """The model, its name, and a description of its weights."""
    if values.shape:
        recipe, config = values.recipe or _RECIPE, preset(values.shape)
        with spinner("making random weights"):
            dtype = chosen_dtype(values) or "bfloat16"
            return random_model(config, recipe, dtype=dtype), values.shape, recipe
    name = values.model or "box"
    opened = open_named(values, name)
    model = read_model(opened, chosen_dtype(values))
    bits = 8 * memory_bytes(model) / model.config.num_parameters
    return model, name, f"{bits:.2f} bits a weight"


def _work(
    model: Llama,
    values: flags.FlagValues,
    lengths: list[int],
    contexts: list[int],
    batches: list[int],
    cache_dtype: Any,
) -> Iterator[Callable[[], Measurement]]:
    """The measurements to make, in the order of the table."""
    both = {"cache_dtype": cache_dtype, "repeats": values.repeats}
    for length in lengths:
        yield functools.partial(measure_prefill, model, length, **both)
    for batch in batches:
        for context in contexts:
            yield functools.partial(measure_decode, model, context, batch=batch, steps=values.steps, **both)


def _figure(each: Measurement, bandwidth: float, flops: float) -> dict[str, Any]:
    return {
        "phase": each.phase,
        "batch": each.batch,
        "tokens": each.length,
        "seconds": each.seconds,
        "tokens_per_second": each.tokens_per_second,
        "bytes_read": each.bytes_read,
        "gigabytes_per_second": each.gigabytes_per_second,
        "of_memory_bandwidth": each.bytes_read / each.seconds / bandwidth,
        "operations": each.operations,
        "gigaflops_per_second": each.gigaflops_per_second,
        "of_product_rate": each.operations / each.seconds / flops,
        "programs": each.programs,
        "compile_seconds": each.compile_seconds,
        "resident_bytes": each.resident_bytes,
    }


def _print(result: dict[str, Any]) -> None:
    """Prints one table row per measurement, then the limits of the machine."""
    weights = f"{result['weights']}{'' if result['prepared'] else ', not prepared'}"
    title = f"{result['model']}, {weights}: {result['parameters']:,} weights, {readable_bytes(result['bytes'])}; "
    title += f"cache {result['cache_dtype']}; {result['backend']}"
    if threads := result["threads"]:
        title += f", {threads} thread{'' if threads == 1 else 's'}"
    table = Table(title=printable(title), title_justify="left", caption_justify="left")
    table.add_column("")
    for column in ("rows", "tokens", "tokens/s", "ms", "GB/s", "of\nmemory", "GFLOP/s", "of\nproducts", "resident"):
        table.add_column(column, justify="right")
    for each in result["figures"]:
        resident = each["resident_bytes"]
        table.add_row(
            each["phase"],
            str(each["batch"]),
            f"{each['tokens']:,}",
            f"{each['tokens_per_second']:.1f}",
            f"{each['seconds'] * 1e3:.1f}",
            f"{each['gigabytes_per_second']:.2f}",
            f"{each['of_memory_bandwidth']:.0%}",
            f"{each['gigaflops_per_second']:.1f}",
            f"{each['of_product_rate']:.0%}",
            readable_bytes(resident) if resident else "unknown",
        )
    show(table)
    programs = f"{result['programs']} program{'' if result['programs'] == 1 else 's'}"
    write(f"memory   {result['memory_gigabytes_per_second']:8.1f} GB/s")
    write(f"products {result['product_gigaflops_per_second']:8.1f} GFLOP/s")
    write(f"compile  {result['compile_seconds']:8.1f} s for {programs}, not counted above")


def _label(each: Measurement) -> str:
    if each.phase == "prefill":
        return f"prefill {each.length}"
    return f"decode {each.batch} row{'' if each.batch == 1 else 's'} at {each.length}"
