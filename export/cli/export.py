"""`llamajax export`: writes a bundle of StableHLO programs and packed weights, and its targets for other runtimes."""

import dataclasses
import sys
from pathlib import Path

from absl import flags
from rich.table import Table

from export.bundle import Bundle, open_bundle, write
from export.profiles import OPTIONAL_PROGRAMS, PROFILES, Spec
from export.targets import add_target, check_toolchain, clear_unnamed, kind_of, profile_for
from llamajax import LlamaJaxError, files
from llamajax.cli.flag_groups import COMMON, group
from llamajax.cli.model_flags import (
    chosen_activations,
    chosen_dtype,
    define_activations,
    define_dtype,
    define_model,
    define_threads,
    open_named,
    read_model,
    tokenizer_if_any,
)
from llamajax.cli.sizes import readable_bytes, stored_bytes
from llamajax.cli.terminal import note, show, spinner

SUMMARY = "write a bundle that other runtimes execute without llamajax"
EXAMPLES = (
    "llamajax export --model=box-int4 --output=box.bundle",
    "llamajax export --model=box-int4 --output=box.bundle --slots=256 --target=iree-cpu,onnx",
    "llamajax export --bundle=box.bundle --target=savedmodel --python=savedmodel=env/bin/python",
)


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values, default=None)
    with group(values, COMMON):
        flags.DEFINE_string("output", None, "Writes the bundle to `FOLDER`, which must not exist.", flag_values=values)
        flags.DEFINE_list(
            "target",
            [],
            "Builds the bundle also for these `TARGETS`, separated by commas: iree-cpu (any CPU of this kind), "
            "iree-cpu-host (this CPU), onnx, savedmodel, litert, coreml, tpu:TOPOLOGY, cuda:CARD.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "bundle",
            None,
            "Adds --target to the bundle in `FOLDER`, instead of exporting --model to --output.",
            flag_values=values,
        )
    with group(values, "Programs"):
        flags.DEFINE_enum(
            "profile",
            None,
            list(PROFILES),
            "`KIND` of program. scanned: one loop over the layers, the smallest. unrolled: no loops. float: unrolled "
            "and without arithmetic on bytes, for LiteRT and CoreML. cpu: scanned, with weights in the fast layout "
            "for XLA on a CPU. Without this flag the targets decide; without targets it is scanned.",
            flag_values=values,
        )
        flags.DEFINE_integer("batch", 1, "Rows that are generated at once.", flag_values=values)
        flags.DEFINE_integer(
            "slots",
            None,
            "Tokens that the KV cache has room for. Without this flag it is the model's context, but at most 512.",
            flag_values=values,
        )
        flags.DEFINE_enum(
            "kv_cache",
            "float32",
            ["float32", "bfloat16", "float16"],
            "Keeps the KV cache in numbers of this `TYPE`.",
            flag_values=values,
        )
        flags.DEFINE_list(
            "buckets",
            ["16", "64", "256"],
            "Writes one prefill program for each of these prompt lengths, such as `16,64`.",
            flag_values=values,
        )
        flags.DEFINE_list(
            "programs",
            [],
            f"Writes these `PROGRAMS` beside prefill and decode: {', '.join(OPTIONAL_PROGRAMS)}.",
            flag_values=values,
        )
        flags.DEFINE_integer("drafts", 4, "Tokens that the program verify checks at once.", flag_values=values)
        flags.DEFINE_string(
            "template",
            None,
            "Chat template for llamajax run --chat: a built-in one (chatml, llama2, llama3, …), or a `NAME` among the "
            "model's own. Without this flag it is the model's default.",
            flag_values=values,
        )
    define_dtype(values)
    define_activations(values)
    define_threads(values)
    define_python(values)


def define_python(values: flags.FlagValues) -> None:
    """Defines --python, for this command and for verify and run."""
    with group(values, "Other runtimes"):
        flags.DEFINE_list(
            "python",
            [],
            "Python in which a runtime is installed, if it is not this one, as `NAME=PATH`: "
            "iree=path/to/env/bin/python. Several are separated by commas.",
            flag_values=values,
        )


