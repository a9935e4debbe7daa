"""Reads Hugging Face folders: `config.json` and safetensors, in one file or sharded.

Every tensor in the files must belong to the model, and every tensor of the model must be in the files. Only RoPE tables
(`rotary_emb.inv_freq`) are skipped, which old conversions saved and which follow from the config, and tensors for
images. Weights are floats, or ternary projections as in BitNet: packed codes with their scale, or floats that are
rounded when they are read.
"""

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llamajax.checkpoint.huggingface_tensors import TextTensors, text_names
from llamajax.checkpoint.huggingface_words import choose_tokenizer, read_words
from llamajax.checkpoint.huggingface_write import refusal, save
from llamajax.checkpoint.source import Source, float_weights
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families import config_from_hf, pieces, shape_of, tensors
from llamajax.families.huggingface_quantization import Ternary, is_converted, read_quantization, scale_name
from llamajax.files import open_regular, read_json, shortened
from llamajax.parameters import Place, specs
from quant import bitnet

__all__ = ["open_source", "read_config", "recognise", "refusal", "save"]

_LARGEST_HEADER = 16 << 20  # of a safetensors file; it has about a hundred bytes for each tensor

_HEAD = "lm_head.weight"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_PACKED = "U8"


def recognise(path: Path) -> bool:
    """Whether a folder holds a config.json that names a model type."""
    return (path / "config.json").exists() and "model_type" in _read_json(path / "config.json")


def read_config(file: Path, ignore_keys: Collection[str] = ()) -> Config:
    """Reads the architecture that a config.json describes; arguments and errors as in `open_source`."""
    return config_from_hf(_read_json(file), str(file), ignore_keys)


def open_source(path: Path, ignore_keys: Collection[str] = ()) -> Source:
    """Reads the config and the headers of all files, and checks that they hold exactly the tensors of the model.

    Args:
        path: the folder.
        ignore_keys: keys of config.json to ignore, as in `config_from_hf`.

    Raises:
        LlamaJaxError: for a config that is not supported, or a missing, surplus or damaged file or tensor.
    """
    fields, source = _read_json(path / "config.json"), str(path / "config.json")
    config = config_from_hf(fields, source, ignore_keys)
    said = None if "quantization_config" in ignore_keys else fields.get("quantization_config")
    quantization = read_quantization(said, source)
    files, notes = _tensor_files(path)
    dtypes = _check_tensors(path, config, files, _expected(path, config, quantization))
    scales = {scale_name(name) for name in dtypes}
    of_floats = {dtype for name, dtype in dtypes.items() if dtype != np.uint8 and name not in scales}
    dtype = np.dtype(np.float32) if len(of_floats) > 1 else of_floats.pop()
    words, word_notes = read_words(path, fields, config.vocab_size)
    tokenizer_bytes, words = choose_tokenizer(path, words)
    shards = len(set(files.values()))
    return Source(
        f"Hugging Face safetensors ({shards} file{'s' if shards > 1 else ''}){', ternary' if quantization else ''}",
        config,
        _abstract(config, quantization, dtype, dtypes),
        tuple(_order(config, files)),
        lambda place: _read(files, place, config, quantization, dtype),
        tokenizer_bytes=tokenizer_bytes,
        words=words,
        notes=(*notes, *word_notes),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; any other value is an error."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise LlamaJaxError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _tensor_files(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Returns the file that holds each tensor, and notes on files and tensors that are not read."""
    # On disks that cannot store a file's attributes, macOS stores them beside it, in a file named `._` and its name.
    found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("._"))
    index = path / "model.safetensors.index.json"
    if os.path.lexists(index):
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise LlamaJaxError(f"{index}: expected a weight_map from tensor names to file names")
        outside = [file for file in weight_map.values() if Path(file).name != file or file in ("", "..")]
        if outside:
            raise LlamaJaxError(f"{index}: {shortened(outside[0])} leaves the folder: expected file names")
        plain = text_names(weight_map, str(index))
        files = {name: path / weight_map[theirs] for name, theirs in plain.items()}
        images = len(weight_map) - len(plain)
    else:
        single = [file for file in found if file.name == "model.safetensors"] or found
        if len(single) != 1:
            what = f"{len(single)} .safetensors files and no model.safetensors.index.json" if single else "no weights"
            hint = "; pickled .bin/.pth weights are not read" if list(path.glob("*.bin")) else ""
            raise LlamaJaxError(f"{path}: {what}: expected model.safetensors, or shards with their index{hint}")
        with _open(single[0]) as opened:
            files, images = dict.fromkeys(opened.keys(), single[0]), opened.images
    others = [file.name for file in found if file not in files.values()]
    notes = [f"{path}: {', '.join(map(shortened, others[:5]))}: not part of the model, not read"] if others else []
    if images:
        notes.append(f"{path}: {images} tensors are for images only, not read")
    return files, notes


def _open(path: Path) -> TextTensors:
    """Opens a safetensors file, with `pread` because pages of a mapped file would count as memory of the process."""
    # Imported here, because machines for measurements may not have it (benchmarks/device.py).
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _LARGEST_HEADER:
            raise LlamaJaxError(f"{path}: truncated or damaged safetensors file (a header of {header} bytes)")
        return TextTensors(safe_open(path, framework="np", backend="pread"), str(_shown(path)))
    except FileNotFoundError:
        raise LlamaJaxError(f"{_shown(path)}: no such file, though the index names it") from None
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, LlamaJaxError):
            raise
        why = error.strerror if isinstance(error, OSError) else error
        raise LlamaJaxError(f"{_shown(path)}: truncated or damaged safetensors file ({why})") from None


