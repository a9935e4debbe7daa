"""Reads the tokenizer and the `Words` of a GGUF from its metadata."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llamajax.errors import LlamaJaxError
from llamajax.files import shortened
from llamajax.tokenizer.ends import ends_of, with_first
from llamajax.tokenizer.json_form import byte_level_json
from llamajax.tokenizer.model_proto import (
    BPE,
    BYTE,
    BYTE_PIECE,
    CONTROL,
    NORMAL,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    make_model,
)
from llamajax.tokenizer.pre_tokenizers import PATTERNS
from llamajax.words import AddedToken, Words, is_carried

PREFIX = "tokenizer."
TEMPLATE = "tokenizer.chat_template"
# The roles of tokens, each with the KEY in `tokenizer.ggml.KEY_token_id`.
PARTS = {
    "bos": "bos",
    "eos": "eos",
    "eot": "eot",
    "eom": "eom",
    "unk": "unknown",
    "pad": "padding",
    "fim_pad": "fim_pad",
    "fim_rep": "fim_rep",
    "fim_sep": "fim_sep",
}
# Keys without effect on how text becomes ids: the places of code to fill in, roles of BERT, a copy in another form.
_WITHOUT_EFFECT = frozenset(
    f"tokenizer.{key}"
    for key in (
        *(f"ggml.{part}_token_id" for part in ("fim_pre", "fim_suf", "fim_mid", "prefix", "suffix", "middle")),
        *(f"ggml.{part}_token_id" for part in ("seperator", "mask", "cls")),
        "huggingface.json",
    )
)
_TYPES = range(1, 7)


class _Kind(NamedTuple):
    """The defaults that llama.cpp uses for a value of `tokenizer.ggml.model`."""

    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    dummy_prefix: bool


_KINDS = {
    "llama": _Kind({"bos": 1, "eos": 2, "unk": 0}, add_bos=True, add_eos=False, dummy_prefix=True),
    "gpt2": _Kind({}, add_bos=False, add_eos=False, dummy_prefix=False),
    "t5": _Kind({"eos": 1, "unk": 2, "pad": 0}, add_bos=False, add_eos=True, dummy_prefix=False),
}


def from_metadata(metadata: Mapping[str, Any]) -> tuple[bytes | None, Words, frozenset[str]]:
    """Returns the tokenizer of a GGUF.

    Args:
        metadata: all keys and values of the file: text as str, or bytes of UTF-8; arrays as sequences or NumPy arrays.

    Returns:
        The tokenizer in one of the two kept forms, or None if the file has none; the `Words` of the metadata, with the
        chat templates among their files; and the keys that were handled: all that begin with "tokenizer.".

    Warns:
        UserWarning: if a byte-level vocabulary does not name its pre-tokenizer.

    Raises:
        LlamaJaxError: for keys or values that are unknown or contradict each other.
    """
    keys = _Keys(metadata)
    model = keys.text("ggml.model", None)
    if model in (None, "none", "no_vocab"):
        data, words = None, Words()
        keys.used |= {key for key in metadata if key.startswith("tokenizer.ggml.")}
    elif model in _KINDS:
        data, words = _read(keys, model)
    else:
        raise LlamaJaxError(f"tokenizer.ggml.model is {shortened(model)}: expected one of {', '.join(_KINDS)}")
    words = dataclasses.replace(words, files=_templates(keys))
    left = sorted(key for key in metadata if key.startswith(PREFIX) and key not in keys.used | _WITHOUT_EFFECT)
    if left:
        raise LlamaJaxError(
            f"{shortened(left[0])} is {shortened(metadata[left[0]])}: an unknown key of the tokenizer, "
            f"which may change ids: give --ignore_key={shortened(left[0])[1:-1]} if it does not change them"
        )
    if model == "gpt2" and metadata.get("tokenizer.ggml.pre") is None:
        warnings.warn(
            "tokenizer.ggml.pre is missing: text is split by llama.cpp's default, which probably differs from what the "
            "model was trained with: take a newer conversion",
            stacklevel=2,
        )
    return data, words, frozenset(key for key in metadata if key.startswith(PREFIX))


class _Keys:
    """The keys `tokenizer.…` of a file. Each method checks the type of a value; `used` holds the keys asked for."""

    def __init__(self, metadata: Mapping[str, Any]):
        self.metadata = metadata
        self.used: set[str] = set()

    def value(self, name: str) -> Any:
        """The value of any type, or None."""
        self.used.add(PREFIX + name)
        return self.metadata.get(PREFIX + name)

    def text(self, name: str, otherwise: Any) -> Any:
        """A text."""
        value = self.value(name)
        return otherwise if value is None else self._decoded(name, value)

    def flag(self, name: str, otherwise: bool) -> bool:
        """A bool."""
        value = self.value(name)
        if value is None:
            return otherwise
        if not isinstance(value, int) or value not in (False, True):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def number(self, name: str) -> int | None:
        """A whole number."""
        value = self.value(name)
        if value is None:
            return None
        try:
            whole = int(value)
        except (TypeError, ValueError, OverflowError):
            whole = -1
        if whole < 0 or whole != value:
            raise self._wrong(name, value, "a token's id")
        return whole

    def texts(self, name: str) -> list[str] | None:
        """An array of texts."""
        value = self.value(name)
        if value is None:
            return None
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise self._wrong(name, value, "an array of texts")
        if set(map(type, value)) <= {str}:
            return list(value)
        return [self._decoded(name, each) for each in value]

    def numbers(self, name: str, length: int | None, otherwise: Any) -> list[Any] | None:
        """The first `length` numbers of an array, which must have as many; all numbers if `length` is None."""
        value = self.value(name)
        if value is None:
            return otherwise
        listed = value.tolist() if hasattr(value, "tolist") else value
        if not isinstance(listed, list | tuple) or not set(map(type, listed)) <= {int, float, bool}:
            raise self._wrong(name, value, "an array of numbers")
        if length is not None and len(listed) < length:
            raise LlamaJaxError(f"tokenizer.{name} has {len(listed)} values for {length} tokens: expected one for each")
        return list(listed[:length])

    def _decoded(self, name: str, value: Any) -> str:
        if isinstance(value, bytes | bytearray | memoryview):
            try:
                return bytes(value).decode()
            except UnicodeDecodeError:
                raise self._wrong(name, bytes(value), "UTF-8") from None
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def _wrong(self, name: str, value: Any, expected: str) -> LlamaJaxError:
        return LlamaJaxError(f"tokenizer.{name} is {shortened(value)}: expected {expected}")


def _read(keys: _Keys, model: str) -> tuple[bytes, Words]:
    """Reads a tokenizer whose `tokenizer.ggml.model` is one of `_KINDS`."""
    kind = _KINDS[model]
    tokens = keys.texts("ggml.tokens")
    if not tokens:
        raise LlamaJaxError("tokenizer.ggml.tokens is missing: expected the pieces of the vocabulary")
    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if ids[token] != index)
        raise LlamaJaxError(f"tokenizer.ggml.tokens has {shortened(twice)} twice: expected each token once")
    said: dict[str, int] = {}
    for part, key in PARTS.items():
        index = keys.number(f"ggml.{key}_token_id")
        if index is None or index >= len(tokens):  # 4294967295, for example, stands for none
            index = kind.ids.get(part)
        if index is not None and index < len(tokens):
            said[part] = index
    types = _types(keys, tokens, said, guess=model != "gpt2")
    stops, known = ends_of(ids, said)
    for index in known:
        types[index] = CONTROL if types[index] in (NORMAL, USER_DEFINED) else types[index]
    if keys.flag("ggml.add_sep_token", False):
        raise LlamaJaxError("tokenizer.ggml.add_sep_token is true: expected false, as separators are not supported")
    pre = PATTERNS.get(keys.text("ggml.pre", "default")) if model == "gpt2" else None
    add_bos = keys.flag("ggml.add_bos_token", kind.add_bos if pre is None else pre.adds_bos)
    add_eos = keys.flag("ggml.add_eos_token", kind.add_eos)
    for part, adds in (("bos", add_bos), ("eos", add_eos)):
        if adds and part not in said:
            raise LlamaJaxError(
                f"tokenizer.ggml.add_{part}_token is true, in the file or by default, but "
                f"tokenizer.ggml.{part}_token_id is missing: expected the token's id"
            )
    named: dict[str, str] = {part: tokens[said[part]] for part in ("bos", "eos") if part in said}
    space: str | None = None
    added: tuple[AddedToken, ...] = ()
    if model == "gpt2":
        data = _byte_level(keys, tokens, types, {part for part in named if (add_bos, add_eos)[part == "eos"]}, named)
    else:
        data, space = _sentencepiece(keys, model, tokens, types, said)
        added = tuple(
            AddedToken(id=index, text=tokens[index]) for index, one in enumerate(types) if one == USER_DEFINED
        )
    words = Words(
        bos_id=said.get("bos"),
        stop_ids=with_first(said.get("eos"), stops) if stops else None,
        pad_id=said.get("pad"),
        bos_token=named.get("bos"),
        eos_token=named.get("eos"),
        add_bos=add_bos,
        add_eos=add_eos,
        space=space,
        added=added,
    )
    return data, words


def _types(keys: _Keys, tokens: list[str], said: Mapping[str, int], guess: bool) -> list[int]:
    """The type of each token; if the file gives none, types are derived from the tokens' texts and roles."""
    types = keys.numbers("ggml.token_type", len(tokens), None)
    if types is not None:
        unknown = next((one for one in types if one not in _TYPES), None)
        if unknown is not None:
            raise LlamaJaxError(f"tokenizer.ggml.token_type has {shortened(unknown)}: expected 1 to 6")
        return [int(one) for one in types]
    types = [BYTE if guess and BYTE_PIECE.fullmatch(token) else NORMAL for token in tokens]
    for part in ("bos", "eos"):
        if part in said:
            types[said[part]] = CONTROL
    return types


