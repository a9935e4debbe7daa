"""Helpers of `llamajax eval` for the models that it measures: weight layout, sizes, and errors."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax
from absl import flags

from llamajax.checkpoint import Opened
from llamajax.cli.sizes import memory_bytes, readable_bytes, stored_bytes
from llamajax.errors import LlamaJaxError


def layout(values: flags.FlagValues) -> str | None:
    """The backend whose weight layout is measured; None for reference products with the stored layout."""
    return None if values.reference_products else jax.default_backend()


def products(values: flags.FlagValues) -> str:
    """The layout that `layout` chooses, in words."""
    backend = layout(values)
    return f"prepared for {backend}" if backend else "reference"


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Puts the model's name before the message of any error inside the block."""
    try:
        yield
    except LlamaJaxError as error:
        raise LlamaJaxError(f"{name}: {error}") from None


def check_named(values: flags.FlagValues) -> None:
    """Refuses a list of models that is empty or has an empty name in it."""
    if not values.model or not all(values.model):
        raise LlamaJaxError(f"--model={','.join(values.model)}: expected a model, or several separated by commas")


def size_of(checkpoint: Opened) -> dict[str, Any]:
    """Sizes of the weights as the checkpoint stores them, whatever dtype they were measured in."""
    size = memory_bytes(checkpoint.abstract)
    return {
        "bits_per_weight": 8 * size / checkpoint.config.num_parameters,
        "bytes_in_memory": size,
        "bytes_on_disk": stored_bytes(checkpoint.path),
    }


def size_cells(result: dict[str, Any]) -> list[str]:
    """The sizes that `size_of` returns, as table cells."""
    return [
        f"{result['bits_per_weight']:.2f}",
        readable_bytes(result["bytes_in_memory"]),
        readable_bytes(result["bytes_on_disk"]),
    ]


def without_infinities(value: Any) -> Any:
    """Replaces infinities by None, because JSON has none: a ratio is infinite without error or without signal."""
    if isinstance(value, dict):
        return {key: without_infinities(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value
