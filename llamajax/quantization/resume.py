"""Stores finished parts of a long computation on disk, so that it continues where it was stopped."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llamajax.errors import LlamaJaxError
from llamajax.files import clear_leftovers, new_file, open_regular, parse_json, read_json, shortened
from quant import abstract_weight, describe

_KEY = "work.json"
_SUFFIX = ".safetensors"


class PartsOnDisk:
    """A folder with one safetensors file for each finished part, and `work.json`, which identifies the work.

    Every file is written under a temporary name and renamed. Part files hold a hash of their content, which is checked
    when they are read. The folder is refused for any other work.
    """

    def __init__(self, folder: Path, work: Mapping[str, Any]):
        """Opens or creates the folder, and removes unfinished files of a killed process.

        Args:
            folder: path of the folder.
            work: everything that the result depends on, by name; JSON values.

        Raises:
            LlamaJaxError: if the folder cannot be created, holds parts of other work, or holds other files.
        """
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LlamaJaxError(f"{folder}: cannot be created ({error.strerror})") from None
        for leftover in folder.glob(".*.partial-*"):
            clear_leftovers(folder / leftover.name[1:].rpartition(".partial-")[0])
        work = json.loads(json.dumps(work))
        file = folder / _KEY
        if any(entry != file for entry in folder.iterdir()):
            if not file.exists():
                raise LlamaJaxError(
                    f"{folder}: is not empty, and no {_KEY} in it says which work it belongs to: remove it or choose "
                    "another path"
                )
            _check_same(folder, _read_key(file), work)
        else:  # no part is finished, so that the folder may be used for any work
            with _written(file) as partial:
                partial.write_text(json.dumps(work, indent=2) + "\n", encoding="utf-8")

    def names(self) -> list[str]:
        """Returns the names of the finished parts, sorted."""
        return sorted(file.name.removesuffix(_SUFFIX) for file in self._folder.glob(f"*{_SUFFIX}"))

    def load(self, part: str) -> dict[str, Any] | None:
        """Loads the weights of a part, as NumPy arrays and `QTensor`s of them; None if there is no such part.

        Raises:
            LlamaJaxError: if the file is damaged.
        """
        loaded = self.load_arrays(part)
        if loaded is None:
            return None
        arrays, description = loaded
        try:
            described = parse_json(description, "its description")
            return {name: _assembled(arrays, name, abstract_weight(entry)) for name, entry in described.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(part, error) from None

    def store(self, part: str, weights: Mapping[str, Any]) -> None:
        """Writes a part; errors are those of `store_arrays`."""
        arrays: dict[str, np.ndarray] = {}
        for name, weight in weights.items():
            arrays |= dict(zip(_keys(name, weight), jax.tree.leaves(weight), strict=True))
        self.store_arrays(part, arrays, json.dumps({name: describe(weight) for name, weight in weights.items()}))

    def load_arrays(self, part: str) -> tuple[dict[str, np.ndarray], str] | None:
        """Loads the arrays of a part and its description; None if there is no such part.

        Raises:
            LlamaJaxError: if the file is damaged.
        """
        file = self._folder / f"{part}{_SUFFIX}"
        if not file.exists():
            return None
        try:
            with open_regular(file), safe_open(file, framework="np", backend="pread") as stored:
                metadata = stored.metadata() or {}
                arrays = {key: stored.get_tensor(key) for key in stored.keys()}
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise self._damaged(part, error) from None
        if metadata.get("sha256") != _digest(arrays, metadata.get("description", "")):
            raise self._damaged(part, "its content has changed since it was written")
        return arrays, metadata["description"]

    def store_arrays(self, part: str, arrays: Mapping[str, Any], description: str = "") -> None:
        """Writes a part; replaces a part of the same name.

        Raises:
            LlamaJaxError: if it cannot be written; earlier parts stay.
        """
        file = self._folder / f"{part}{_SUFFIX}"
        contiguous = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in arrays.items()}
        metadata = {"description": description, "sha256": _digest(contiguous, description)}
        with _written(file) as partial:
            save_file(contiguous, partial, metadata=metadata)

    def discard(self, part: str) -> None:
        """Removes one part."""
        (self._folder / f"{part}{_SUFFIX}").unlink(missing_ok=True)

    def _damaged(self, part: str, why: object) -> LlamaJaxError:
        return LlamaJaxError(
            f"{self._folder / part}{_SUFFIX}: damaged ({shortened(str(why))}): remove it to compute it again"
        )


def remove_parts(folder: Path) -> None:
    """Removes a folder of `PartsOnDisk` once the work is done and saved; other files in it stay."""
    for file in (*folder.glob(f"*{_SUFFIX}"), folder / _KEY):
        clear_leftovers(file)
        file.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def _written(file: Path) -> Iterator[Path]:
    """Does what `new_file` does, with an error that says how to continue."""
    try:
        with new_file(file) as partial:
            yield partial
    except LlamaJaxError as error:  # most often, a full disk
        raise LlamaJaxError(f"{error}; the same command continues where it was stopped") from None
    except (SafetensorError, OSError) as error:
        raise LlamaJaxError(
            f"{file}: cannot be written ({shortened(str(error))}); the same command continues where it was stopped"
        ) from None


def _read_key(file: Path) -> dict[str, Any]:
    """Reads `work.json`."""
    try:
        work = read_json(file)
        if not isinstance(work, dict):
            raise LlamaJaxError(f"{file}: {shortened(work)}: expected an object")
        return work
    except (LlamaJaxError, OSError) as error:
        raise LlamaJaxError(f"{error}: remove {file.parent} to start again") from None


def _check_same(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuses a folder of other work; the error names the first entry that differs."""
    name = ""
    there: Any = dict(theirs)
    here: Any = dict(ours)
    while isinstance(there, dict) and isinstance(here, dict) and there != here:
        keys = (*here, *(key for key in there if key not in here))
        name = next(key for key in keys if there.get(key) != here.get(key) or (key in there) != (key in here))
        there, here = there.get(name), here.get(name)
    if there != here:
        raise LlamaJaxError(
            f"{folder}: holds parts of other work: {name} is {shortened(there)} there, {shortened(here)} here: use the "
            "value that the work was started with, or remove the folder to start again"
        )


def _digest(arrays: Mapping[str, np.ndarray], description: str) -> str:
    """Returns a hash of names, dtypes, shapes, bytes and the description."""
    digest = hashlib.sha256(description.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _keys(name: str, weight: Any) -> list[str]:
    """Returns a name for each array of a weight."""
    return [f"{name}/{i}" for i in range(len(jax.tree.leaves(weight)))]


def _assembled(arrays: Mapping[str, np.ndarray], name: str, abstract: Any) -> Any:
    """Assembles one weight, and checks its arrays against the shapes and dtypes of its description."""
    leaves = [arrays[key] for key in _keys(name, abstract)]
    for array, leaf in zip(leaves, jax.tree.leaves(abstract), strict=True):
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} holds {array.dtype} {array.shape}: expected {leaf.dtype} {leaf.shape}")
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)
