"""What every reader says of a checkpoint: which weights it holds, in which order, and how one is read.

Readers speak of weights as `parameters.Place`s, one layer's at a time, in our orientation and RoPE layout.
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
    """What a weight is in a file.

    Attributes:
        type: by the format's name.
        nbytes: that it takes there.
    """

    type: str
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint that was recognised and whose header was checked; no weight has been read yet.

    Attributes:
        description: format and version, for people.
        config: the architecture.
        abstract: every weight with `jax.ShapeDtypeStruct`s for arrays: a float array, or packed as it is stored.
        order: every weight once, in the order in which the files hold them.
        read: reads one weight, of NumPy arrays, which may be views; a float array may be of another type than in
            `abstract`, and is converted.
        fill: reads several weights at once into NumPy arrays of their shapes and dtypes, if the reader can.
        is_checked: whether what was read is known to be what was saved, and so to be finite.
        tokenizer_bytes: the tokenizer that came with it, if one did, of whatever form; it may be none that is read.
        words: what it says of words beside that.
        notes: what of the files is not used, and why, for people.
        tokenizer_problem: why a tokenizer that came with it cannot be read; None if it can, or if none came.
        expanded: which weights are floats in memory, but are not in the files, for people; "" for none.
        stored: what each weight is in the files, where that is another thing than in memory.
        metadata: what else the files say, by key, for people.
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
    """Every weight of a model as an abstract array of one float type."""
    return {place: jax.ShapeDtypeStruct(spec.shape(config), np.dtype(dtype)) for place, spec in specs(config).items()}


def halves_order(rows: int, head_size: int) -> np.ndarray:
    """Which row of a query or key projection in Meta's RoPE layout is each row of ours, int [heads * H].

    Meta rotates neighbours (2i, 2i + 1), we rotate (i, i + H/2): row 2i goes to i, row 2i + 1 to i + H/2.
    """
    return np.arange(rows).reshape(-1, head_size // 2, 2).swapaxes(1, 2).reshape(-1)


def halves_from_pairs(matrix: np.ndarray, head_size: int) -> np.ndarray:
    """Reorders the rows of a query or key projection [heads * H, D] from Meta's RoPE layout to ours."""
    return matrix[halves_order(len(matrix), head_size)]
