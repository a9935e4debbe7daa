"""Reads and writes Hugging Face LlamaForCausalLM folders: `config.json` and safetensors, in one file or sharded.

Every tensor of the files must be one that the model has, and the other way round; nothing is skipped but RoPE tables
(`rotary_emb.inv_freq`), which old conversions saved and which follow from the config.
"""

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from llamajax.checkpoint.huggingface_words import choose_tokenizer, config_ids, read_words, write_words
from llamajax.checkpoint.source import Source, float_weights
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families import config_from_hf, config_to_hf, pieces, shape_of, tensors
from llamajax.files import open_regular, read_json, shortened
from llamajax.model import Llama
from llamajax.parameters import Place, specs, weights_of
from llamajax.tokenizer import Tokenizer
from llamajax.words import Words

_LARGEST_HEADER = 16 << 20  # of a safetensors file: a hundred bytes for each tensor
_SHARD_BYTES = 1 << 30

_HEAD = "lm_head.weight"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_THEIR_DTYPES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def recognise(path: Path) -> bool:
    """Whether a folder holds a config.json that names a model type."""
    return (path / "config.json").exists() and "model_type" in _read_json(path / "config.json")


def read_config(file: Path, ignore_keys: Collection[str] = ()) -> Config:
    """The architecture that a config.json by itself describes; arguments and errors as of `open_source`."""
    return config_from_hf(_read_json(file), str(file), ignore_keys)


def open_source(path: Path, ignore_keys: Collection[str] = ()) -> Source:
    """Reads the config and the headers of all files, and checks that they hold just the tensors of the model.

    Args:
        path: the folder.
        ignore_keys: of config.json, as of `config_from_hf`.

    Raises:
        LlamaJaxError: for a config we cannot read, or a missing, surplus or damaged file or tensor.
    """
    fields = _read_json(path / "config.json")
    config = config_from_hf(fields, str(path / "config.json"), ignore_keys)
    files, notes = _tensor_files(path)
    dtypes = _check_tensors(path, config, files)
    dtype = np.dtype(np.float32) if len(dtypes) > 1 else dtypes.pop()
    words, word_notes = read_words(path, fields, config.vocab_size)
    tokenizer_bytes, words = choose_tokenizer(path, words)
    shards = len(set(files.values()))
    return Source(
        f"Hugging Face safetensors ({shards} file{'s' if shards > 1 else ''})",
        config,
        float_weights(config, dtype),
        tuple(_order(config, files)),
        lambda place: _read(files, place, config),
        tokenizer_bytes=tokenizer_bytes,
        words=words,
        notes=(*notes, *word_notes),
    )


