"""`llamajax quantize`: a checkpoint with packed weights."""

import sys
from pathlib import Path

from absl import flags

from llamajax.checkpoint import check_absent, open_checkpoint, read_tokenizer, save_checkpoint
from llamajax.cli.common import define_model, progress, read_model, readable_bytes, spinner, stored_bytes
from llamajax.errors import LlamaJaxError
from llamajax.quantize import quantize, read_recipe, recipe_names

SUMMARY = "pack weights into 8, 6, 5, 4, 3 or 2 bits by a recipe"
EXAMPLES = (
    "llamajax quantize --model=box --recipe=int4-g32 --output=box-int4",
    "llamajax generate --model=box-int4 --prompt='Once upon a time'",
    "llamajax quantize --model=path/to/TinyLlama --recipe=my_recipe.toml --output=tinyllama-mixed",
)


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values, default=None)
    names = ", ".join(recipe_names())
    flags.DEFINE_string("recipe", "int4-g32", f"a .toml file, or one of {names}", flag_values=values)
    flags.DEFINE_string("output", None, "folder to write; must not exist", flag_values=values)


def run(values: flags.FlagValues) -> None:
    """Reads, quantizes, writes; the folder appears whole or not at all."""
    if not values.model or not values.output:
        raise LlamaJaxError("--model and --output are both needed: see llamajax quantize --help")
    output = Path(values.output)
    check_absent(output)
    rules = read_recipe(values.recipe)
    opened = open_checkpoint(values.model)
    tokenizer = read_tokenizer(opened, values.tokenizer)
    model = read_model(opened, None)
    with progress("quantizing") as on_weight:
        model = quantize(model, rules, on_weight)
    with spinner(f"writing {output}"):
        source = f"{opened.description}, quantized by {values.recipe}"
        save_checkpoint(model, output, tokenizer=tokenizer, source=source)
    size = stored_bytes(output)
    bits = 8 * size / opened.config.num_parameters
    print(f"{output}: {readable_bytes(size)}, {bits:.2f} bits a weight on disk, {values.recipe}", file=sys.stderr)
