"""Weights in and out: formats are recognised by their content and read tensor by tensor.

    opened = open_checkpoint(path)     # header only: config, shapes, source format
    model = opened.read(dtype)         # peak memory: the result and one tensor
    save_checkpoint(model, path)       # atomic: the whole folder appears, or nothing

`llamajax.load` does the first two and adds the tokenizer.
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from llamajax.checkpoint import home, huggingface, llama2c
from llamajax.checkpoint.checks import check_fits, is_finite
from llamajax.checkpoint.naming import (
    Place,
    Source,
    is_quantized,
    named_leaves,
    named_weights,
    place,
    placements,
)
from llamajax.config import Config, preset_names
from llamajax.errors import LlamaJaxError
from llamajax.files import new_folder, open_regular, read_bytes
from llamajax.model import Llama, abstract_model
from llamajax.prepare import only_looked_up, prepare, with_activations
from llamajax.tokenizer import Tokenizer
from llamajax.words import Words
from quant import QTensor, aligned_empty
from quant import prepare as prepare_weight
from quant.kernels import Layout

BOX = "box"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint whose header was read and checked; its weights have not been read.

    Attributes:
        path: the file or folder.
        description: source format, for people.
        config: the architecture.
        abstract: `Llama` with `jax.ShapeDtypeStruct` leaves, as stored.
        tokenizer_bytes: the `tokenizer.model` that came with it, or None; `tokenizer_problem` says whether it is read.
        words: what it says of words beside that: ids, added tokens, defaults for sampling.
        notes: what of its files is not used, and why: a sentence each.
        read: reads the weights: `read(dtype=None, shardings=None, on_tensor=…, backend=None, activations=None)`, giving
            a `Llama`. `dtype` converts floats while reading; `shardings` is one `jax.sharding.Sharding` or a tree of
            them shaped like the model, the first device unless given, or "host" for leaves that stay NumPy arrays;
            `on_tensor` is called with (tensors read, tensors in all); `backend` and `activations` are as of `load`.
        read_weight: reads one weight, of one layer: `read_weight(Place) -> np.ndarray`, as stored. Not for quantized
            checkpoints.
    """

    path: Path
    description: str
    config: Config
    abstract: Llama
    tokenizer_bytes: bytes | None
    words: Words
    notes: tuple[str, ...]
    read: Callable[..., Llama]
    read_weight: Callable[[Place], np.ndarray]

    @property
    def tokenizer_problem(self) -> str | None:
        """Why the tokenizer that came with it cannot be used; None if it can, or if none came."""
        return self._own_tokenizer[1]

    @functools.cached_property
    def _own_tokenizer(self) -> tuple[Tokenizer | None, str | None]:
        """The tokenizer that came with it, or why there is none."""
        if self.tokenizer_bytes is None:
            problem = f"{self.path}: its tokenizer.json is not read" if "tokenizer.json" in self.words.files else None
            return None, problem
        try:
            tokenizer = Tokenizer(self.tokenizer_bytes, f"{self.path}: its tokenizer", self.words)
            return _of_model(tokenizer, self.config), None
        except LlamaJaxError as error:
            return None, str(error)

    def outcome(
        self,
        dtype: jax.typing.DTypeLike | None = None,
        backend: str | None = None,
        activations: str | None = None,
    ) -> Llama:
        """What `read` will give for these arguments, with `jax.ShapeDtypeStruct` leaves: to compile for meanwhile."""

        def finish(model: Llama) -> Llama:
            model = _in_dtype(model, dtype)
            model = model if activations is None else with_activations(model, activations)
            return model if backend is None else prepare(model, backend)

        return jax.eval_shape(finish, self.abstract)


def resolve(name: str | Path) -> Path:
    """The folder of the model in the box for "box", else the path itself.

    Raises:
        LlamaJaxError: if nothing is there.
    """
    if str(name) == BOX:
        return Path(__file__).parent.parent / "box"
    path = Path(name).expanduser()
    if path.exists():
        return path
    if str(name) in preset_names():
        raise LlamaJaxError(
            f"{name}: a preset is an architecture without weights: give the path of a checkpoint, or build one with "
            f"llamajax.Llama(llamajax.preset({str(name)!r}), key=…)"
        )
    raise LlamaJaxError(f"{name}: no such file or folder: expected a checkpoint's path or {BOX!r}")


