"""llamajax's own checkpoint format: a folder with `manifest.json`, `weights/` (Orbax), a tokenizer and `words/`.

The manifest holds the format's version, the config and the name, shape and dtype (or quantization scheme) of every
weight, so that a checkpoint can be described, and planned for, without reading a weight. Each weight of each layer is
stored by itself, as `layers.7.ffn.up_DF`. If the checkpoint has settings for text (`llamajax.words`), the manifest
holds them and `words/` holds the files that came with them; otherwise the tokenizer's own settings apply. The tokenizer
is a `tokenizer.model` (sentencepiece) unless the manifest's `tokenizer_file` says `tokenizer.json`.

Damage is detected: the manifest holds a checksum of each stored array (`checks.checksum`), of the tokenizer and of
itself, and readers check them all. Checkpoints of earlier releases have no checksums and are read without.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore

from llamajax.checkpoint.checks import checksum
from llamajax.checkpoint.source import Source
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.files import open_regular, parse_json, read_bytes, read_json, shortened
from llamajax.model import Llama
from llamajax.parameters import LAYERS, Place, parts_of, specs, weights_of
from llamajax.tokenizer import FILE_NAMES, file_name
from llamajax.words import Words, is_carried
from quant import abstract_weight, aligned_empty, describe

FORMAT = "llamajax"
VERSION = 2
VERSIONS = (1, 2)  # version 1 describes layers as stacks
# Limits, because TensorStore's parser recurses. A zarr.json that Orbax writes has 600 bytes and 16 brackets.
_LARGEST_ZARR_JSON = 1 << 16
_MOST_BRACKETS = 100
_CODECS = {"sharding_indexed", "bytes", "crc32c"}  # Orbax's without compression: none can expand a small file
_KEY_ENCODINGS = ({"name": "default"}, {"name": "default", "configuration": {"separator": "/"}})
_SMALLEST_CHUNK = 1 << 16
_CHUNK_BYTES = 16 << 20
_WORDS = "words"
_TOKENIZER = FILE_NAMES["sentencepiece"]


def recognise(path: Path) -> bool:
    """Whether a folder holds a llamajax manifest, of any version."""
    if not (path / "manifest.json").exists():
        return False
    with open_regular(path / "manifest.json") as file:
        return b'"format"' in file.read(4096)


def read_manifest(path: Path) -> dict[str, Any]:
    """Reads and checks the manifest.

    Raises:
        LlamaJaxError: if it is damaged, of a newer version, or does not describe the model of its own config.
    """
    file = path / "manifest.json"
    manifest = read_json(file)
    try:
        kind, version = manifest["format"], manifest["version"]
    except (TypeError, KeyError, IndexError):
        raise LlamaJaxError(f"{file}: damaged: expected a checkpoint manifest, with format and version") from None
    if kind != FORMAT or version not in VERSIONS:
        raise LlamaJaxError(
            f"{file}: format {shortened(kind)} version {shortened(version)}: this release reads {FORMAT!r} versions "
            f"{', '.join(map(str, VERSIONS))}"
        )
    if "sha256" in manifest and manifest["sha256"] != _manifest_sha256(manifest):
        raise LlamaJaxError(
            f'{file}: sha256 differs, so it was damaged or edited: remove its key "sha256" if it was edited on purpose'
        )
    missing = {"config", "weights", "tokenizer_sha256", "source"} - set(manifest)
    if missing:
        raise LlamaJaxError(f"{file}: {sorted(missing)[0]!r} is missing: the manifest is damaged")
    return manifest


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Returns a hash of all values but "sha256"; the file's whitespace and order of keys do not matter."""
    values = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def open_source(path: Path) -> Source:
    """Reads the manifest.

    Raises:
        LlamaJaxError: if it is damaged, of a newer version, or does not describe the model of its own config.
    """
    manifest = read_manifest(path)
    config = Config.from_dict(manifest["config"], str(path / "manifest.json"))
    checksums = stored_checksums(path, manifest)
    entries = _entries(path, config, manifest["weights"], manifest["version"])
    abstract = {}
    for place, spec in specs(config).items():
        try:
            weight = entries[place].weight()
            if weight.shape != spec.shape(config):
                raise ValueError(f"shape {weight.shape}: expected {spec.shape(config)}")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise LlamaJaxError(f"{path}/manifest.json: {place}: {_first_line(error)}: it is damaged") from None
        abstract[place] = weight
    if checksums is not None:
        stored = {entries[place].stored + part for place, weight in abstract.items() for part in parts_of(weight)}
        if stored != set(checksums):
            one = min(stored ^ set(checksums))[:80]
            raise LlamaJaxError(
                f"{path}/manifest.json: {one}: expected a checksum of every array of its config's weights, and of no "
                "other: it is damaged"
            )

    def read(place: Place) -> Any:
        weight = jax.tree.map(lambda leaf: aligned_empty(leaf.shape, leaf.dtype), abstract[place])
        fill([place], [weight])
        return weight

    def fill(places: Sequence[Place], weights: Sequence[Any]) -> None:
        arrays: dict[str, np.ndarray] = {}
        for place, weight in zip(places, weights, strict=True):
            arrays |= {entries[place].stored + part: array for part, array in parts_of(weight).items()}
        _fill(path, arrays, checksums)

    return Source(
        f"llamajax version {manifest['version']} (Orbax), from {manifest['source']}",
        config,
        abstract,
        tuple(specs(config)),
        read,
        fill,
        is_checked=checksums is not None,
        tokenizer_bytes=read_tokenizer(path, manifest),
        words=read_words(path, manifest),
    )


