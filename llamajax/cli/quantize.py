"""`llamajax quantize`: writes a checkpoint with packed weights."""

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from llamajax.checkpoint import Opened, need_tokenizer, save_checkpoint
from llamajax.cli.flag_groups import COMMON, OUTPUT, group
from llamajax.cli.model_flags import define_model, define_threads, open_named, tokenizer_if_any
from llamajax.cli.sizes import readable_bytes, stored_bytes
from llamajax.cli.terminal import note, progress, spinner
from llamajax.errors import LlamaJaxError
from llamajax.evaluation.evaluate import encode_documents, read_documents
from llamajax.files import check_absent
from llamajax.model import Llama
from llamajax.parameters import named_weights
from llamajax.quantization.calibrate import calibration_windows
from llamajax.quantization.own_text import own_text
from llamajax.quantization.quantize import quantize, read_recipe, recipe_names
from llamajax.quantization.resume import remove_parts
from llamajax.tokenizer import Tokenizer
from llamajax.train import story_texts
from quant import Recipe, quantized

SUMMARY = "make a model smaller: pack its weights into 8 to 2 bits"
EXAMPLES = (
    "llamajax quantize --model=path/to/Llama-3.2-1B --output=llama-4.5",
    "llamajax quantize --model=path/to/Llama-3.2-1B --calibration=my.txt --bits=3.5 --output=llama-3.5",
    "llamajax quantize --model=box --recipe=int4-g32 --output=box-int4",
)
# Number of generated stories for `--calibration=stories`; they are not the stories that `llamajax eval` measures on.
_CALIBRATION_STORIES = 1000
# The default recipes without and with a calibration text.
_DEFAULTS = "uncalibrated", "calibrated"


def define(values: flags.FlagValues) -> None:
    """Flags of the command."""
    define_model(values, default=None)
    with group(values, COMMON):
        flags.DEFINE_string(
            "output",
            None,
            "Writes to `FOLDER`, which must not exist. With a calibration text, finished parts are kept in "
            "FOLDER.work, and the same command continues where it was stopped.",
            flag_values=values,
        )
        flags.DEFINE_string(
            "recipe",
            None,
            f"Recipe to follow: a .toml `FILE`, or one of {', '.join(recipe_names())}. Without this flag it is "
            f"{_DEFAULTS[1]} with --calibration and {_DEFAULTS[0]} without.",
            flag_values=values,
        )
        flags.DEFINE_float(
            "bits",
            None,
            "Average bits per weight of the whole model, scales included, such as 4.5 or 3. Each weight gets the bits "
            "that reduce the error most. Below 4.5 these include 2 and 3, which decode fewer bytes per second. Without "
            "this flag the recipe decides.",
            flag_values=values,
        )
        flags.DEFINE_alias("target_bpw", "bits", flag_values=values)
    with group(values, "Calibration"):
        flags.DEFINE_string(
            "calibration",
            None,
            "Runs the model on a text to see which errors matter: a UTF-8 `FILE` of texts like those that the model is "
            "for, separated by <|endoftext|>; stories, which the included model was trained on; or self, text that the "
            "model itself generates. The result is better at the same size, and takes minutes instead of seconds.",
            flag_values=values,
        )
        flags.DEFINE_integer(
            "calibration_tokens",
            16384,
            "Uses `N` tokens of that text. Half as many take two thirds of the time, and the KL divergence is then "
            "about 1.3 times as large.",
            flag_values=values,
        )
        flags.DEFINE_integer("context", 512, "Runs the model on `N` tokens of that text at a time.", flag_values=values)
    define_threads(values)
    with group(values, OUTPUT):
        flags.DEFINE_enum(
            "types",
            None,
            ["ggml"],
            "`ggml` restricts the recipe to formats that GGUF files hold without loss, so that llamajax convert "
            "--to=gguf writes the same weights bit for bit. A rule that needs another format is an error.",
            flag_values=values,
        )


