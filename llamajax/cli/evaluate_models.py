"""The models that `llamajax eval` measures: the layout they are measured in, their sizes, and errors about them."""

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
    """Whose layout weights are measured in; None for the reference products of the format at rest."""
    return None if values.reference_products else jax.default_backend()


def products(values: flags.FlagValues) -> str:
    """The same in words."""
    backend = layout(values)
    return f"prepared for {backend}" if backend else "reference"


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """Says of which model an error is."""
    try:
        yield
    except LlamaJaxError as error:
        raise LlamaJaxError(f"{name}: {error}") from None


def check_named(values: flags.FlagValues) -> None:
    """Refuses a list of models with a hole in it, and a batch of nothing."""
    if not values.model or not all(values.model):
        raise LlamaJaxError(f"--model={','.join(values.model)}: expected a model, or several separated by commas")


def size_of(checkpoint: Opened) -> dict[str, Any]:
    """Of the weights as the checkpoint holds them, whatever dtype they were measured in."""
    size = memory_bytes(checkpoint.abstract)
    return {
        "bits_per_weight": 8 * size / checkpoint.config.num_parameters,
        "bytes_in_memory": size,
        "bytes_on_disk": stored_bytes(checkpoint.path),
    }


def size_cells(result: dict[str, Any]) -> list[str]:
    """What `size_of` says, in the cells of a table."""
    return [
        f"{result['bits_per_weight']:.2f}",
        readable_bytes(result["bytes_in_memory"]),
        readable_bytes(result["bytes_on_disk"]),
    ]


def without_infinities(value: Any) -> Any:
    """For JSON, which has none: null stands for the infinite ratio of what has no error, or no signal."""
    if isinstance(value, dict):
        return {key: without_infinities(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value