def save(
    model: Llama,
    path: Path,
    tokenizer_bytes: bytes | None = None,
    words: Words | None = None,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Writes a folder that `open_source` and transformers read; `path` must exist, empty.

    `tokenizer_bytes` become its tokenizer.json or tokenizer.model, whatever they are; `tokenizer` is what they say, if
    they can be read.
    Beyond 1 GiB in shards with their index. No more than one tensor is held in a transposed copy.
    """
    weights = weights_of(jax.tree.map(np.asarray, model))
    held = tensors(model.config, "huggingface")
    shards = _plan_shards(weights, held)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(path / file, model.config, weights, names)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(weight.nbytes for weight in weights.values())
        _write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    words = words or Words()
    write_words(path, words, tokenizer_bytes, tokenizer)
    fields = config_to_hf(model.config) | config_ids(words, tokenizer)
    _write_json(path / "config.json", fields | {"torch_dtype": str(weights[Place("embed_VD")].dtype)})


def _write_shard(path: Path, config: Config, weights: Mapping[Place, np.ndarray], names: list[str]) -> None:
    """Writes a safetensors file tensor by tensor; the library's own function wants to be given all of them at once.

    The format: the header's length in 8 bytes, the header in JSON (dtype, shape and place of each tensor), the tensors
    one behind the other (github.com/huggingface/safetensors, "Format").
    """
    held = tensors(config, "huggingface")
    dtype_of = {name: weights[held[name][0]].dtype for name in names}
    ordered = sorted(names, key=lambda name: -dtype_of[name].itemsize)  # so that each is aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        start, end = end, end + sum(weights[place].nbytes for place in held[name])
        kind, shape = _THEIR_DTYPES[np.dtype(dtype_of[name])], shape_of(config, held[name])
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for place in (place for name in ordered for place in held[name]):
            weight = weights[place]
            theirs = np.ascontiguousarray(weight.T if specs(config)[place].transposed else weight)
            file.write(theirs.reshape(-1).view(np.uint8).data)


def _plan_shards(weights: Mapping[Place, Any], held: Mapping[str, tuple[Place, ...]]) -> list[list[str]]:
    """The names of the model's tensors in groups of at most 1 GiB (or one tensor)."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, places in held.items():
        nbytes = sum(weights[place].nbytes for place in places)
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a clear error for anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise LlamaJaxError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _tensor_files(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Which file holds each tensor, and a note on those that are of another kind."""
    # macOS keeps a file's attributes in one beside it, `._` and its name, on disks that have no place for them.
    found = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("._"))
    index = path / "model.safetensors.index.json"
    if os.path.lexists(index):
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise LlamaJaxError(f"{index}: expected a weight_map from tensor names to file names")
        outside = [file for file in weight_map.values() if Path(file).name != file or file in ("", "..")]
        if outside:
            raise LlamaJaxError(f"{index}: {shortened(outside[0])} leaves the folder: expected file names")
        files = {name: path / file for name, file in weight_map.items()}
    else:
        single = [file for file in found if file.name == "model.safetensors"] or found
        if len(single) != 1:
            what = f"{len(single)} .safetensors files and no model.safetensors.index.json" if single else "no weights"
            hint = "; pickled .bin/.pth weights are not read" if list(path.glob("*.bin")) else ""
            raise LlamaJaxError(f"{path}: {what}: expected model.safetensors, or shards with their index{hint}")
        files = {name: single[0] for name in _open(single[0]).keys()}
    others = [file.name for file in found if file not in files.values()]
    notes = [f"{path}: {', '.join(map(shortened, others[:5]))}: beside the model's weights, not read"] if others else []
    return files, notes


def _open(path: Path) -> Any:
    """Opens a safetensors file; `pread` rather than `mmap`, whose touched pages would count as our memory."""
    # Here, because a machine for measuring may be without (benchmarks/device.py).
    from safetensors import SafetensorError, safe_open

    try:
        with open_regular(path) as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _LARGEST_HEADER:
            raise LlamaJaxError(f"{path}: truncated or damaged safetensors file (a header of {header} bytes)")
        return safe_open(path, framework="np", backend="pread")
    except FileNotFoundError:
        raise LlamaJaxError(f"{_shown(path)}: no such file, though the index names it") from None
    except (SafetensorError, OSError, ValueError) as error:
        if isinstance(error, LlamaJaxError):
            raise
        why = error.strerror if isinstance(error, OSError) else error
        raise LlamaJaxError(f"{_shown(path)}: truncated or damaged safetensors file ({why})") from None


def _shown(path: Path) -> Path:
    """A path whose last part is from an index, for a message."""
    return path.with_name(shortened(path.name)[1:-1])


def _check_tensors(path: Path, config: Config, files: dict[str, Path]) -> set[np.dtype]:
    """That names and files match the model; returns the dtypes found."""
    if config.num_layers > len(files):  # Before the names of so many layers are listed.
        raise LlamaJaxError(
            f"{path}: config.json says {config.num_layers} layers, but the files hold {len(files)} tensors: "
            "some are missing"
        )
    expected = set(tensors(config, "huggingface"))
    surplus = sorted(name for name in files if name not in expected and not name.endswith("rotary_emb.inv_freq"))
    # A tied model may come with a copy of the embedding as its head: it is checked to be one when it is read.
    surplus = [name for name in surplus if not (name == _HEAD and config.tied_embeddings)]
    missing = sorted(expected - set(files))
    if surplus:
        raise LlamaJaxError(
            f"{path}: tensor {shortened(surplus[0])} belongs to nothing in the model ({len(surplus)} such)"
        )
    if missing:
        hint = ": is tie_word_embeddings missing in config.json?" if missing == [_HEAD] else ""
        raise LlamaJaxError(f"{path}: tensor {missing[0]!r} is missing ({len(missing)} such){hint}")
    dtypes, shapes = set(), _expected_shapes(config)
    for file in sorted(set(files.values())):
        with _open(file) as opened:
            held = set(opened.keys())
            for name in (name for name, where in files.items() if where == file):
                if name not in held:
                    raise LlamaJaxError(
                        f"{_shown(file)}: tensor {shortened(name)} is missing, though the index puts it here"
                    )
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                kind = opened.get_slice(name).get_dtype()
                if kind not in _DTYPES:
                    raise LlamaJaxError(f"{file}: {name} has dtype {kind}: expected one of {', '.join(_DTYPES)}")
                dtypes.add(np.dtype(_DTYPES[kind]))
                shape = tuple(opened.get_slice(name).get_shape())
                if shape != shapes.get(name, shape):  # before memory is taken by what the config says
                    raise LlamaJaxError(f"{file}: {name} has shape {shape}: expected {shapes[name]} by config.json")
    return dtypes


def _expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by its name in the files."""
    return {name: shape_of(config, places) for name, places in tensors(config, "huggingface").items()}


def _order(config: Config, files: dict[str, Path]) -> Iterator[Place]:
    """File by file, each from its beginning to its end."""
    places = tensors(config, "huggingface")
    for file in sorted(set(files.values())):
        with _open(file) as opened:
            held = [name for name in opened.offset_keys() if files.get(name) == file]
        yield from (place for name in held if name in places for place in places[name])


def _read(files: dict[str, Path], place: Place, config: Config) -> np.ndarray:
    """One tensor in our orientation; of a tied model that came with a head, too, checks that it is the embedding."""
    piece = pieces(config, "huggingface")[place]
    array = _get(files, piece.tensor, piece.rows)
    if place.name == "embed_VD" and config.tied_embeddings and _HEAD in files:
        if not np.array_equal(array, _get(files, _HEAD)):
            raise LlamaJaxError(
                f"{files[_HEAD]}: lm_head.weight differs from the embedding: set tie_word_embeddings to false in "
                "config.json"
            )
    return array.T if specs(config)[place].transposed else array


def _get(files: dict[str, Path], name: str, rows: slice | None = None) -> np.ndarray:
    from safetensors import SafetensorError  # as above

    with _open(files[name]) as opened:
        try:
            return opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise LlamaJaxError(f"{files[name]}: {name} cannot be read ({error})") from None
