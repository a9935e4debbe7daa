"""The flags of a model that is read or run, and what they ask for."""

import jax
import jax.numpy as jnp
from absl import flags

from llamajax.checkpoint import Opened, open_checkpoint, read_tokenizer
from llamajax.cli.terminal import progress
from llamajax.errors import LlamaJaxError
from llamajax.model import Llama
from llamajax.prepare import ACTIVATIONS
from llamajax.tokenizer import Tokenizer

_DTYPES = ("float32", "bfloat16", "float16")


def define_model(values: flags.FlagValues, default: str | None = "box", several: bool = False) -> None:
    """--model, which may be several with commas between, and --tokenizer."""
    text = "a llamajax or Hugging Face folder, a llama2.c file, or box"
    if several:
        flags.DEFINE_list("model", default, f"checkpoints, commas between: each {text}", flag_values=values)
    else:
        flags.DEFINE_string("model", default, f"checkpoint: {text}", flag_values=values)
    flags.DEFINE_string(
        "tokenizer", None, "sentencepiece tokenizer.model, where none came with the checkpoint", flag_values=values
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


def chosen_activations(values: flags.FlagValues) -> str | None:
    """What --activations asks for; None for what the checkpoint says."""
    return None if values.activations == "auto" else values.activations


def open_model(values: flags.FlagValues) -> tuple[Opened, Tokenizer]:
    """The checkpoint and the tokenizer that the flags name; no weight is read yet."""
    opened = open_checkpoint(values.model)
    tokenizer = read_tokenizer(opened, values.tokenizer)
    if tokenizer is None:
        raise LlamaJaxError(f"{values.model}: no tokenizer came with it: give --tokenizer=PATH of its tokenizer.model")
    return opened, tokenizer


def chosen_dtype(values: flags.FlagValues) -> jax.typing.DTypeLike | None:
    """What --dtype asks for; None for the dtype that the checkpoint is stored in."""
    if values.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else None
    return values.dtype


def read_model(opened: Opened, dtype: jax.typing.DTypeLike | None, **options: str | None) -> Llama:
    """Reads the weights behind a progress bar; options as of `Opened.read`."""
    with progress("reading weights") as on_tensor:
        return opened.read(dtype, on_tensor=on_tensor, **options)
