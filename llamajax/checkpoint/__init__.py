"""Reads and writes checkpoints. Formats are recognised by their content, and weights are read tensor by tensor.

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

from llamajax.checkpoint import gguf, home, huggingface, llama2c
from llamajax.checkpoint.assemble import Finish, assemble, check_weight, outcome
from llamajax.checkpoint.checks import is_finite
from llamajax.checkpoint.source import Source
from llamajax.config import Config, preset_names
from llamajax.errors import LlamaJaxError
from llamajax.files import new_folder, open_regular, read_bytes
from llamajax.model import Llama
from llamajax.parameters import Place, named_arrays
from llamajax.tokenizer import LARGEST_TOKENIZER, Tokenizer
from llamajax.words import Words
from quant import is_laid_out

BOX = "box"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint whose header was read and checked; its weights have not been read.

    Attributes:
        path: the file or folder.
        source: the reader's description of it.
        tokenizer_bytes: the tokenizer that came with it, or None; `tokenizer_problem` says whether it can be used.
    """

    path: Path
    source: Source
    tokenizer_bytes: bytes | None

    @property
    def description(self) -> str:
        """The source format, as text for users."""
        return self.source.description

    @property
    def config(self) -> Config:
        """The architecture."""
        return self.source.config

    @property
    def words(self) -> Words:
        """Settings for text beside the tokenizer: special ids, added tokens, default sampling parameters."""
        return self.source.words

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each part of its files that is not used, with the reason."""
        return self.source.notes

    @functools.cached_property
    def abstract(self) -> Llama:
        """The model as stored, with `jax.ShapeDtypeStruct` leaves."""
        return outcome(self.source)

    def read(
        self,
        dtype: jax.typing.DTypeLike | None = None,
        shardings: Any = None,
        on_weight: Callable[[int, int], None] = lambda done, total: None,
        backend: str | None = None,
        activations: str | None = None,
    ) -> Llama:
        """Reads the weights.

        Args:
            dtype: dtype of float weights, which are converted while reading; as stored by default.
            shardings: one `jax.sharding.Sharding`, or a tree of them shaped like the model; "host" for leaves that stay
                NumPy arrays. The first device by default.
            on_weight: called with (weights read, weights in all); the weights of each layer count separately.
            backend: as in `load`.
            activations: as in `load`.

        Raises:
            LlamaJaxError: if weights are damaged, or the arguments do not fit the model.
        """
        return assemble(self.path, self.source, Finish(dtype, activations, backend), shardings, on_weight)

    def outcome(
        self,
        dtype: jax.typing.DTypeLike | None = None,
        backend: str | None = None,
        activations: str | None = None,
    ) -> Llama:
        """Returns the result of `read` with `jax.ShapeDtypeStruct` leaves, to compile for it while weights are read."""
        return outcome(self.source, Finish(dtype, activations, backend))

    def read_weight(self, place: Place) -> Any:
        """Reads and checks one weight of one layer, as stored, with NumPy arrays."""
        weight = self.source.read(place)
        check_weight(self.path, self.source, place, weight)
        return weight

    @property
    def tokenizer_problem(self) -> str | None:
        """Why the tokenizer that came with the checkpoint cannot be used; None if it can, or if there is none."""
        return self.source.tokenizer_problem or self._own_tokenizer[1]

    @functools.cached_property
    def _own_tokenizer(self) -> tuple[Tokenizer | None, str | None]:
        """The tokenizer that came with the checkpoint, or None; and why it cannot be used, or None."""
        if self.tokenizer_bytes is None:
            return None, None
        try:
            tokenizer = Tokenizer(self.tokenizer_bytes, f"{self.path}: its tokenizer", self.words)
            return _of_model(tokenizer, self.config), None
        except LlamaJaxError as error:
            return None, str(error)


def resolve(name: str | Path) -> Path:
    """Returns the folder of the built-in model for "box", else the path itself.

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
        ignore_keys: keys of a Hugging Face config.json, or of a GGUF file's metadata, to ignore: keys that llamajax
            does not know and that do not change the forward pass.

    Raises:
        LlamaJaxError: if there is no checkpoint, if its format is unknown, or if its header is damaged.
    """
    path = resolve(name)
    for recognise, open_source in READERS:
        if recognise(path):
            source = open_source(path, ignore_keys)
            beside = None if source.tokenizer_problem else _tokenizer_beside(path)
            return Opened(path, source, source.tokenizer_bytes or beside)
    raise LlamaJaxError(f"{path}: unknown format ({_first_look(path)}): expected {_FORMATS}")


# One reader a format: whether a path is of it, and what it holds, given keys of a config to read over.
READERS: list[tuple[Callable[[Path], bool], Callable[[Path, Collection[str]], Source]]] = [
    (home.recognise, lambda path, ignore_keys: home.open_source(path)),
    (huggingface.recognise, huggingface.open_source),
    (gguf.recognise, gguf.open_source),
    (llama2c.recognise, lambda path, ignore_keys: llama2c.open_source(path)),
]
_FORMATS = (
    "a llamajax checkpoint (manifest.json), a Hugging Face folder (config.json and safetensors), a GGUF file or a "
    "llama2.c file (version 0, 1 or 2)"
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

    Warns about each part of the files that is not used, and about a tokenizer that cannot be used (`Opened.notes`,
    `Opened.tokenizer_problem`).

    Args:
        name: path of a checkpoint (llamajax, Hugging Face, GGUF or llama2.c), or "box" for the model in the package.
        tokenizer: path of a `tokenizer.model`, `tokenizer.json` or `tokenizer.bin`; by default, the one that came with
            the checkpoint.
        dtype: dtype of float weights, for example `jax.numpy.float32`; as stored by default.
        shardings: where the weights go: one `jax.sharding.Sharding`, or a tree of them shaped like the model; the first
            device by default.
        backend: lays out each quantized weight for this backend, such as `jax.default_backend()`, as soon as it has
            been read. The result equals `prepare` of the loaded model, but it is ready sooner and peak memory is lower.
        activations: the dtype that activations are rounded to before they are multiplied with quantized weights, as in
            `with_activations`; as stored by default.
        ignore_keys: as in `open_checkpoint`.

    Returns:
        The model, and its tokenizer. The tokenizer is None if none was named and the checkpoint came with none, or
        with one that cannot be used.

    Raises:
        LlamaJaxError: if anything is wrong with the files.
    """
    opened = open_checkpoint(name, ignore_keys=ignore_keys)
    own = read_tokenizer(opened, tokenizer)
    for note in (*opened.notes, *([opened.tokenizer_problem] if own is None and opened.tokenizer_problem else [])):
        warnings.warn(note, stacklevel=2)
    return opened.read(dtype, shardings, backend=backend, activations=activations), own


