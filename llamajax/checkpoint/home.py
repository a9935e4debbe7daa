"""Our own checkpoint: a folder with `manifest.json`, `weights/` (Orbax) and `tokenizer.model`.

The manifest holds the format's version, the config and the name, shape and dtype (or quantization scheme) of every
weight, so that a checkpoint can be described, and planned for, without reading a weight. Weights are restored into an
abstract tree, on one device or laid out over any number: an Orbax checkpoint by itself remembers the devices that it
was saved from.
"""

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore

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
from llamajax.model import Llama, abstract_model
from quant import LayerRuns, QTensor, Scheme, aligned_empty, split_runs

FORMAT = "llamajax"
VERSION = 1
_LARGEST_MANIFEST = 64 << 20
_CHUNK_BYTES = 16 << 20
_WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
_PART_DTYPES = (*_WEIGHT_DTYPES, "uint8", "int32")
_PARTS = ("scale", "zero", "offset", "order", "outlier", "outlier_index")


def recognise(path: Path) -> bool:
    """Whether a folder holds a manifest of ours, of whatever version."""
    if not (path / "manifest.json").is_file():
        return False
    with (path / "manifest.json").open("rb") as file:
        return b'"format"' in file.read(4096)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, checked.

    Raises:
        LlamaJaxError: if it is damaged, of a newer version, or does not describe the model of its own config.
    """
    file = path / "manifest.json"
    try:
        if file.stat().st_size > _LARGEST_MANIFEST:
            raise ValueError(f"{file.stat().st_size} bytes")
        manifest = json.loads(file.read_bytes())
        kind, version = manifest["format"], manifest["version"]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise LlamaJaxError(f"{file}: damaged ({str(error)[:100]}): expected a checkpoint manifest") from None
    if kind != FORMAT or version != VERSION:
        raise LlamaJaxError(
            f"{file}: format {kind!r} version {version!r}: this release reads {FORMAT!r} version {VERSION}"
        )
    missing = {"config", "weights", "tokenizer_sha256", "source"} - set(manifest)
    if missing:
        raise LlamaJaxError(f"{file}: {sorted(missing)[0]!r} is missing: the manifest is damaged")
    return manifest


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
            raise LlamaJaxError(f"{path}/manifest.json: {name}: {str(error)[:200]}: it is damaged") from None
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
            raise ValueError(f"dtype {str(entry['dtype'])[:40]!r}: expected one of {', '.join(_WEIGHT_DTYPES)}")
        if not all(isinstance(size, int) and 0 < size < 1 << 40 for size in entry["shape"]):
            raise ValueError(f"shape {str(entry['shape'])[:80]}: expected whole numbers")
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
        LlamaJaxError: for damaged or missing weights.
    """
    config, tree, _ = open_abstract(path)
    # Before a name is made for each layer: a damaged manifest may speak of any number of them.
    stored = len(list((path / "weights").glob(f"{STACKED}*")))
    if stored < config.num_layers:
        raise _cannot_restore(path, f"{config.num_layers} layers in the manifest, {stored} arrays of layers stored")
    where = placements(tree, shardings)
    weights = named_weights(tree)
    restored: dict[str, Any] = {}
    for name, weight in weights.items():
        leaves = {f"{name}.{part}" if part else name: leaf for part, leaf in named_leaves(weight).items()}
        arrays = [place(_read_leaf(path, part, leaf), where[part]) for part, leaf in leaves.items()]
        restored[name] = finish(name, jax.tree.unflatten(jax.tree.structure(weight), arrays))
        del arrays  # not held while the next are read, where `finish` made something else of them
        on_tensor(len(restored), len(weights))
    return model_from(restored, config)


def read_weight(path: Path, abstract: Llama, where: Place) -> np.ndarray:
    """One weight of a checkpoint that is not quantized, of one layer.

    Raises:
        LlamaJaxError: for damaged or missing weights.
    """
    leaf = named_weights(abstract)[where.name]
    stored = _stored_names(where.name, leaf.shape)[where.layer or 0]
    return _read_arrays(path, [stored], leaf.shape if where.layer is None else leaf.shape[1:], leaf.dtype)[0]


def _read_leaf(path: Path, name: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """One leaf of the model: its layers are stored one by one and stacked here."""
    if not name.startswith(STACKED):
        return _read_arrays(path, [name], leaf.shape, leaf.dtype)[0]
    return _read_arrays(path, _stored_names(name, leaf.shape), leaf.shape[1:], leaf.dtype)


def _read_arrays(path: Path, stored: list[str], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Arrays of one shape and dtype as one, [len(stored), *shape], by the names that they are stored under.

    By TensorStore, which Orbax reads with too: Orbax makes arrays of its own, to be copied once more.
    """
    try:
        opening = []
        for name in stored:
            files = {"driver": "file", "path": str((path / "weights" / name).absolute())}
            spec = {"driver": "zarr3", "kvstore": files, "fill_missing_data_reads": False}
            opening.append(tensorstore.open(spec, open=True, read=True))
        sources = [future.result() for future in opening]
        for name, source in zip(stored, sources, strict=True):
            if source.shape != shape or source.dtype != dtype:
                raise ValueError(
                    f"{name} has shape {source.shape} and dtype {source.dtype.name}; in the manifest {shape}, {dtype}"
                )
        arrays = aligned_empty((len(stored), *shape), dtype)
        reading = [tensorstore.array(part).write(source) for part, source in zip(arrays, sources, strict=True)]
        for future in reading:
            future.result()
    except Exception as error:  # TensorStore raises many types for damaged files; all mean the same here.
        raise _cannot_restore(path, _first_line(error)) from error
    return arrays


def _cannot_restore(path: Path, why: str) -> LlamaJaxError:
    return LlamaJaxError(f"{path}/weights: cannot be restored, damaged or incomplete ({why})")


def _stored_names(name: str, shape: tuple[int, ...]) -> list[str]:
    """`layers.ffn.up_DF` -> `layers.0.ffn.up_DF`, …: one array a layer, so that a writer never holds a whole stack."""
    if not name.startswith(STACKED):
        return [name]
    return [f"{STACKED}{layer}.{name.removeprefix(STACKED)}" for layer in range(shape[0])]


def save(model: Llama, path: Path, tokenizer_bytes: bytes | None, source: str) -> None:
    """Writes a checkpoint into `path`, which must exist, empty. The manifest comes last: without it nothing loads."""
    import orbax.checkpoint as ocp  # here, because it takes 0.3 s, and reading does without

    # NumPy arrays would be copied by Orbax; as arrays on the CPU they are used where they are.
    host = jax.local_devices(backend="cpu")[0]
    arrays = {}
    for name, leaf in named_leaves(model).items():
        array = np.asarray(leaf)
        slices = array if name.startswith(STACKED) else [array]
        for stored, part in zip(_stored_names(name, array.shape), slices, strict=True):
            arrays[stored] = jax.device_put(part, host)
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
        "weights": {name: describe(weight) for name, weight in named_weights(model).items()},
    }
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
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != manifest["tokenizer_sha256"]:
        raise LlamaJaxError(f"{file}: not the file that the manifest names (sha256 differs)")
    return data


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