def open_checkpoint(name: str | Path, *, ignore_keys: Collection[str] = ()) -> Opened:
    """Recognises a checkpoint by its content and reads its header.

    Args:
        name: path of a checkpoint, or "box".
        ignore_keys: keys of a Hugging Face config.json to read over: those that we do not know and that change no
            forward pass.

    Raises:
        LlamaJaxError: if there is none, if it is of no format that we read, or if its header is damaged.
    """
    path = resolve(name)
    if path.is_dir() and home.recognise(path):
        config, abstract, manifest = home.open_abstract(path)
        checksums = home.stored_checksums(path, manifest)
        return Opened(
            path,
            f"llamajax version {manifest['version']} (Orbax), from {manifest['source']}",
            config,
            abstract,
            home.read_tokenizer(path, manifest),
            home.read_words(path, manifest),
            (),
            lambda dtype=None, shardings=None, on_tensor=_ignore, backend=None, activations=None: _restore(
                path, abstract, dtype, shardings, on_tensor, backend, activations
            ),
            lambda place: home.read_weight(path, abstract, checksums, place),
        )
    if huggingface.recognise(path):
        return _opened(path, huggingface.open_source(path, ignore_keys))
    if llama2c.recognise(path):
        return _opened(path, llama2c.open_source(path))
    raise LlamaJaxError(f"{path}: unknown format ({_first_look(path)}): expected {_FORMATS}")


def _opened(path: Path, source: Source) -> Opened:
    abstract = abstract_model(source.config, source.dtype)
    source = dataclasses.replace(source, read=_checked(path, abstract, source.read))
    return Opened(
        path,
        source.description,
        source.config,
        abstract,
        source.tokenizer_bytes or _tokenizer_beside(path),
        source.words,
        source.notes,
        lambda dtype=None, shardings=None, on_tensor=_ignore, backend=None, activations=None: _assemble(
            path, source, dtype, shardings, on_tensor, activations
        ),
        source.read,
    )


_FORMATS = (
    "a llamajax checkpoint (manifest.json), a Hugging Face folder (config.json and safetensors) or a llama2.c file "
    "(version 0, 1 or 2)"
)


def load(
    name: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    shardings: Any = None,
    backend: str | None = None,
    activations: str | None = None,
    ignore_keys: Collection[str] = (),
) -> tuple[Llama, Tokenizer | None]:
    """Loads a model and its tokenizer.

    What of its files is not used, and why its tokenizer cannot be read if it cannot, is a warning (`Opened.notes`,
    `Opened.tokenizer_problem`).

    Args:
        name: path of a checkpoint (llamajax, Hugging Face or llama2.c), or "box" for the model in the package.
        tokenizer: path of a sentencepiece `tokenizer.model`; the one that came with the checkpoint unless given.
        dtype: of the weights, for example `jax.numpy.float32`; as stored unless given.
        shardings: where the weights go: one `jax.sharding.Sharding` or a tree of them shaped like the model; the first
            device unless given.
        backend: lays quantized weights out for this backend, such as `jax.default_backend()`, each as soon as it has
            been read: the same as `prepare` of the loaded model, sooner, and with less memory on the way.
        activations: what quantized weights are multiplied with, as of `with_activations`; as stored unless given.
        ignore_keys: as of `open_checkpoint`.

    Returns:
        The model, and the tokenizer, which is None if none was named and none came with the checkpoint, or one that
        is not read.

    Raises:
        LlamaJaxError: for anything wrong with the files.
    """
    opened = open_checkpoint(name, ignore_keys=ignore_keys)
    own = read_tokenizer(opened, tokenizer)
    for note in (*opened.notes, *([opened.tokenizer_problem] if own is None and opened.tokenizer_problem else [])):
        warnings.warn(note, stacklevel=2)
    return opened.read(dtype, shardings, backend=backend, activations=activations), own


