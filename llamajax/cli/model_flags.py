"""The flags of a command that reads or runs a model, and functions that turn them into library arguments."""

import jax
import jax.numpy as jnp
from absl import flags

from llamajax.allocator import large_blocks_apart
from llamajax.checkpoint import Opened, need_tokenizer, open_checkpoint, read_tokenizer
from llamajax.cli.flag_groups import COMMON, MODEL, SPEED, group
from llamajax.cli.terminal import note, progress
from llamajax.model import Llama
from llamajax.prepare import ACTIVATIONS
from llamajax.tokenizer import Tokenizer

# What --model takes, for help texts.
A_MODEL = "a llamajax or Hugging Face folder, a GGUF or llama2.c file, or box, the small model that is included"

_DTYPES = ("float32", "bfloat16", "float16")


def define_model(values: flags.FlagValues, default: str | None = "box", several: bool = False) -> None:
    """--model, which may be a list separated by commas, --tokenizer and --ignore_key."""
    with group(values, COMMON):
        if several:
            text = f"`MODELS` to measure, separated by commas. Each is {A_MODEL}."
            flags.DEFINE_list("model", default, text, flag_values=values)
        else:
            flags.DEFINE_string("model", default, f"`MODEL` to read: {A_MODEL}.", flag_values=values)
    with group(values, MODEL):
        flags.DEFINE_string(
            "tokenizer",
            None,
            "Tokenizer `FILE` for a model that comes without one: tokenizer.model, tokenizer.json or tokenizer.bin.",
            flag_values=values,
        )
    define_ignore_key(values)


def define_ignore_key(values: flags.FlagValues) -> None:
    """--ignore_key of a command that opens a model."""
    with group(values, MODEL):
        flags.DEFINE_multi_string(
            "ignore_key",
            [],
            "Ignores the unknown key `NAME` in config.json of a Hugging Face folder, or in the metadata of a GGUF "
            "file. Without this flag an unknown key is an error, because it may change the results. May be repeated.",
            flag_values=values,
        )


def define_parse_special(values: flags.FlagValues) -> None:
    """--parse_special of a command that encodes a text."""
    flags.DEFINE_boolean(
        "parse_special",
        False,
        "Encodes special tokens that are written in the text, such as <|im_start|>, as their ids. Without this flag "
        "they are ordinary characters.",
        flag_values=values,
    )


def define_dtype(values: flags.FlagValues) -> None:
    """--dtype of a model that is run."""
    with group(values, SPEED):
        flags.DEFINE_enum(
            "dtype",
            "auto",
            ["auto", *_DTYPES],
            "Computes in numbers of this `TYPE`. auto is float32 on a CPU, where 16-bit floats are slow, and the type "
            "of the stored weights elsewhere.",
            flag_values=values,
        )


def define_activations(values: flags.FlagValues) -> None:
    """--activations of a model that is run."""
    with group(values, SPEED):
        flags.DEFINE_enum(
            "activations",
            "auto",
            ["auto", *ACTIVATIONS],
            "Rounds the inputs of quantized weights to this `TYPE`. float32 does not round. bfloat16 makes prefill "
            "faster on CPUs with AVX512-BF16 or AMX. int8 uses one scale for each group, as llama.cpp does. auto "
            "follows the model's recipe, or is float32.",
            flag_values=values,
        )


def define_threads(values: flags.FlagValues) -> None:
    """--threads of a command that computes; `cli.main` applies it, before a backend starts."""
    with group(values, SPEED):
        flags.DEFINE_integer(
            "threads",
            None,
            "Computes with `N` threads on a CPU. Without this flag one thread runs on each processor that the process "
            "may use. Reading and compiling use threads of their own.",
            lower_bound=1,
            flag_values=values,
        )


def chosen_activations(values: flags.FlagValues) -> str | None:
    """The value of --activations; None if the checkpoint decides."""
    return None if values.activations == "auto" else values.activations


def open_model(values: flags.FlagValues) -> tuple[Opened, Tokenizer]:
    """Opens the checkpoint and the tokenizer that the flags name; no weight is read yet."""
    opened = open_named(values, values.model)
    return opened, need_tokenizer(opened, values.tokenizer)


def open_named(values: flags.FlagValues, name: str) -> Opened:
    """Opens a checkpoint by name; prints one line to stderr for each thing in its files that is not used."""
    opened = open_checkpoint(name, ignore_keys=values.ignore_key)
    for sentence in opened.notes:
        say(sentence)
    return opened


def tokenizer_if_any(values: flags.FlagValues, opened: Opened) -> Tokenizer | None:
    """The tokenizer, for commands that work without one; if it exists but cannot be read, a line on stderr says so."""
    tokenizer = read_tokenizer(opened, values.tokenizer)
    if tokenizer is None and opened.tokenizer_problem:
        say(f"{opened.tokenizer_problem}: continuing without a tokenizer")
    return tokenizer


def say(text: str) -> None:
    """Writes a line to standard error, after the program's name."""
    note(f"llamajax: {' '.join(text.split())}")


def chosen_dtype(values: flags.FlagValues, backend: str | None = None) -> jax.typing.DTypeLike | None:
    """The dtype to compute in on `backend`, by default this machine's; None for the dtype of the checkpoint."""
    if values.dtype == "auto":
        return jnp.float32 if (backend or jax.default_backend()) == "cpu" else None
    return values.dtype


def read_model(opened: Opened, dtype: jax.typing.DTypeLike | None, **options: str | None) -> Llama:
    """Reads the weights with a progress bar; options are those of `Opened.read`."""
    with large_blocks_apart(), progress("reading weights") as on_weight:
        return opened.read(dtype, on_weight=on_weight, **options)