def read_tokenizer(opened: Opened, path: str | Path | None = None) -> Tokenizer | None:
    """Returns the tokenizer at `path`, else the one that came with the checkpoint, else None.

    The result is also None if the checkpoint's tokenizer cannot be used: `opened.tokenizer_problem` says why. The
    checkpoint's `words` apply to a tokenizer at `path`, too.

    Raises:
        LlamaJaxError: if the tokenizer at `path` is damaged, or has more ids than the model has embeddings.
    """
    if path is None:
        return opened._own_tokenizer[0]
    tokenizer = Tokenizer.from_file(path, opened.words)
    own = opened._own_tokenizer[0]
    if tokenizer.model_bytes != (opened.tokenizer_bytes if own is None else own.model_bytes):
        tokenizer.words = opened.words.for_another_tokenizer()
    return _of_model(tokenizer, opened.config)


def need_tokenizer(opened: Opened, path: str | Path | None = None) -> Tokenizer:
    """Returns the result of `read_tokenizer`, for callers that need a tokenizer.

    Raises:
        LlamaJaxError: as in `read_tokenizer`; and if there is no tokenizer, with the reason and a remedy.
    """
    tokenizer = read_tokenizer(opened, path)
    if tokenizer is None:
        why = opened.tokenizer_problem or f"{opened.path}: no tokenizer came with it"
        raise LlamaJaxError(f"{why}: give --tokenizer=PATH of its tokenizer.model or tokenizer.json")
    return tokenizer


