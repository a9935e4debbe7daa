"""What several commands share: the flags that name a model, progress bars, tables."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llamajax.checkpoint import Opened, need_tokenizer, open_checkpoint, read_tokenizer
from llamajax.model import Llama
from llamajax.prepare import ACTIVATIONS
from llamajax.tokenizer import Tokenizer

_DTYPES = ("float32", "bfloat16", "float16")


def define_model(values: flags.FlagValues, default: str | None = "box", several: bool = False) -> None:
    """--model, which may be several with commas between, --tokenizer and --ignore_key."""
    text = "a llamajax or Hugging Face folder, a llama2.c file, or box"
    if several:
        flags.DEFINE_list("model", default, f"checkpoints, commas between: each {text}", flag_values=values)
    else:
        flags.DEFINE_string("model", default, f"checkpoint: {text}", flag_values=values)
    flags.DEFINE_string(
        "tokenizer", None, "sentencepiece tokenizer.model, where none came with the checkpoint", flag_values=values
    )
    define_ignore_key(values)


def define_ignore_key(values: flags.FlagValues) -> None:
    """--ignore_key of a command that opens a model."""
    flags.DEFINE_multi_string(
        "ignore_key",
        [],
        "key of a Hugging Face config.json to read over, if it is unknown and changes no forward pass; repeat the flag "
        "for several",
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
    for note in opened.notes:
        say(note)
    return opened


def tokenizer_if_any(values: flags.FlagValues, opened: Opened) -> Tokenizer | None:
    """The tokenizer, for what can do without; one that came and cannot be read is said on stderr."""
    tokenizer = read_tokenizer(opened, values.tokenizer)
    if tokenizer is None and opened.tokenizer_problem:
        say(f"{opened.tokenizer_problem}: going on without it")
    return tokenizer


def say(note: str) -> None:
    """A line on stderr."""
    print(f"llamajax: {' '.join(note.split())}", file=sys.stderr)


def chosen_dtype(values: flags.FlagValues) -> jax.typing.DTypeLike | None:
    """What --dtype asks for; None for the dtype that the checkpoint is stored in."""
    if values.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else None
    return values.dtype


def read_model(opened: Opened, dtype: jax.typing.DTypeLike | None, **options: str | None) -> Llama:
    """Reads the weights behind a progress bar; options as of `Opened.read`."""
    with progress("reading weights") as on_tensor:
        return opened.read(dtype, on_tensor=on_tensor, **options)


@contextlib.contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr: call what it yields with (done, total). Silent where stderr is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextlib.contextmanager
def spinner(label: str) -> Iterator[None]:
    """A sign of life on stderr for work that does not say how far it is. Silent where stderr is not a terminal."""
    console = Console(stderr=True)
    with console.status(label) if console.is_terminal else contextlib.nullcontext():
        yield


def table_console() -> Console:
    """Standard output for tables: as wide as the terminal, or as they need where it is a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False)


def stored_bytes(path: Path) -> int:
    """What a file, or the files of a folder, take on disk."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def memory_bytes(tree: Any) -> int:
    """What the arrays of a model take in memory; they may be abstract."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def readable_bytes(size: int) -> str:
    """Bytes for people: 1.23 MiB, 4.56 GiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"