class _Entry(NamedTuple):
    """A manifest's entry for one weight.

    Attributes:
        description: as `quant.describe` writes it, for one layer or for a stack of layers.
        stored: prefix of the names of its arrays.
        is_stack: whether shapes begin with the number of layers, as in version 1.
    """

    description: Mapping[str, Any]
    stored: str
    is_stack: bool = False

    def weight(self) -> Any:
        """Returns the abstract weight of one layer.

        Raises:
            ValueError, TypeError, KeyError, AttributeError, OverflowError: for a damaged description.
        """
        weight = abstract_weight(self.description)
        if not self.is_stack:
            return weight
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), weight)


def _entries(path: Path, config: Config, described: Any, version: int) -> dict[Place, _Entry]:
    """Returns the manifest's entry for each weight; an entry named `layers.*` stands for all layers.

    Raises:
        LlamaJaxError: if the entries are not those of the config's weights.
    """
    damaged = LlamaJaxError(f"{path}/manifest.json: the weights listed are not those of its config: it is damaged")
    if not isinstance(described, Mapping):
        raise damaged
    entries, used = {}, set()
    for place in specs(config):
        for name in (str(place), f"{LAYERS}*.{place.name}", LAYERS + place.name):
            if name in described and (place.layer is not None or name == str(place)):
                break
        else:
            raise damaged
        used.add(name)
        if version > 1 or place.layer is None:
            entries[place] = _Entry(described[name], str(place))
        else:
            entries[place] = _entry_of_runs(described[name], place, config)
    if used != set(described):
        raise damaged
    return entries


def _entry_of_runs(described: Any, place: Place, config: Config) -> _Entry:
    """Returns an entry of version 1: a stack of all layers, or runs of like neighbours, each counted from layer 0."""
    if not isinstance(described, Mapping) or "runs" not in described:
        return _Entry(described, str(place), is_stack=True)
    first = 0
    runs = described["runs"] if isinstance(described["runs"], list) and set(described) == {"runs"} else []
    for number, run in enumerate(runs):
        length = _Entry(run, "").weight().shape[0] if isinstance(run, Mapping) else 0
        if place.layer is not None and first <= place.layer < first + length:
            return _Entry(run, f"{Place(place.name, place.layer - first)}.parts.{number}", is_stack=True)
        first += length
    return _Entry({}, "")  # an invalid description, which `weight` refuses


def stored_checksums(path: Path, manifest: Mapping[str, Any]) -> dict[str, str] | None:
    """Returns the checksum of each stored array by name; None for a checkpoint of a release that wrote none.

    Raises:
        LlamaJaxError: if the manifest's checksums are no table.
    """
    checksums = manifest.get("checksums")
    if checksums is not None and not isinstance(checksums, dict):
        raise LlamaJaxError(f"{path}/manifest.json: checksums {shortened(checksums)}: expected a table: it is damaged")
    return checksums


