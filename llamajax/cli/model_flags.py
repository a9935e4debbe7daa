"""The flags of a model that is read or run, and what they ask for."""

import jax
import jax.numpy as jnp
from absl import flags

from llamajax.allocator import large_blocks_apart
from llamajax.checkpoint import Opened, need_tokenizer, open_checkpoint, read_tokenizer
from llamajax.cli.terminal import note, progress
from llamajax.model import Llama
from llamajax.prepare import ACTIVATIONS
from llamajax.tokenizer import Tokenizer

_DTYPES = ("float32", "bfloat16", "float16")


def define_model(values: flags.FlagValues, default: str | None = "box", several: bool = False) -> None:
    """--model, which may be several with commas between, --tokenizer and --ignore_key."""
    text = "a llamajax or Hugging Face folder, a GGUF or llama2.c file, or box"
    if several:
        flags.DEFINE_list("model", default, f"checkpoints, commas between: each {text}", flag_values=values)
    else:
        flags.DEFINE_string("model", default, f"checkpoint: {text}", flag_values=values)
    flags.DEFINE_string(
        "tokenizer",
        None,
        "tokenizer.model, tokenizer.json or tokenizer.bin, where none came with the checkpoint",
        flag_values=values,
    )
    define_ignore_key(values)


def define_ignore_key(values: flags.FlagValues) -> None:
    """--ignore_key of a command that opens a model."""
    flags.DEFINE_multi_string(
        "ignore_key",
        [],
        "key of a Hugging Face config.json, or of a GGUF file's metadata, to read over: unknown, and changing no "
        "forward pass; repeat the flag for several",
        flag_values=values,
    )


def define_parse_special(values: flags.FlagValues) -> None:
    """--parse_special of a command that encodes a text."""
    flags.DEFINE_boolean(
        "parse_special",
        False,
        "take special tokens in the text, as <|im_start|>, for the ids that they stand for; without, they are spelt, "
        "because nobody should be able to slip them in",
        flag_values=values,
    )


def define_dtype(values: flags.FlagValues) -> None:
    """--dtype of a model that is run."""
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", *_DTYPES],
        "dtype to compute in; auto is float32 on a CPU, where XLA multiplies 16-bit floats many times slower, and as "
        "stored elsewhere",
        flag_values=values,
    )


def define_activations(values: flags.FlagValues) -> None:
    """--activations of a model that is run."""
    flags.DEFINE_enum(
        "activations",
        "auto",
        ["auto", *ACTIVATIONS],
        "what quantized weights are multiplied with: float32, exactly; bfloat16, rounded to 8 bits of precision, with "
        "which prefill is faster on CPUs that multiply 16-bit floats (AVX512-BF16, AMX); int8, a scale for each group, "
        "as llama.cpp does. auto is what the checkpoint says, float32 unless its recipe chose",
        flag_values=values,
    )


def define_threads(values: flags.FlagValues) -> None:
    """--threads of a command that computes; `cli.main` applies it, before a backend starts."""
    flags.DEFINE_integer(
        "threads",
        None,
        "threads that XLA computes with on a CPU: 1 to the processors that the process may use; all of them unless "
        "given. Programs are compiled for a number of threads, and kept for each. Reading and compiling have threads "
        "of their own",
        lower_bound=1,
        flag_values=values,
    )


def chosen_activations(values: flags.FlagValues) -> str | None:
    """What --activations asks for; None for what the checkpoint says."""
    return None if values.activations == "auto" else values.activations


def open_model(values: flags.FlagValues) -> tuple[Opened, Tokenizer]:
    """The checkpoint and the tokenizer that the flags name; no weight is read yet."""
    opened = open_named(values, values.model)
    return opened, need_tokenizer(opened, values.tokenizer)


def open_named(values: flags.FlagValues, name: str) -> Opened:
    """A checkpoint as the flags say; what of its files is not used goes to stderr, a line each."""
    opened = open_checkpoint(name, ignore_keys=values.ignore_key)
    for sentence in opened.notes:
        say(sentence)
    return opened


def tokenizer_if_any(values: flags.FlagValues, opened: Opened) -> Tokenizer | None:
    """The tokenizer, for what can do without; one that came and cannot be read is said on stderr."""
    tokenizer = read_tokenizer(opened, values.tokenizer)
    if tokenizer is None and opened.tokenizer_problem:
        say(f"{opened.tokenizer_problem}: going on without it")
    return tokenizer


def say(text: str) -> None:
    """A line on standard error, under our name."""
    note(f"llamajax: {' '.join(text.split())}")


def chosen_dtype(values: flags.FlagValues, backend: str | None = None) -> jax.typing.DTypeLike | None:
    """What --dtype asks for on a backend, the one here unless given; None for what the checkpoint is stored in."""
    if values.dtype == "auto":
        return jnp.float32 if (backend or jax.default_backend()) == "cpu" else None
    return values.dtype


def read_model(opened: Opened, dtype: jax.typing.DTypeLike | None, **options: str | None) -> Llama:
    """Reads the weights behind a progress bar; options as of `Opened.read`."""
    with large_blocks_apart(), progress("reading weights") as on_weight:
        return opened.read(dtype, on_weight=on_weight, **options)