def read_tokenizer(opened: Opened, path: str | Path | None = None) -> Tokenizer | None:
    """The tokenizer at `path`, or the one that came with the checkpoint, or None.

    None also if the one that came cannot be used: `opened.tokenizer_problem` says why. What the checkpoint says of
    words goes for a named tokenizer too.

    Raises:
        LlamaJaxError: if the one at `path` is damaged, or has more ids than the model has embeddings.
    """
    if path is None:
        return opened._own_tokenizer[0]
    tokenizer = Tokenizer.from_file(path, opened.words)
    if tokenizer.model_bytes != opened.tokenizer_bytes:
        tokenizer.words = opened.words.for_another_tokenizer()
    return _of_model(tokenizer, opened.config)


def need_tokenizer(opened: Opened, path: str | Path | None = None) -> Tokenizer:
    """`read_tokenizer`, for what cannot do without.

    Raises:
        LlamaJaxError: as `read_tokenizer`, and if there is none: says why, and what to do.
    """
    tokenizer = read_tokenizer(opened, path)
    if tokenizer is None:
        why = opened.tokenizer_problem or f"{opened.path}: no tokenizer came with it"
        raise LlamaJaxError(f"{why}: give --tokenizer=PATH of its sentencepiece tokenizer.model")
    return tokenizer


def _of_model(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """The tokenizer, once it is sure that the model has an embedding for each of its ids."""
    if tokenizer.vocab_size > config.vocab_size:
        raise LlamaJaxError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size} embeddings: "
            "expected the tokenizer that the model was trained with"
        )
    return tokenizer


def save_checkpoint(
    model: Llama,
    path: str | Path,
    *,
    tokenizer: Tokenizer | bytes | None = None,
    words: Words | None = None,
    source: str = "llamajax",
    form: Literal["llamajax", "huggingface"] = "llamajax",
) -> None:
    """Writes a checkpoint folder, atomically: it appears whole, or not at all.

    Args:
        model: the model; leaves may be NumPy arrays.
        path: of the folder; must not exist.
        tokenizer: saved with the weights; as bytes, whatever they are.
        words: what is known of words, saved too; those of a `Tokenizer` are its own.
        source: where the weights came from; kept in the manifest.
        form: "llamajax" (Orbax) or "huggingface" (config.json and safetensors, as transformers reads it).

    Raises:
        LlamaJaxError: if `path` exists or cannot be created, if transformers would refuse the model, or if its weights
            are not finite or are laid out for a backend.
    """
    if any(isinstance(leaf, Layout) for leaf in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, Layout))):
        raise LlamaJaxError("the weights are laid out for a backend: save the model as it was before `prepare`")
    if form == "huggingface" and is_quantized(model):
        raise LlamaJaxError("the weights are quantized in a way that transformers does not read: write llamajax's form")
    if form == "huggingface" and model.config.width % model.config.num_heads:
        raise LlamaJaxError(
            f"width is {model.config.width}, num_heads {model.config.num_heads}: transformers expects a multiple; "
            "write llamajax's own form instead"
        )
    known = tokenizer if isinstance(tokenizer, Tokenizer) else _readable(tokenizer, words)
    for name, leaf in named_leaves(model).items():
        if not is_finite(leaf):
            raise LlamaJaxError(f"{path}: {name} holds NaN or infinity: nothing is written")
    tokenizer_bytes = tokenizer.model_bytes if isinstance(tokenizer, Tokenizer) else tokenizer
    words = tokenizer.words if isinstance(tokenizer, Tokenizer) else words
    with new_folder(Path(path)) as folder:
        if form == "huggingface":
            huggingface.save(model, folder, tokenizer_bytes, words, known)
        elif form == "llamajax":
            home.save(model, folder, tokenizer_bytes, source, words)
        else:
            raise LlamaJaxError(f"form is {form!r}: expected 'llamajax' or 'huggingface'")


def _readable(data: bytes | None, words: Words | None) -> Tokenizer | None:
    """The tokenizer that bytes are, if they are one."""
    try:
        return None if data is None else Tokenizer(data, words=words)
    except LlamaJaxError:
        return None