def run(values: flags.FlagValues) -> None:
    """Reads, quantizes and writes a model; the folder appears whole or not at all."""
    if not values.model or not values.output:
        raise LlamaJaxError("--model or --output is missing: expected both (see llamajax quantize --help)")
    output = Path(values.output)
    check_absent(output)
    name = values.recipe or _DEFAULTS[bool(values.calibration)]
    recipe = _with_target(read_recipe(name), values.bits)
    if recipe.needs_calibration and not values.calibration:
        raise LlamaJaxError(f"recipe {name} needs a text to run the model on: add --calibration=FILE")
    if values.calibration and not recipe.needs_calibration:
        raise LlamaJaxError(f"recipe {name} does not use --calibration: leave it out, or choose another recipe")
    opened = open_named(values, values.model)
    tokenizer: Tokenizer | bytes | None
    if recipe.needs_calibration:
        tokenizer = need_tokenizer(opened, values.tokenizer)
        windows_WT = _calibration_windows(values, opened, tokenizer)
    else:
        tokenizer, windows_WT = tokenizer_if_any(values, opened) or opened.tokenizer_bytes, None
    notes: list[str] = []
    work = output.absolute().with_name(f"{output.name}.work")
    with progress("quantizing") as on_weight:
        bos_id = tokenizer.first_id if isinstance(tokenizer, Tokenizer) else None
        with_text: dict[str, Any] = {"calibration": windows_WT, "bos_id": bos_id, "work": work}
        model = quantize(opened, recipe, on_weight=on_weight, types=values.types, on_note=notes.append, **with_text)
    for line in notes:
        note(line)
    _report_other_groups(model, recipe)
    with spinner(f"writing {output}"):
        source = f"{opened.description}, quantized by {name}"
        save_checkpoint(model, output, tokenizer=tokenizer, words=opened.words, source=source)
    remove_parts(work)
    size = stored_bytes(output)
    bits = 8 * size / opened.config.num_parameters
    note(f"{output}: {readable_bytes(size)}, {bits:.2f} bits a weight on disk, {name}")


def _with_target(recipe: Recipe, target_bpw: float | None) -> Recipe:
    try:
        return recipe if target_bpw is None else recipe.with_target(target_bpw)
    except ValueError as error:
        raise LlamaJaxError(str(error)) from None


def _calibration_windows(values: flags.FlagValues, opened: Opened, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the beginning of the calibration text in windows, int32 [W, T]."""
    window = min(values.context, opened.config.context_length)
    if values.calibration_tokens < max(1, window):
        expected = f"expected at least {max(1, window)}, one window of --context"
        raise LlamaJaxError(f"--calibration_tokens={values.calibration_tokens}: {expected}")
    if values.calibration == "self":
        with progress("sampling a text") as on_tokens:
            ids = own_text(opened.read(), tokenizer, values.calibration_tokens, length=window, on_tokens=on_tokens)
    elif values.calibration == "stories":
        ids = encode_documents(tokenizer, story_texts(_CALIBRATION_STORIES).training)
    else:
        ids = encode_documents(tokenizer, read_documents(values.calibration))
    # Windows that begin with documents leave out the rest of others: more of the text makes up for it.
    windows_WT = calibration_windows(ids, opened.config, window, tokenizer.first_id)
    return windows_WT[: values.calibration_tokens // window]


def _report_other_groups(model: Llama, recipe: Recipe) -> None:
    """Notes each weight whose inputs do not divide into the recipe's groups, so that a rule's `indivisible` decided."""
    sizes = [rule.group_size for rule in recipe.rules if rule.indivisible and isinstance(rule.group_size, int)]
    for name, weight in named_weights(model).items():
        for part in quantized(weight):
            inputs = part.shape[part.axis]
            if sizes and all(inputs % size for size in sizes):
                note(f"{name}: {inputs} inputs: {part.scheme.name} in groups of {part.group_size}")