def _fill(path: Path, arrays: Mapping[str, np.ndarray], checksums: Mapping[str, str] | None) -> None:
    """Reads stored arrays by name, all at once.

    It uses TensorStore directly, as Orbax does: Orbax would make arrays of its own, which must be copied again.
    """
    try:
        opening = []
        for name, array in arrays.items():
            folder = os.path.join(path, "weights", name)
            header = _checked_header(folder, array.shape, array.dtype.itemsize)
            files = {"driver": "file", "path": os.path.abspath(folder)}
            spec = {"driver": "zarr3", "kvstore": files, "fill_missing_data_reads": False, "metadata": header}
            opening.append(tensorstore.open(spec, open=True, read=True, assume_metadata=True))
        sources = [future.result() for future in opening]
        for (name, array), source in zip(arrays.items(), sources, strict=True):
            if source.shape != array.shape or source.dtype != array.dtype:
                raise ValueError(
                    f"{name} has shape {source.shape} and dtype {source.dtype.name}: expected {array.shape} and "
                    f"{array.dtype} by the manifest"
                )
        reading = [
            tensorstore.array(array).write(source) for array, source in zip(arrays.values(), sources, strict=True)
        ]
        for (name, array), future in zip(arrays.items(), reading, strict=True):
            future.result()
            # Each array is checked while it is in a processor's cache, and TensorStore's threads read the next.
            if checksums is not None and checksums.get(name) != checksum(array):
                raise ValueError(f"{name} has changed since it was written: its checksum differs")
    except Exception as error:  # TensorStore raises many types for damaged files; they are all handled alike
        raise _cannot_restore(path, _first_line(error)) from error


def _checked_header(folder: str, shape: tuple[int, ...], itemsize: int) -> dict[str, Any]:
    """Reads and checks an array's `zarr.json`, because TensorStore trusts whatever a header says.

    Raises:
        ValueError, TypeError, KeyError: for a header that nests deeply, names other codecs than Orbax writes, or cuts
            the array into more chunks than it does; for files that are not regular, or larger than the array.
        LlamaJaxError, OSError: if the header cannot be read.
    """
    file = os.path.join(folder, "zarr.json")
    data = read_bytes(file, _LARGEST_ZARR_JSON)
    if data.count(b"[") + data.count(b"{") > _MOST_BRACKETS:
        raise ValueError(f"{file}: expected at most {_MOST_BRACKETS} arrays and objects")
    header = parse_json(data, file)
    size = math.prod(shape) * itemsize
    grid = _check_chunks(header["chunk_grid"]["configuration"]["chunk_shape"], shape, size)
    if header["chunk_key_encoding"] not in _KEY_ENCODINGS:
        raise ValueError(f"{file}: chunk_key_encoding {shortened(header['chunk_key_encoding'])}: expected the default")
    codecs = list(header["codecs"])
    for codec in codecs:  # the list grows: codecs within a sharding codec are checked as well
        if codec["name"] not in _CODECS:
            raise ValueError(f"{file}: codec {shortened(codec['name'])}: expected {', '.join(sorted(_CODECS))}")
        if codec["name"] == "sharding_indexed":
            _check_chunks(codec["configuration"]["chunk_shape"], shape, size)
            codecs += [*codec["configuration"]["codecs"], *codec["configuration"]["index_codecs"]]
    largest = size + size // _SMALLEST_CHUNK * 16 + 1024  # 16 bytes of index for each chunk in a shard
    for position in itertools.product(*map(range, grid)):
        chunk = "/".join([folder, "c", *map(str, position)])
        status = os.stat(chunk)
        if not stat.S_ISREG(status.st_mode) or status.st_size > largest:
            raise ValueError(f"{chunk}: expected a regular file of at most {largest} bytes")
    return header


