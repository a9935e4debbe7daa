"""Sizes of models, on disk and in memory."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np


def stored_bytes(path: Path) -> int:
    """Bytes on disk of a file, or of all files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def memory_bytes(tree: Any) -> int:
    """Bytes in memory of the arrays of a model; they may be abstract."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def readable_bytes(size: int) -> str:
    """A size in a readable unit: 1.23 MiB, 4.56 GiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"
