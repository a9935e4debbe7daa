"""Our own checkpoint: a folder with `manifest.json`, `weights/` (Orbax), `tokenizer.model` and `words/`.

The manifest holds the format's version, the config and the name, shape and dtype (or quantization scheme) of every
weight, so that a checkpoint can be described, and planned for, without reading a weight. Weights are restored into an
abstract tree, on one device or laid out over any number: an Orbax checkpoint by itself remembers the devices that it
was saved from. Where its `words` say something (`llamajax.words`), the manifest holds it, and `words/` the files that
came with it; without, the tokenizer's own applies.

Damage is detected: the manifest holds a checksum of each stored array (`checks.checksum`), of the tokenizer and of
itself. All are checked by whoever reads; checkpoints of earlier releases have none and are read without.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

from llamajax.checkpoint.checks import checksum, is_finite
from llamajax.checkpoint.naming import (
    STACKED,
    Place,
    model_from,
    named_leaves,
    named_weights,
    place,
    placements,
)
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.files import open_regular, parse_json, read_bytes, read_json, shortened
from llamajax.model import Llama, abstract_model
from llamajax.words import CARRIED_FILES, Words
from quant import LayerRuns, QTensor, Scheme, aligned_empty, split_runs

FORMAT = "llamajax"
VERSION = 1
# TensorStore's parser recurses: what Orbax writes into a zarr.json has 600 bytes and 16 brackets.
_LARGEST_ZARR_JSON = 1 << 16
_MOST_BRACKETS = 100
_CODECS = {"sharding_indexed", "bytes", "crc32c"}  # those of Orbax without compression: none makes more of little
_KEY_ENCODINGS = ({"name": "default"}, {"name": "default", "configuration": {"separator": "/"}})
_SMALLEST_CHUNK = 1 << 16
_CHUNK_BYTES = 16 << 20
_WORDS = "words"
_WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
_PART_DTYPES = (*_WEIGHT_DTYPES, "uint8", "int32")
_PARTS = ("scale", "zero", "offset", "order", "outlier", "outlier_index")


def recognise(path: Path) -> bool:
    """Whether a folder holds a manifest of ours, of whatever version."""
    if not (path / "manifest.json").exists():
        return False
    with open_regular(path / "manifest.json") as file:
        return b'"format"' in file.read(4096)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked.

    Raises:
        LlamaJaxError: if it is damaged, of a newer version, or does not describe the model of its own config.
    """
    file = path / "manifest.json"
    manifest = read_json(file)
    try:
        kind, version = manifest["format"], manifest["version"]
    except (TypeError, KeyError, IndexError):
        raise LlamaJaxError(f"{file}: damaged: expected a checkpoint manifest, with format and version") from None
    if kind != FORMAT or version != VERSION:
        raise LlamaJaxError(
            f"{file}: format {shortened(kind)} version {shortened(version)}: this release reads {FORMAT!r} version "
            f"{VERSION}"
        )
    if "sha256" in manifest and manifest["sha256"] != _manifest_sha256(manifest):
        raise LlamaJaxError(
            f'{file}: not as it was written (sha256 differs), damaged or edited: remove its key "sha256" if it was '
            "edited on purpose"
        )
    missing = {"config", "weights", "tokenizer_sha256", "source"} - set(manifest)
    if missing:
        raise LlamaJaxError(f"{file}: {sorted(missing)[0]!r} is missing: the manifest is damaged")
    return manifest