def _check_chunks(chunk: Any, shape: tuple[int, ...], size: int) -> list[int]:
    """Returns the number of chunks along each axis, after checking their shape."""
    if len(chunk) != len(shape) or not all(isinstance(side, int) and side > 0 for side in chunk):
        raise ValueError(f"chunks of {shortened(chunk)} for an array of {shape}: expected whole numbers above 0")
    if any(side > most for side, most in zip(chunk, shape, strict=True)):
        raise ValueError(f"chunks of {shortened(chunk)} for an array of {shape}: expected none larger than the array")
    grid = [-(-most // side) for side, most in zip(chunk, shape, strict=True)]
    if math.prod(grid) > 1 + size // _SMALLEST_CHUNK:
        raise ValueError(f"{math.prod(grid)} chunks for {size} bytes: expected at most one for each {_SMALLEST_CHUNK}")
    return grid


def _cannot_restore(path: Path, why: str) -> LlamaJaxError:
    return LlamaJaxError(f"{path}/weights: cannot be restored, damaged or incomplete ({why})")


def save(model: Llama, path: Path, tokenizer_bytes: bytes | None, source: str, words: Words | None = None) -> None:
    """Writes a checkpoint into `path`, an empty folder. The manifest is written last: without it nothing loads."""
    import orbax.checkpoint as ocp  # imported here, because it takes 0.3 s and reading does not need it

    # Orbax would copy NumPy arrays; it uses JAX arrays on the CPU without a copy.
    host = jax.local_devices(backend="cpu")[0]
    arrays, checksums = {}, {}
    weights = weights_of(jax.tree.map(np.asarray, model))
    for place, weight in weights.items():
        for part, array in parts_of(weight).items():
            arrays[f"{place}{part}"] = jax.device_put(array, host)
            checksums[f"{place}{part}"] = checksum(array)
    arguments = ocp.args.PyTreeSave(
        arrays, save_args={name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
    )
    # Plain Zarr files in chunks: Orbax's default (OCDBT) holds everything that it writes in memory until the end. The
    # number of bytes written at once is bounded, but the bound must exceed the largest leaf.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        save_concurrent_gb=(max(array.nbytes for array in arrays.values()) + 1) / 1e9,
    )
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save((path / "weights").absolute(), args=arguments)
    tokenizer_file = _TOKENIZER if tokenizer_bytes is None else file_name(tokenizer_bytes)
    if tokenizer_bytes is not None:
        (path / tokenizer_file).write_bytes(tokenizer_bytes)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "config": model.config.to_dict(),
        "source": source,
        "tokenizer_sha256": hashlib.sha256(tokenizer_bytes).hexdigest() if tokenizer_bytes is not None else None,
        **({} if tokenizer_file == _TOKENIZER else {"tokenizer_file": tokenizer_file}),
        **_save_words(path, words or Words()),
        "weights": _described(weights, model.config),
        "checksums": checksums,
    }
    manifest["sha256"] = _manifest_sha256(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _described(weights: Mapping[Place, Any], config: Config) -> dict[str, Any]:
    """Returns the manifest's entries for the weights: one for all layers if they are alike, else one for each."""
    each = {place: describe(weight) for place, weight in weights.items()}
    of_layers: dict[str, list[Any]] = {}
    for place, one in each.items():
        if place.layer is not None:
            of_layers.setdefault(place.name, []).append(one)
    alike = {
        name for name, ones in of_layers.items() if len(ones) == config.num_layers and all(o == ones[0] for o in ones)
    }
    return {f"{LAYERS}*.{place.name}" if place.name in alike else str(place): one for place, one in each.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax's warning that there is nothing for OCDBT to merge, and the error messages of its threads.

    The warning is expected without OCDBT; errors of threads are also raised to the caller.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_tokenizer(path: Path, manifest: Mapping[str, Any]) -> bytes | None:
    """Reads the tokenizer saved with the weights, if there is one.

    Raises:
        LlamaJaxError: if it is missing, or not the file that the manifest names.
    """
    if manifest["tokenizer_sha256"] is None:
        return None
    name = manifest.get("tokenizer_file", _TOKENIZER)
    if name not in FILE_NAMES.values():
        raise LlamaJaxError(f"{path}/manifest.json: tokenizer_file {shortened(name)}: it is damaged")
    file = path / name
    if not file.is_file():
        raise LlamaJaxError(f"{file}: no such file, though the manifest names it")
    data = read_bytes(file)
    if hashlib.sha256(data).hexdigest() != manifest["tokenizer_sha256"]:
        raise LlamaJaxError(f"{file}: not the file that the manifest names (sha256 differs)")
    return data


def _save_words(path: Path, words: Words) -> dict[str, Any]:
    """Writes the files of `words`, and returns their entry for the manifest; it is empty if `words` are."""
    said = words.to_dict()
    for name, data in words.files.items():
        (path / _WORDS).mkdir(exist_ok=True)
        (path / _WORDS / name).write_bytes(data)
    return {"words": said} if said else {}


def read_words(path: Path, manifest: Mapping[str, Any]) -> Words:
    """Reads the saved `Words`; they are empty in checkpoints of releases that did not save them.

    Raises:
        LlamaJaxError: if the manifest is damaged, or a file is missing or not the one that it names.
    """
    said = manifest.get("words", {})
    try:
        names = [name for name in said.get("files", {}) if is_carried(name)]
        return Words.from_dict(said, {name: read_bytes(path / _WORDS / name) for name in names})
    except (AttributeError, TypeError, LlamaJaxError) as error:
        raise LlamaJaxError(f"{path}/manifest.json: {str(error)[:300]}: it is damaged") from None
    except FileNotFoundError as error:
        raise LlamaJaxError(f"{error.filename}: no such file, though the manifest names it") from None


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