def pythons(values: flags.FlagValues) -> dict[str, str]:
    """The paths of --python by name.

    Raises:
        LlamaJaxError: for an entry that is not NAME=PATH.
    """
    pairs = [entry.partition("=") for entry in values.python]
    for name, _, path in pairs:
        if not name or not path:
            raise LlamaJaxError(f"--python={name}: expected NAME=PATH, such as iree=path/to/env/bin/python")
    return {name: path for name, _, path in pairs}


def run(values: flags.FlagValues) -> None:
    """Writes a bundle with its targets, or adds targets to a bundle; an error leaves an existing bundle whole."""
    named = pythons(values)
    # The Python of each target, without duplicates.
    targets = {target: named.get(target, named.get(kind_of(target), sys.executable)) for target in values.target}
    if values.bundle and (values.model or values.output or values.template or not targets):
        raise LlamaJaxError("--bundle needs --target, and excludes --model, --output and --template")
    if not values.bundle and not (values.model and values.output):
        raise LlamaJaxError("--model or --output is missing: expected both, or --bundle (see llamajax export --help)")
    if values.bundle:
        with files.locked(Path(values.bundle)):
            bundle = _add(values, targets)
    else:
        output = Path(values.output)
        files.check_absent(output)
        profile = profile_for(values.target, values.profile)
        for target, python in targets.items():
            check_toolchain(target, python)
        with files.new_folder(output) as folder:
            folder.rmdir()  # `write` makes it
            bundle = _build(_write(values, folder, profile), targets)
        bundle = dataclasses.replace(bundle, path=output)
    _print(bundle)


def _add(values: flags.FlagValues, targets: dict[str, str]) -> Bundle:
    """Adds targets to a bundle; the caller holds a lock, so that no other process changes the bundle meanwhile."""
    for name in clear_unnamed(Path(values.bundle)):
        note(f"{values.bundle}: removed {name}, left by a run that was stopped")
    bundle = open_bundle(values.bundle)
    profile_for(values.target, bundle.manifest["profile"])
    for target, python in targets.items():
        check_toolchain(target, python)
    return _build(bundle, targets)


def _build(bundle: Bundle, targets: dict[str, str]) -> Bundle:
    """Adds targets, each built with its Python."""
    for target, python in targets.items():
        with spinner(f"building {target}"):
            bundle = add_target(bundle, target, python)
    return bundle


def _write(values: flags.FlagValues, folder: Path, profile: str) -> Bundle:
    opened = open_named(values, values.model)
    tokenizer = tokenizer_if_any(values, opened)
    try:
        buckets = tuple(int(bucket) for bucket in values.buckets)
    except ValueError:
        raise LlamaJaxError(
            f"--buckets={','.join(values.buckets)}: expected whole numbers, separated by commas"
        ) from None
    slots = values.slots or min(opened.config.context_length, 512)
    spec = Spec(
        batch=values.batch,
        slots=slots,
        cache_dtype=values.kv_cache,
        buckets=tuple(bucket for bucket in buckets if bucket <= slots) or buckets,
        programs=tuple(values.programs),
        drafts=values.drafts,
        profile=PROFILES[profile],
    )
    model = read_model(opened, chosen_dtype(values), activations=chosen_activations(values))
    notes: list[str] = []
    named = {"source": opened.description, "template": values.template, "on_note": notes.append}
    with spinner(f"writing {values.output}"):
        bundle = write(model, tokenizer, folder, spec, **named)
    for line in notes:
        note(line)
    return bundle


def _print(bundle: Bundle) -> None:
    manifest = bundle.manifest
    table = Table(box=None, pad_edge=False)
    for column in ("program", "inputs", "operations", "bytes"):
        table.add_column(column, justify="right" if column in ("operations", "bytes") else "left")
    for name, program in manifest["programs"].items():
        inputs = ", ".join(f"{value['name']} {value['dtype']}{value['shape']}" for value in program["inputs"])
        size = manifest["files"][program["file"]]["bytes"]
        table.add_row(name, inputs, str(sum(program["operations"].values())), str(size))
    show(table)
    weights = manifest["files"]["weights.safetensors"]["bytes"]
    targets = ", ".join(manifest["targets"]) or "none"
    note(
        f"{bundle.path}: {readable_bytes(stored_bytes(bundle.path))}, of it {readable_bytes(weights)} weights; profile "
        f"{manifest['profile']}, targets: {targets}"
    )
