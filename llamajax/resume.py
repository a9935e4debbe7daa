"""Finished parts of a long piece of work on disk, so that it goes on where it was stopped."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llamajax.checkpoint.home import abstract_weight, describe
from llamajax.errors import LlamaJaxError
from llamajax.files import new_file

_KEY = "work.json"


class PartsOnDisk:
    """A folder with one safetensors file for each finished part: weights by name, quantized or not.

    Every file is written beside its name and renamed: one that is there is whole. The folder says what work it
    belongs to, and is refused for any other.
    """

    def __init__(self, folder: Path, work: Mapping[str, Any]):
        """Opens the folder, or makes it.

        Args:
            folder: where.
            work: whatever the result depends on; JSON values.

        Raises:
            LlamaJaxError: if the folder holds parts of other work.
        """
        self._folder = folder
        key = hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / _KEY
        if file.exists() and file.read_text(encoding="utf-8").strip() != key:
            raise LlamaJaxError(
                f"{folder}: holds parts of other work (another model, recipe or calibration text): "
                "remove it to begin anew"
            )
        _write(file, lambda path: path.write_text(key + "\n", encoding="utf-8"))

    def load(self, part: str) -> dict[str, Any] | None:
        """The weights of a part, as NumPy arrays and `QTensor`s of them; None if it is not there.

        Raises:
            LlamaJaxError: if the file is damaged.
        """
        file = self._folder / f"{part}.safetensors"
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="np", backend="pread") as stored:
                described = json.loads(stored.metadata()["weights"])
                return {name: _read(stored, name, abstract_weight(entry)) for name, entry in described.items()}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise LlamaJaxError(f"{file}: damaged ({str(error)[:100]}): remove it to make it anew") from None

    def store(self, part: str, weights: Mapping[str, Any]) -> None:
        """Writes a part."""
        arrays: dict[str, np.ndarray] = {}
        described = {}
        for name, weight in weights.items():
            described[name] = describe(weight)
            leaves = jax.tree.leaves(weight)
            arrays |= {key: np.ascontiguousarray(leaf) for key, leaf in zip(_keys(name, weight), leaves, strict=True)}
        metadata = {"weights": json.dumps(described)}
        _write(self._folder / f"{part}.safetensors", lambda path: save_file(arrays, path, metadata=metadata))

    def remove(self) -> None:
        """Removes what this class wrote; the work is done."""
        for file in (*self._folder.glob("*.safetensors"), self._folder / _KEY):
            file.unlink(missing_ok=True)
        self._folder.rmdir()


def _keys(name: str, weight: Any) -> list[str]:
    """A name for each array of a weight."""
    return [f"{name}/{i}" for i in range(len(jax.tree.leaves(weight)))]


def _read(stored: Any, name: str, abstract: Any) -> Any:
    """One weight, of the shapes and dtypes that it is said to have."""
    arrays = [stored.get_tensor(key) for key in _keys(name, abstract)]
    for array, leaf in zip(arrays, jax.tree.leaves(abstract), strict=True):
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} holds {array.dtype} {array.shape}: expected {leaf.dtype} {leaf.shape}")
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def _write(file: Path, write: Any) -> None:
    with new_file(file) as partial:
        write(partial)