def _byte_level(keys: _Keys, tokens: list[str], types: list[int], adds: set[str], named: Mapping[str, str]) -> bytes:
    """Converts a "gpt2" vocabulary to a tokenizer.json."""
    name = keys.text("ggml.pre", "default")
    if name not in PATTERNS:
        raise LlamaJaxError(
            f"tokenizer.ggml.pre is {shortened(name)}, an unknown pre-tokenizer: expected one of "
            f"{', '.join(sorted(PATTERNS))}"
        )
    keys.numbers("ggml.scores", 0, None)  # not used: merges alone define the vocabulary
    keys.flag("ggml.add_space_prefix", False)
    keys.flag("ggml.remove_extra_whitespaces", False)
    merges = keys.texts("ggml.merges")
    if merges is None:
        raise LlamaJaxError("tokenizer.ggml.merges is missing: expected the merges of the vocabulary")
    if BYTE in types:
        raise LlamaJaxError(
            "tokenizer.ggml.token_type has byte tokens (6): expected none, as GPT-2 spells bytes as characters"
        )
    pre = PATTERNS[name]
    special = {tokens[index]: index for index, one in enumerate(types) if one in (CONTROL, UNKNOWN)}
    # The tokens that begin and end every text are special in the file, whatever their types.
    special |= {named[part]: tokens.index(named[part]) for part in adds}
    return byte_level_json(
        {token: index for index, token in enumerate(tokens)},
        list(dict.fromkeys(merges)),
        patterns=pre.expressions,
        ignore_merges=pre.ignore_merges,
        special=special,
        user_defined={
            tokens[index]: index
            for index, one in enumerate(types)
            if one == USER_DEFINED and tokens[index] not in special
        },
        bos=named["bos"] if "bos" in adds else None,
        eos=named["eos"] if "eos" in adds else None,
    )