def _manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Of all values but that one, however the file sets them."""
    values = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def open_abstract(path: Path) -> tuple[Config, Llama, dict[str, Any]]:
    """Config, the tree with `ShapeDtypeStruct` leaves as the manifest describes them, and the manifest itself."""
    manifest = read_manifest(path)
    config = Config.from_dict(manifest["config"], str(path / "manifest.json"))
    tree = abstract_model(config)
    leaves = named_leaves(tree)
    described = manifest["weights"]
    if not isinstance(described, Mapping) or set(described) != set(leaves):
        raise LlamaJaxError(f"{path}/manifest.json: the weights listed are not those of its config: it is damaged")
    weights = []
    for name, leaf in leaves.items():
        try:
            weight = abstract_weight(described[name])
            if weight.shape != leaf.shape:
                raise ValueError(f"shape {weight.shape}: expected {leaf.shape}")
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise LlamaJaxError(f"{path}/manifest.json: {name}: {_first_line(error)}: it is damaged") from None
        weights.append(weight)
    model = jax.tree.unflatten(jax.tree.structure(tree), weights)
    try:
        split_runs(model.layers)
    except ValueError as error:
        raise LlamaJaxError(f"{path}/manifest.json: {error}: it is damaged") from None
    return config, model, manifest


def describe(weight: Any) -> dict[str, Any]:
    """What the manifest says of a weight.

    Shape and dtype of an array; scheme, axis, dtype and parts of a `QTensor`; each run of a `LayerRuns`.
    """
    if isinstance(weight, LayerRuns):
        return {"runs": [describe(part) for part in weight.parts]}
    if not isinstance(weight, QTensor):
        return {"shape": list(weight.shape), "dtype": str(np.dtype(weight.dtype))}
    parts = {name: getattr(weight, name) for name in _PARTS}
    return {
        "scheme": weight.scheme.name,
        "axis": weight.axis,
        "dtype": str(weight.dtype),
        **({"activations": weight.activations} if weight.activations else {}),
        "planes": [describe(plane) for plane in weight.planes],
        **{name: describe(part) for name, part in parts.items() if part is not None},
    }


def abstract_weight(entry: Mapping[str, Any], level: int = 0) -> Any:
    """Undoes `describe`, with `ShapeDtypeStruct` for arrays.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError: for what `describe` does not write.
    """
    if "runs" in entry:
        if set(entry) != {"runs"} or level > 0 or not all(isinstance(part, Mapping) for part in entry["runs"]):
            raise ValueError("expected runs of layers and nothing else")
        if not entry["runs"] or any("runs" in part for part in entry["runs"]):
            raise ValueError("expected runs of layers, each an array or a scheme")
        runs = LayerRuns(tuple(abstract_weight(part) for part in entry["runs"]))
        if any(part.shape[1:] != runs.shape[1:] for part in runs.parts):
            raise ValueError("runs of layers of different shapes")
        return runs
    if "scheme" not in entry:
        if entry["dtype"] not in (_WEIGHT_DTYPES if level == 0 else _PART_DTYPES) or set(entry) != {"shape", "dtype"}:
            raise ValueError(f"dtype {shortened(entry['dtype'], 40)}: expected one of {', '.join(_WEIGHT_DTYPES)}")
        if not all(isinstance(size, int) and 0 < size < 1 << 40 for size in entry["shape"]):
            raise ValueError(f"shape {shortened(entry['shape'], 80)}: expected whole numbers")
        return jax.ShapeDtypeStruct(tuple(entry["shape"]), entry["dtype"])
    unknown = set(entry) - {"scheme", "axis", "dtype", "activations", "planes", *_PARTS}
    if unknown or level > 1 or entry["dtype"] not in _WEIGHT_DTYPES:
        raise ValueError("expected a scheme, axis, dtype, planes and scales, in at most two levels")
    parts = {name: abstract_weight(entry[name], level + 1) for name in _PARTS if name in entry}
    planes = tuple(abstract_weight(plane, level + 1) for plane in entry["planes"])
    static = {"scheme": Scheme.named(entry["scheme"]), "axis": entry["axis"], "dtype": np.dtype(entry["dtype"])}
    return QTensor(planes, **parts, **static, activations=entry.get("activations")).validate()


def restore(
    path: Path,
    shardings: Any = None,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
    finish: Callable[[str, Any], Any] = lambda name, weight: weight,
) -> Llama:
    """Reads the weights, one at a time.

    Args:
        path: the folder.
        shardings: a pytree of `jax.sharding.Sharding` shaped like the model, or one sharding for every leaf; the first
            device unless given; "host" for NumPy arrays.
        on_tensor: called with (weights read, weights in all).
        finish: called with the name of each weight (`named_weights`) and the weight as soon as it has been read; what
            it returns stands in the weight's place.

    Raises:
        LlamaJaxError: for damaged or missing weights, and for NaN or infinity.
    """
    config, tree, manifest = open_abstract(path)
    checksums = stored_checksums(path, manifest)
    # Before a name is made for each layer: a damaged manifest may speak of any number of them.
    stored = len(list((path / "weights").glob(f"{STACKED}*")))
    if stored < config.num_layers:
        raise _cannot_restore(path, f"{config.num_layers} layers in the manifest, {stored} arrays of layers stored")
    where = placements(tree, shardings)
    weights = named_weights(tree)
    restored: dict[str, Any] = {}
    for name, weight in weights.items():
        leaves = {f"{name}.{part}" if part else name: leaf for part, leaf in named_leaves(weight).items()}
        arrays = [place(_read_leaf(path, part, leaf, checksums), where[part]) for part, leaf in leaves.items()]
        restored[name] = finish(name, jax.tree.unflatten(jax.tree.structure(weight), arrays))
        del arrays  # not held while the next are read, where `finish` made something else of them
        on_tensor(len(restored), len(weights))
    return model_from(restored, config)


def stored_checksums(path: Path, manifest: Mapping[str, Any]) -> dict[str, str] | None:
    """The checksum of each stored array by its name; None for a checkpoint of a release that wrote none.

    Raises:
        LlamaJaxError: for anything else.
    """
    checksums = manifest.get("checksums")
    if checksums is not None and not isinstance(checksums, dict):
        raise LlamaJaxError(f"{path}/manifest.json: checksums {shortened(checksums)}: expected a table: it is damaged")
    return checksums


def read_weight(path: Path, abstract: Llama, checksums: Mapping[str, str] | None, where: Place) -> np.ndarray:
    """One weight of a checkpoint that is not quantized, of one layer.

    Raises:
        LlamaJaxError: for damaged or missing weights, and for NaN or infinity.
    """
    leaf = named_weights(abstract)[where.name]
    stored = _stored_names(where.name, leaf.shape)[where.layer or 0]
    shape = leaf.shape if where.layer is None else leaf.shape[1:]
    return _read_arrays(path, [stored], shape, leaf.dtype, checksums)[0]


def _read_leaf(path: Path, name: str, leaf: jax.ShapeDtypeStruct, checksums: Mapping[str, str] | None) -> np.ndarray:
    """One leaf of the model: its layers are stored one by one and stacked here."""
    if not name.startswith(STACKED):
        return _read_arrays(path, [name], leaf.shape, leaf.dtype, checksums)[0]
    return _read_arrays(path, _stored_names(name, leaf.shape), leaf.shape[1:], leaf.dtype, checksums)


def _read_arrays(
    path: Path, stored: list[str], shape: tuple[int, ...], dtype: Any, checksums: Mapping[str, str] | None
) -> np.ndarray:
    """Arrays of one shape and dtype as one, [len(stored), *shape], by the names that they are stored under.

    By TensorStore, which Orbax reads with too: Orbax makes arrays of its own, to be copied once more.
    """
    try:
        opening = []
        for name in stored:
            folder = os.path.join(path, "weights", name)
            header = _checked_header(folder, shape, np.dtype(dtype).itemsize)
            files = {"driver": "file", "path": os.path.abspath(folder)}
            spec = {"driver": "zarr3", "kvstore": files, "fill_missing_data_reads": False, "metadata": header}
            opening.append(tensorstore.open(spec, open=True, read=True, assume_metadata=True))
        sources = [future.result() for future in opening]
        for name, source in zip(stored, sources, strict=True):
            if source.shape != shape or source.dtype != dtype:
                raise ValueError(
                    f"{name} has shape {source.shape} and dtype {source.dtype.name}; in the manifest {shape}, {dtype}"
                )
        arrays = aligned_empty((len(stored), *shape), dtype)
        reading = [tensorstore.array(part).write(source) for part, source in zip(arrays, sources, strict=True)]
        for name, part, future in zip(stored, arrays, reading, strict=True):
            future.result()
            # Each while it is in a processor's cache, and TensorStore's threads read the next.
            if checksums is None:
                if not is_finite(part):
                    raise ValueError(f"{name} holds NaN or infinity")
            elif checksums.get(name) != checksum(part):  # which also says that it is finite: no other is saved
                raise ValueError(f"{name} is not as it was written: its checksum differs")
    except Exception as error:  # TensorStore raises many types for damaged files; all mean the same here.
        raise _cannot_restore(path, _first_line(error)) from error
    return arrays


def _checked_header(folder: str, shape: tuple[int, ...], itemsize: int) -> dict[str, Any]:
    """An array's `zarr.json`, once it is sure that TensorStore may be given it: it trusts what a header says.

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
    for codec in codecs:  # grows: those of a sharding codec are as much the file's as its own
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
    """How many chunks there are along each axis."""
    if len(chunk) != len(shape) or not all(isinstance(side, int) and side > 0 for side in chunk):
        raise ValueError(f"chunks of {shortened(chunk)} for an array of {shape}: expected whole numbers")
    if any(side > most for side, most in zip(chunk, shape, strict=True)):
        raise ValueError(f"chunks of {shortened(chunk)} for an array of {shape}: expected none larger")
    grid = [-(-most // side) for side, most in zip(chunk, shape, strict=True)]
    if math.prod(grid) > 1 + size // _SMALLEST_CHUNK:
        raise ValueError(f"{math.prod(grid)} chunks for {size} bytes: expected at most one for each {_SMALLEST_CHUNK}")
    return grid


def _cannot_restore(path: Path, why: str) -> LlamaJaxError:
    return LlamaJaxError(f"{path}/weights: cannot be restored, damaged or incomplete ({why})")


def _stored_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """`layers.ffn.up_DF` -> `layers.0.ffn.up_DF`, …: one array a layer, so that a writer never holds a whole stack."""
    if not name.startswith(STACKED):
        return [name]
    return [f"{STACKED}{layer}.{name.removeprefix(STACKED)}" for layer in range(shape[0])]


def save(model: Llama, path: Path, tokenizer_bytes: bytes | None, source: str, words: Words | None = None) -> None:
    """Writes a checkpoint into `path`, which must exist, empty. The manifest comes last: without it nothing loads."""
    import orbax.checkpoint as ocp  # here, because it takes 0.3 s, and reading does without

    # NumPy arrays would be copied by Orbax; as arrays on the CPU they are used where they are.
    host = jax.local_devices(backend="cpu")[0]
    arrays, checksums = {}, {}
    for name, leaf in named_leaves(model).items():
        array = np.asarray(leaf)
        slices = array if name.startswith(STACKED) else [array]
        for stored, part in zip(_stored_names(name, array.shape), slices, strict=True):
            arrays[stored] = jax.device_put(part, host)
            checksums[stored] = checksum(part)
    arguments = ocp.args.PyTreeSave(
        arrays, save_args={name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for name in arrays}
    )
    # Plain Zarr files in chunks: Orbax's default (OCDBT) holds all that it writes in memory until the end. What is
    # being written at once is bounded, but must be more than the largest leaf has.
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        use_compression=False,
        save_concurrent_gb=(max(array.nbytes for array in arrays.values()) + 1) / 1e9,
    )
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save((path / "weights").absolute(), args=arguments)
    if tokenizer_bytes is not None:
        (path / "tokenizer.model").write_bytes(tokenizer_bytes)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "config": model.config.to_dict(),
        "source": source,
        "tokenizer_sha256": hashlib.sha256(tokenizer_bytes).hexdigest() if tokenizer_bytes is not None else None,
        **_save_words(path, words or Words()),
        "weights": {name: describe(weight) for name, weight in named_weights(model).items()},
        "checksums": checksums,
    }
    manifest["sha256"] = _manifest_sha256(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's warning that there is nothing for OCDBT to merge, and the errors of its threads.

    The first is as it should be; the others are raised here, too.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_tokenizer(path: Path, manifest: Mapping[str, Any]) -> bytes | None:
    """The tokenizer saved with the weights, if there was one.

    Raises:
        LlamaJaxError: if it is missing or another than the manifest names.
    """
    if manifest["tokenizer_sha256"] is None:
        return None
    file = path / "tokenizer.model"
    if not file.is_file():
        raise LlamaJaxError(f"{file}: no such file, though the manifest names it")
    data = read_bytes(file)
    if hashlib.sha256(data).hexdigest() != manifest["tokenizer_sha256"]:
        raise LlamaJaxError(f"{file}: not the file that the manifest names (sha256 differs)")
    return data


def _save_words(path: Path, words: Words) -> dict[str, Any]:
    """Writes the files of the words, and gives what the manifest says of them: nothing, where they say nothing."""
    said = words.to_dict()
    for name, data in words.files.items():
        (path / _WORDS).mkdir(exist_ok=True)
        (path / _WORDS / name).write_bytes(data)
    return {"words": said} if said else {}


def read_words(path: Path, manifest: Mapping[str, Any]) -> Words:
    """What was saved of words; nothing in checkpoints that were written before there was a place for it.

    Raises:
        LlamaJaxError: for a damaged manifest, or files that are missing or others than it names.
    """
    said = manifest.get("words", {})
    try:
        names = [name for name in CARRIED_FILES if name in said.get("files", {})]
        return Words.from_dict(said, {name: read_bytes(path / _WORDS / name) for name in names})
    except (AttributeError, TypeError, LlamaJaxError) as error:
        raise LlamaJaxError(f"{path}/manifest.json: {str(error)[:300]}: it is damaged") from None
    except FileNotFoundError as error:
        raise LlamaJaxError(f"{error.filename}: no such file, though the manifest names it") from None


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