def _ignore(done: int, total: int) -> None:
    """For a caller that does not want to know how far reading is."""


def _assemble(
    path: Path,
    source: Source,
    dtype: Any,
    shardings: Any,
    on_tensor: Callable[[int, int], None],
    activations: str | None,
) -> Llama:
    """Fills a tree, tensor by tensor in the order of the files. There are no quantized weights in them."""
    abstract = abstract_model(source.config, dtype or source.dtype)
    if activations is not None:
        with_activations(abstract, activations)
    leaves = named_leaves(abstract)
    buffers: dict[str, np.ndarray] = {}
    for done, where in enumerate(source.order, 1):
        if where.name not in buffers:
            buffers[where.name] = aligned_empty(leaves[where.name].shape, leaves[where.name].dtype)
        array, part = source.read(where), buffers[where.name][... if where.layer is None else where.layer]
        with np.errstate(over="ignore"):
            part[...] = array
        check_fits(f"{path}: {where}", array, part)
        on_tensor(done, len(source.order))
    targets = placements(abstract, shardings)
    placed = [place(buffers.pop(name), targets[name]) for name in leaves]
    return jax.tree.unflatten(jax.tree.structure(abstract), placed)


def _checked(path: Path, abstract: Llama, read: Callable[[Place], np.ndarray]) -> Callable[[Place], np.ndarray]:
    """`read`, with an error for a tensor that is not of the shape that the model expects, or not finite."""
    shapes = {name: leaf.shape for name, leaf in named_weights(abstract).items()}

    def checked(where: Place) -> np.ndarray:
        array = read(where)
        expected = shapes[where.name] if where.layer is None else shapes[where.name][1:]
        if array.shape != expected:
            raise LlamaJaxError(f"{path}: {where} has shape {array.shape}: expected {expected}")
        if not is_finite(array):
            raise LlamaJaxError(f"{path}: {where} holds NaN or infinity: the weights are damaged")
        return array

    return checked


def _restore(
    path: Path,
    abstract: Llama,
    dtype: Any,
    shardings: Any,
    on_tensor: Callable[[int, int], None],
    backend: str | None,
    activations: str | None,
) -> Llama:
    """A checkpoint of ours, checked, and what else `load` may ask for."""
    if activations is not None:
        with_activations(abstract, activations)  # raises before anything is read

    def finish(name: str, weight: Any) -> Any:
        weight = _in_dtype(weight, dtype, f"{path}: {name}")
        weight = weight if activations is None else with_activations(weight, activations)
        if backend is None or only_looked_up(name, abstract.config):
            return weight
        return prepare_weight(weight, backend, donate=True)

    return home.restore(path, shardings, on_tensor, finish)


def _in_dtype(tree: Any, dtype: jax.typing.DTypeLike | None, name: str = "") -> Any:
    """With floats in another dtype. What is quantized stays as it is.

    Raises:
        LlamaJaxError: for numbers that it cannot hold, unless the leaves are abstract; the message begins with `name`.
    """
    if dtype is None:
        return tree

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, QTensor):
            return leaf
        with np.errstate(over="ignore"):
            after = leaf.astype(dtype)
        if name:
            check_fits(name, leaf, after)
        return after

    return jax.tree.map(convert, tree, is_leaf=lambda node: isinstance(node, QTensor))


def _tokenizer_beside(path: Path) -> bytes | None:
    """A `tokenizer.model` in the folder of a single-file checkpoint."""
    file = path.parent / "tokenizer.model"
    return read_bytes(file) if path.is_file() and os.path.lexists(file) else None


def _first_look(path: Path) -> str:
    """What an unknown thing seems to be."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())[:5]
        return f"a folder with {', '.join(names)}" if names else "an empty folder"
    with open_regular(path) as file:
        head = file.read(8)
    known = {b"GGUF": "GGUF", b"PK\x03\x04": "a zip or .pth file", b"\x80": "a pickle", b"ggjt": "ggml"}
    for magic, kind in known.items():
        if head.startswith(magic):
            return f"{kind}, which is not read"
    return f"first bytes {head.hex(' ')}" if head else "an empty file"