def _sentencepiece(
    keys: _Keys, model: str, tokens: list[str], types: list[int], said: Mapping[str, int]
) -> tuple[bytes, str]:
    """Converts a "llama" or "t5" vocabulary to a sentencepiece model; also returns where spaces are put (`Words`)."""
    scores = keys.numbers("ggml.scores", len(tokens), [0.0] * len(tokens))
    assert scores is not None
    keys.texts("ggml.merges")  # not used: some converters write them too, but the scores decide
    keys.text("ggml.pre", None)
    if said.get("unk") is None:
        raise LlamaJaxError("tokenizer.ggml.unknown_token_id is missing: expected the id of the unknown token")
    # Sentencepiece requires exactly one unknown piece, and either all 256 byte pieces or none.
    types = [CONTROL if one == UNKNOWN else one for one in types]
    types[said["unk"]] = UNKNOWN
    for index, one in enumerate(types):
        if one == BYTE and not BYTE_PIECE.fullmatch(tokens[index]):
            raise LlamaJaxError(
                f"token {index} is {shortened(tokens[index])}, but its type is byte (6): expected <0x00> to <0xFF>"
            )
    if types.count(BYTE) not in (0, 256):
        raise LlamaJaxError(f"tokenizer.ggml.token_type has {types.count(BYTE)} bytes: expected 256 or none")
    prefix = keys.flag("ggml.add_space_prefix", _KINDS[model].dummy_prefix)
    charsmap = keys.numbers("ggml.precompiled_charsmap", None, None)
    pieces = [
        token.replace(" ", "▁") if one == USER_DEFINED else token for token, one in zip(tokens, types, strict=True)
    ]
    if len(set(pieces)) < len(pieces):
        raise LlamaJaxError(
            "tokenizer.ggml.tokens has tokens that differ only in a space and ▁: expected only one of them"
        )
    data = make_model(
        pieces,
        scores,
        types,
        bos_id=said.get("bos"),
        eos_id=said.get("eos"),
        pad_id=said.get("pad"),
        kind=BPE if model == "llama" else UNIGRAM,
        dummy_prefix=prefix,
        remove_extra_whitespaces=keys.flag("ggml.remove_extra_whitespaces", False),
        charsmap=_bytes_of("ggml.precompiled_charsmap", charsmap or []),
    )
    # llama.cpp puts the space after every added token in the text, not only before the whole text.
    return data, "always" if prefix else "never"


def _bytes_of(name: str, values: list[Any]) -> bytes:
    """Converts an array of 8-bit numbers, signed or unsigned, to bytes."""
    if not all(isinstance(value, int) and -128 <= value < 256 for value in values):
        raise LlamaJaxError(f"tokenizer.{name}: expected an array of bytes")
    return bytes(value & 255 for value in values)


def _templates(keys: _Keys) -> dict[str, bytes]:
    """The chat templates as files."""
    files = {}
    default = keys.text("chat_template", None)
    if default:
        files["chat_template.jinja"] = default.encode()
    keys.value("chat_templates")  # lists the names of the templates in the keys read below
    for key in sorted(keys.metadata):
        if key.startswith(f"{TEMPLATE}."):
            name = key.removeprefix(f"{TEMPLATE}.")
            file = f"chat_template.{name}.jinja"
            if not is_carried(file):
                raise LlamaJaxError(
                    f"{shortened(key)} names a chat template: expected a name of 1 to 40 letters, digits, _ and -"
                )
            files[file] = keys.text(f"chat_template.{name}", "").encode()
    return files
