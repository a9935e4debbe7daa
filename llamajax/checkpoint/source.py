"""Defines `Source`, a reader's description of a checkpoint: its weights, their order in the files, and how to read one.

Readers identify each weight of each layer by a `parameters.Place`, and return it in llamajax's orientation and RoPE
layout.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from llamajax.config import Config
from llamajax.parameters import Place, specs
from llamajax.words import Words


class Stored(NamedTuple):
    """The form of a weight in a file.

    Attributes:
        type: the format's name of its type.
        nbytes: number of bytes in the file.
    """

    type: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that was recognised and whose header was checked; no weight has been read yet.

    Attributes:
        description: format and version, as text for users.
        config: the architecture.
        abstract: every weight with `jax.ShapeDtypeStruct`s for arrays: a float array, or packed as it is stored.
        order: every weight once, in the order in which the files hold them.
        read: reads one weight, with NumPy arrays, which may be views. A float array may have another dtype than in
            `abstract`; the caller converts it.
        fill: reads several weights at once into NumPy arrays of their shapes and dtypes; None if the reader cannot.
        is_checked: whether checksums guarantee that weights are as they were saved, and so finite.
        tokenizer_bytes: the tokenizer that came with the checkpoint, or None; its form may be one that cannot be read.
        words: settings for text beside the tokenizer.
        notes: parts of the files that are not used, with reasons, as text for users.
        tokenizer_problem: why a tokenizer that came with it cannot be read; None if it can, or if there is none.
        expanded: which weights are floats in memory but packed in the files, as text for users; "" for none.
        stored: the form of each weight in the files, where it differs from that in memory.
        metadata: everything else in the files, by key, to be shown to users.
    """

    description: str
    config: Config
    abstract: Mapping[Place, Any]
    order: tuple[Place, ...]
    read: Callable[[Place], Any]
    fill: Callable[[Sequence[Place], Sequence[Any]], None] | None = None
    is_checked: bool = False
    tokenizer_bytes: bytes | None = None
    words: Words = Words()
    notes: tuple[str, ...] = ()
    tokenizer_problem: str | None = None
    expanded: str = ""
    stored: Mapping[Place, Stored] = dataclasses.field(default_factory=dict)
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def float_weights(config: Config, dtype: Any) -> dict[Place, jax.ShapeDtypeStruct]:
    """Returns every weight of a model as an abstract array of one float type."""
    return {place: jax.ShapeDtypeStruct(spec.shape(config), np.dtype(dtype)) for place, spec in specs(config).items()}


def halves_order(rows: int, head_size: int) -> np.ndarray:
    """Returns, for each row of a query or key projection in our layout, its row in Meta's RoPE layout: int [heads * H].

    Meta rotates neighbours (2i, 2i + 1), we rotate (i, i + H/2): row 2i goes to i, row 2i + 1 to i + H/2.
    """
    return np.arange(rows).reshape(-1, head_size // 2, 2).swapaxes(1, 2).reshape(-1)


def halves_from_pairs(matrix: np.ndarray, head_size: int) -> np.ndarray:
    """Reorders the rows of a query or key projection [heads * H, D] from Meta's RoPE layout to ours."""
    return matrix[halves_order(len(matrix), head_size)]