def _shown(path: Path) -> Path:
    """Makes a path whose last part comes from an index safe for a message."""
    return path.with_name(shortened(path.name)[1:-1])


class _Expected(NamedTuple):
    """The expected form of a tensor in the files.

    Attributes:
        shape: the expected shape.
        dtypes: the allowed dtypes.
    """

    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = tuple(_DTYPES)


def _expected(path: Path, config: Config, quantization: Ternary | None) -> Callable[[], dict[str, _Expected]]:
    """Returns a function that lists every tensor of the model by name, called once the number of layers is checked."""

    def listed() -> dict[str, _Expected]:
        found, of = {}, specs(config)
        for name, places in tensors(config, "huggingface").items():
            found[name] = _Expected(shape_of(config, places))
            if quantization is None or quantization.online or not is_converted(of[places[0]]):
                continue
            try:
                found[name] = _Expected(bitnet.packed_shape(found[name].shape), (_PACKED,))
            except ValueError as error:
                raise LlamaJaxError(f"{path}: {name}: {error}") from None
            found[scale_name(name)] = _Expected((1,))
        return found

    return listed


def _check_tensors(
    path: Path, config: Config, files: dict[str, Path], listed: Callable[[], dict[str, _Expected]]
) -> dict[str, np.dtype]:
    """Checks that names and files match the model; returns the dtype of each tensor."""
    if config.num_layers > len(files):  # checked before the names of so many layers are listed
        raise LlamaJaxError(
            f"{path}: config.json says {config.num_layers} layers, but the files hold {len(files)} tensors: "
            "some are missing"
        )
    expected = listed()
    surplus = sorted(name for name in files if name not in expected and not name.endswith("rotary_emb.inv_freq"))
    # A tied model may come with a copy of the embedding as its head; `_read` checks that they are equal.
    surplus = [name for name in surplus if not (name == _HEAD and config.tied_embeddings)]
    missing = sorted(set(expected) - set(files))
    if surplus:
        raise LlamaJaxError(
            f"{path}: tensor {shortened(surplus[0])} does not belong to the model ({len(surplus)} such)"
        )
    if missing:
        hint = ": is tie_word_embeddings missing in config.json?" if missing == [_HEAD] else ""
        raise LlamaJaxError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} such){hint}")
    dtypes: dict[str, np.dtype] = {}
    for file in sorted(set(files.values())):
        with _open(file) as opened:
            held = set(opened.keys())
            for name in (name for name, where in files.items() if where == file):
                if name not in held:
                    raise LlamaJaxError(
                        f"{_shown(file)}: tensor {shortened(name)} is missing, though the index lists it in this file"
                    )
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                kind, shape = opened.get_slice(name).get_dtype(), tuple(opened.get_slice(name).get_shape())
                wanted = expected.get(name, _Expected(shape))
                if kind not in wanted.dtypes:
                    raise LlamaJaxError(f"{file}: {name} has dtype {kind}: expected one of {', '.join(wanted.dtypes)}")
                dtypes[name] = np.dtype(_DTYPES.get(kind, np.uint8))
                if shape != wanted.shape:  # checked before memory is allocated for the config's sizes
                    raise LlamaJaxError(f"{file}: {name} has shape {shape}: expected {wanted.shape} by config.json")
    return dtypes


def _abstract(
    config: Config, quantization: Ternary | None, dtype: np.dtype, dtypes: Mapping[str, np.dtype]
) -> dict[Place, Any]:
    """Returns every weight as it will be in memory, of `jax.ShapeDtypeStruct`s."""
    found: dict[Place, Any] = dict(float_weights(config, dtype))
    for place, spec in specs(config).items():
        if quantization is not None and is_converted(spec):
            scale = np.dtype(np.float32)
            if not quantization.online and not quantization.divides:
                scale = dtypes[scale_name(pieces(config, "huggingface")[place].tensor)]
            found[place] = bitnet.abstract(spec.shape(config), dtype, scale)
    return found


def _order(config: Config, files: dict[str, Path]) -> Iterator[Place]:
    """Yields weights file by file, each file from its beginning to its end."""
    places = tensors(config, "huggingface")
    for file in sorted(set(files.values())):
        with _open(file) as opened:
            held = [name for name in opened.offset_keys() if files.get(name) == file]
        yield from (place for name in held if name in places for place in places[name])


def _read(files: dict[str, Path], place: Place, config: Config, quantization: Ternary | None, dtype: np.dtype) -> Any:
    """Reads one weight in our orientation; if a tied model came with a head, checks that it equals the embedding."""
    piece, spec = pieces(config, "huggingface")[place], specs(config)[place]
    array = _get(files, piece.tensor, piece.rows)
    if place.name == "embed_VD" and config.tied_embeddings and _HEAD in files:
        if not np.array_equal(array, _get(files, _HEAD)):
            raise LlamaJaxError(
                f"{files[_HEAD]}: lm_head.weight differs from the embedding: set tie_word_embeddings to false in "
                "config.json"
            )
    if quantization is None or not is_converted(spec):
        return array.T if spec.transposed else array
    try:
        if quantization.online:
            return bitnet.rounded(array.T, dtype)
        scale = _get(files, scale_name(piece.tensor))
        return bitnet.unpack(array, scale, dtype, divides=quantization.divides)
    except ValueError as error:
        raise LlamaJaxError(f"{files[piece.tensor]}: {piece.tensor}: {error}") from None


def _get(files: dict[str, Path], name: str, rows: slice | None = None) -> np.ndarray:
    from safetensors import SafetensorError  # as above

    with _open(files[name]) as opened:
        try:
            return opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise LlamaJaxError(f"{files[name]}: {name} cannot be read ({error})") from None