def _of_model(tokenizer: Tokenizer, config: Config) -> Tokenizer:
    """Returns the tokenizer after checking that the model has an embedding for each of its ids."""
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
    form: Literal["llamajax", "huggingface", "gguf"] = "llamajax",
    dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Writes a checkpoint atomically: it appears whole, or not at all.

    Args:
        model: the model; leaves may be NumPy arrays.
        path: path of the folder; for "gguf", path of the file, which must end in .gguf. Must not exist.
        tokenizer: saved with the weights. Bytes are saved as they are, even if they are no valid tokenizer.
        words: settings for text that are saved as well; a `Tokenizer` has its own, which are used instead.
        source: where the weights came from; kept in the manifest.
        form: "llamajax" (Orbax), "huggingface" (config.json and safetensors, as transformers reads it) or "gguf" (one
            file, as llama.cpp reads it).
        dtype: for "gguf" only: dtype of all matrices; vectors are float32 in any case. Packed weights become floats of
            this dtype, too; without it they are written as ggml types.

    Raises:
        LlamaJaxError: if `path` exists or cannot be created, if transformers would refuse the model, if no ggml type
            holds a weight, or if weights are not finite or are laid out for a backend.
    """
    if is_laid_out(model):
        raise LlamaJaxError("the weights are in the layout of a backend: save the model as it was before `prepare`")
    if form == "huggingface" and (reason := huggingface.refusal(model)):
        raise LlamaJaxError(
            f"transformers cannot read the quantized weights ({reason}): write llamajax's format or GGUF; for floats, "
            "write a GGUF with a dtype and convert it"
        )
    if form == "huggingface" and model.config.width % model.config.num_heads:
        raise LlamaJaxError(
            f"width is {model.config.width}, num_heads {model.config.num_heads}: transformers expects width to be a "
            "multiple of num_heads: write llamajax's own format instead"
        )
    known = tokenizer if isinstance(tokenizer, Tokenizer) else _readable(tokenizer, words)
    for name, leaf in named_arrays(model).items():
        if not is_finite(leaf):
            raise LlamaJaxError(f"{path}: {name} holds NaN or infinity: expected finite weights; nothing is written")
    tokenizer_bytes = tokenizer.model_bytes if isinstance(tokenizer, Tokenizer) else tokenizer
    words = tokenizer.words if isinstance(tokenizer, Tokenizer) else words
    if form == "gguf":
        if known is None and tokenizer_bytes is not None:
            raise LlamaJaxError("the tokenizer cannot be read, so it cannot be written to GGUF: give a readable one")
        gguf.save(model, Path(path), known, words, dtype)
        return
    with new_folder(Path(path)) as folder:
        if form == "huggingface":
            huggingface.save(model, folder, tokenizer_bytes, words, known)
        elif form == "llamajax":
            home.save(model, folder, tokenizer_bytes, source, words)
        else:
            raise LlamaJaxError(f"form is {form!r}: expected 'llamajax', 'huggingface' or 'gguf'")


def _readable(data: bytes | None, words: Words | None) -> Tokenizer | None:
    """Returns the tokenizer that bytes hold, or None if they hold none."""
    try:
        return None if data is None else Tokenizer(data, words=words)
    except LlamaJaxError:
        return None


def _tokenizer_beside(path: Path) -> bytes | None:
    """Reads a tokenizer beside a single-file checkpoint, if there is one with a usual name."""
    files = [path.parent / name for name in ("tokenizer.model", "tokenizer.json", "tokenizer.bin")]
    found = next((file for file in files if os.path.lexists(file)), None)
    return read_bytes(found, LARGEST_TOKENIZER) if path.is_file() and found is not None else None


def _first_look(path: Path) -> str:
    """Describes a file or folder of unknown format."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())[:5]
        return f"a folder with {', '.join(names)}" if names else "an empty folder"
    with open_regular(path) as file:
        head = file.read(8)
    known = {b"PK\x03\x04": "a zip or .pth file", b"\x80": "a pickle"}
    known |= dict.fromkeys((b"tjgg", b"fmgg", b"lmgg"), "ggml's format before GGUF")
    for magic, kind in known.items():
        if head.startswith(magic):
            return f"{kind}, which is not read"
    return f"first bytes {head.hex(' ')}" if head else "an empty file"
