"""`llamajax plan`: estimates the memory that a model needs, and what would fit, before weights are fetched or read."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from rich.markup import escape
from rich.table import Table

from llamajax.checkpoint.checks import available_memory
from llamajax.checkpoint.huggingface import read_config
from llamajax.cli.flag_groups import COMMON, SPEED, group
from llamajax.cli.model_flags import (
    A_MODEL,
    chosen_activations,
    chosen_dtype,
    define_activations,
    define_dtype,
    define_ignore_key,
    open_named,
)
from llamajax.cli.sampling_flags import chosen_cache_dtype, define_kv_cache
from llamajax.cli.sizes import readable_bytes
from llamajax.cli.terminal import as_json, printable, show, spinner, write
from llamajax.config import Config, preset, preset_names
from llamajax.errors import LlamaJaxError
from llamajax.plan import DEFAULT_CONTEXT, PROCESS, Plan, Weights, default_context, longest_context, plan_weights
from llamajax.quantization.foreseen import FLOATS
from llamajax.quantization.quantize import read_recipe, recipe_names
from quant import BACKENDS

SUMMARY = "estimate how much memory a model needs, and what would fit"
EXAMPLES = (
    "llamajax plan --model=any-llama.gguf --context=8192",
    "llamajax plan --shape=llama3-8b --recipe=int4-g32 --context=8192 --memory=8G",
    "llamajax plan --shape=path/to/config.json --recipe=bfloat16 --batch=8 --kv_cache=int8 --json",
)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B|)", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_MOST_RECIPES = 4  # number of recipes that are shown


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    with group(values, COMMON):
        flags.DEFINE_string(
            "model",
            None,
            f"`MODEL` to plan for: {A_MODEL}. Only its header is read. Without this flag and without --shape it "
            "is box.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "shape",
            None,
            "Plans for an architecture instead of a model: a Hugging Face config.json, or a `PRESET` such as "
            "llama3-8b.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "recipe",
            None,
            f"Type that the weights would have: {', '.join(FLOATS)}, a .toml `FILE`, or a recipe such as int4-g32. "
            "Without this flag it is the type of the stored weights, or bfloat16 with --shape.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "memory",
            None,
            "Plans for this `SIZE` of memory. 24G and 24GiB are 24 x 2**30 bytes, 24GB is 24e9. Without this flag "
            "it is what is available on this machine.",
            flag_values=values,
        )
        flags.DEFINE_boolean(
            "json",
            False,
            'Prints one JSON object instead of a table. "fits" says whether the model fits; the exit code is 0 in both '
            "cases.",
            flag_values=values,
        )
    with group(values, "Workload"):
        flags.DEFINE_integer(
            "context",
            None,
            f"Tokens per row, prompt and new tokens together. Without this flag it is {DEFAULT_CONTEXT:,}, or the "
            "model's context if that is less.",
            flag_values=values,
        )
        flags.DEFINE_integer("batch", 1, "Rows that are generated at once.", flag_values=values)
    define_ignore_key(values)
    with group(values, SPEED):
        flags.DEFINE_enum(
            "backend",
            None,
            list(BACKENDS),
            "Plans for `BACKEND`. Without this flag it is the one of this machine.",
            flag_values=values,
        )
    define_dtype(values)
    define_activations(values)
    define_kv_cache(values)


def run(values: flags.FlagValues) -> None:
    """Prints a table or JSON."""
    if values.model and values.shape:
        raise LlamaJaxError("--model and --shape are both given: expected one of them")
    given = None if values.memory is None else parse_memory(values.memory)
    backend = values.backend or jax.default_backend()
    memory = _memory_here(backend) if given is None else given
    name = values.shape or values.model or "box"
    model: Any = _architecture(values) if values.shape else open_named(values, name)
    options: dict[str, Any] = {
        "dtype": chosen_dtype(values, backend),
        "activations": chosen_activations(values),
        "backend": backend,
    }
    with spinner("planning"):
        weights = plan_weights(model, values.recipe, **options)
        context = default_context(weights.model.config) if values.context is None else values.context
        cache_dtype = chosen_cache_dtype(values)
        made = weights.plan(context, values.batch, cache_dtype)
        result = _result(name, made, memory, given is not None)
        if memory is not None:
            room = memory - _process(made)
            result["longest_context"] = longest_context(weights, room, made.batch, made.cache_dtype)
            if not result["fits"]:
                result["would_fit"] = {
                    "kv_cache": _caches(weights, made, room),
                    "batch": _largest_batch(weights, made, room),
                    "recipe": _recipes(model, made, room, options),
                }
    if values.json:
        write(as_json(result))
    else:
        _print(result)


def parse_memory(text: str) -> int:
    """Returns the bytes of a size that is written as a number and a unit.

    >>> parse_memory("1.5G"), parse_memory("2GB"), parse_memory("512MiB")
    (1610612736, 2000000000, 536870912)

    Raises:
        LlamaJaxError: if the text is not such a size, or less than a byte.
    """
    found = _MEMORY.fullmatch(text.strip())
    size = 0
    if found and len(text) < 32:
        number, prefix, unit = found.groups()
        base = 1000 if unit.upper() == "B" and prefix else 1024
        size = int(float(number) * base ** _POWERS[prefix.upper()])
    if size < 1:
        raise LlamaJaxError(
            f"--memory={text}: expected a size such as 24G or 24GiB (24 x 2**30 bytes), or 24GB (24e9 bytes)"
        )
    return size


def _architecture(values: flags.FlagValues) -> Config:
    """The architecture that --shape names."""
    if values.shape in preset_names():
        return preset(values.shape)
    path = Path(values.shape)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise LlamaJaxError(
            f"--shape={values.shape}: expected a config.json, or one of {', '.join(preset_names())}; --model "
            "takes a model"
        )
    return read_config(path, values.ignore_key)


def _memory_here(backend: str) -> int | None:
    """Bytes that are available to a backend on this machine; None if that is not known."""
    if backend != jax.default_backend():
        return None
    if backend == "cpu":
        return available_memory()
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def _process(made: Plan) -> int:
    """Bytes that Python and JAX themselves take of the same memory."""
    return PROCESS if made.backend == "cpu" else 0


def _result(name: str, made: Plan, memory: int | None, is_given: bool) -> dict[str, Any]:
    """The result to print, without the alternatives that would fit."""
    process = _process(made)
    named = {field.name: getattr(made, field.name) for field in dataclasses.fields(made) if field.name != "config"}
    return {
        "model": name,
        "parameters": made.config.num_parameters,
        **named,
        "total": made.total,
        "most": made.most,
        "process": process,
        "memory": memory,
        "memory_is_given": is_given,
        "fits": None if memory is None else made.most + process <= memory,
    }


# ---- What would fit --------------------------------------------------------------------------------------------------


def _caches(weights: Weights, made: Plan, room: int) -> dict[str, int]:
    """KV cache types with which everything else fits, each with the total in bytes."""
    totals = {dtype: weights.plan(made.context, made.batch, dtype).most for dtype in ("int8", "int4")}
    return {dtype: total for dtype, total in totals.items() if total <= room}


def _largest_batch(weights: Weights, made: Plan, room: int) -> int:
    """The largest number of rows with which everything else fits; 0 if not even one row does."""
    low, high = 0, made.batch - 1
    while low < high:
        middle = (low + high + 1) // 2
        fits = weights.plan(made.context, middle, made.cache_dtype).most <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _recipes(model: Any, made: Plan, room: int, options: dict[str, Any]) -> dict[str, int]:
    """Recipes with which everything else fits, each with the total in bytes, the largest first."""
    totals = dict(_totals(model, made, options))
    fitting = sorted((name for name, total in totals.items() if total <= room), key=lambda name: -totals[name])
    return {name: totals[name] for name in fitting}


def _totals(model: Any, made: Plan, options: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name in recipe_names():
        if any(rule.scheme == "ternary" for rule in read_recipe(name).rules):
            continue  # ternary recipes are for models that were trained for them
        try:
            weights = plan_weights(model, name, **options)
        except LlamaJaxError:  # the recipe depends on a text, or is for other shapes
            continue
        yield name, weights.plan(made.context, made.batch, made.cache_dtype).most


# ---- For people ------------------------------------------------------------------------------------------------------


def _print(result: dict[str, Any]) -> None:
    rows = f"{result['batch']} row{'' if result['batch'] == 1 else 's'} of {result['context']:,} tokens"
    title = f"{result['model']}, {result['recipe']}: {result['parameters']:,} weights; {rows}; {result['backend']}"
    table = Table(title=escape(printable(title)), title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("")
    table.add_row("weights", readable_bytes(result["weights"]), f"{readable_bytes(result['stored'])} at rest")
    table.add_row("cache", readable_bytes(result["cache"]), str(result["cache_dtype"]))
    table.add_row("activations", readable_bytes(result["activations"]), f"computed in {result['dtype']}")
    table.add_row("programs", readable_bytes(result["programs"]), "")
    table.add_section()
    table.add_row("total", readable_bytes(result["total"]), "")
    if result["process"]:
        whole = readable_bytes(result["total"] + result["process"])
        table.add_row("and Python, JAX", whole, f"{readable_bytes(result['process'])} before anything is loaded")
    reads = result["most"] > result["total"] + result["compiled"]
    stage = "the first start, while it reads and compiles" if reads else "the first start, which has compiled"
    table.add_row("at its most", readable_bytes(result["most"] + result["process"]), stage)
    show(table)
    for line in _verdict(result):
        write(line)


def _verdict(result: dict[str, Any]) -> Iterator[str]:
    """Yields lines that say whether the model fits, and if not, what would."""
    memory = result["memory"]
    if memory is None:
        yield "what fits is not known: give --memory"
        return
    what = f"{readable_bytes(memory)}{'' if result['memory_is_given'] else ', which are available here'}"
    spare = memory - result["most"] - result["process"]
    longest = result["longest_context"]
    if result["fits"]:
        yield f"fits {what}: {readable_bytes(spare)} are left; a context of up to {longest:,} tokens fits"
        return
    yield f"does not fit {what}: {readable_bytes(-spare)} too much. What would, with all else as it is:"
    would = result["would_fit"]
    options = [f"  --context={longest}"] if longest else []
    options += [f"  --kv_cache={dtype}: {readable_bytes(total)}" for dtype, total in would["kv_cache"].items()]
    options += [f"  --batch={would['batch']}"] if would["batch"] else []
    shown = list(would["recipe"].items())[:_MOST_RECIPES]
    options += [f"  --recipe={name}: {readable_bytes(total)}" for name, total in shown]
    yield from options or [
        "  nothing alone: a smaller model, or several of a recipe, --context, --kv_cache and --batch"
    ]
