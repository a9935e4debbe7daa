"""`llamajax convert`: writes a checkpoint in another format or another dtype."""

from pathlib import Path
from typing import Any

from absl import flags

from llamajax.checkpoint import save_checkpoint
from llamajax.checkpoint.gguf import check_name as check_gguf_name
from llamajax.cli.flag_groups import COMMON, group
from llamajax.cli.model_flags import define_model, open_named, read_model, tokenizer_if_any
from llamajax.cli.sizes import readable_bytes, stored_bytes
from llamajax.cli.terminal import note, spinner
from llamajax.errors import LlamaJaxError
from llamajax.files import check_absent
from quant import quantized

SUMMARY = "write a model in another format: llamajax, Hugging Face or GGUF"
EXAMPLES = (
    "llamajax convert --model=path/to/Llama-3.2-1B --output=llama3.2-1b",
    "llamajax convert --model=any-llama.gguf --to=huggingface --dtype=bfloat16 --output=llama-hf",
    "llamajax convert --model=box-int4 --to=gguf --output=box-int4.gguf",
)


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values, default=None)
    with group(values, COMMON):
        flags.DEFINE_string(
            "output", None, "Writes to `PATH`, a folder, or a file for GGUF. It must not exist.", flag_values=values
        )
        flags.DEFINE_enum(
            "to", "llamajax", ["llamajax", "huggingface", "gguf"], "`FORMAT` to write.", flag_values=values
        )
        flags.DEFINE_enum(
            "dtype",
            None,
            ["float32", "bfloat16", "float16"],
            "Writes numbers of this `TYPE`. Without this flag it is the type of the stored weights. With --to=gguf, "
            "packed weights become floats of this type.",
            flag_values=values,
        )


def run(values: flags.FlagValues) -> None:
    """Reads, converts and writes a model; the folder or file appears whole or not at all."""
    if not values.model or not values.output:
        raise LlamaJaxError("--model or --output is missing: expected both (see llamajax convert --help)")
    output = Path(values.output)
    check_absent(output)
    if values.to == "gguf":
        check_gguf_name(output)
    opened = open_named(values, values.model)
    tokenizer = tokenizer_if_any(values, opened) or opened.tokenizer_bytes
    if values.dtype and values.to != "gguf" and quantized(opened.abstract):
        raise LlamaJaxError(
            f"--dtype={values.dtype}: the weights of {values.model} are quantized, and --to={values.to} keeps them "
            "quantized: leave --dtype out, or write floats with --to=gguf --dtype=float32"
        )
    dtype, written = (None, values.dtype) if values.to == "gguf" else (values.dtype, None)
    model = read_model(opened, dtype, shardings="host")
    with spinner(f"writing {output}"):
        said: dict[str, Any] = {"tokenizer": tokenizer, "words": opened.words, "source": opened.description}
        save_checkpoint(model, output, form=values.to, dtype=written, **said)
    note(f"{output}: {readable_bytes(stored_bytes(output))}, {values.to}, from {opened.description}")
