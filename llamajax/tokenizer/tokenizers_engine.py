"""The engine for tokenizer.json: Hugging Face's library tokenizers, which is used only to turn text into ids.

The file decides how text becomes ids: its normalizer, its pre-tokenizer, its model and its added tokens. `Tokenizer`
adds BOS and EOS; whether it does by default is read from the file's post-processor. This module turns ids into bytes
one by one, so that text can be streamed. It follows the file's decoder, of which two kinds are in use: characters that
stand for bytes (GPT-2's table), and pieces with ▁ for a space.
"""

import base64
import json
import re
import threading
from typing import Any

from llamajax.files import shortened
from llamajax.tokenizer.byte_level import bytes_of
from llamajax.tokenizer.ends import END_TEXTS
from llamajax.tokenizer.engine import UNNAMED, EngineError
from llamajax.tokenizer.json_form import steps_of
from llamajax.words import AddedToken, Words

_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_LARGEST_ID = 1 << 27
# The largest factor by which the normalizers of a file, one after the other, may lengthen a text.
_MOST_GROWTH = 64


class TokenizersEngine:
    """See `engine.Engine`."""

    form = "tokenizers"
    controls: tuple[AddedToken, ...] = ()

    def __init__(self, data: bytes, words: Words):
        """Reads a tokenizer.json.

        Raises:
            EngineError: if it is not a tokenizer.json, contradicts the added tokens, or needs unsupported steps.
        """
        self._library = _read(data)
        self._lock = threading.Lock()
        parts = {name: _state(self._library, name) for name in ("normalizer", "decoder", "post_processor")}
        _check_growth(parts["normalizer"])
        self._decoding = _decoding(parts["decoder"])
        if words.space is not None and self._decoding.space:
            self._put_spaces(words.space)
        self.drops_first_space = self._decoding.strips
        self._add_tokens(words)
        ids = self._library.get_vocab(with_added_tokens=True).values()
        self.size = max(ids, default=-1) + 1
        if not 0 < self.size <= _LARGEST_ID:
            raise EngineError(f"a tokenizer.json whose ids end at {self.size - 1}: expected 0 to {_LARGEST_ID - 1}")
        before, behind = _template(parts["post_processor"])
        self.bos_id, self.eos_id = self._one(before, "before"), self._one(behind, "behind")
        self.add_bos, self.add_eos = self.bos_id is not None, self.eos_id is not None
        unknown = getattr(self._library.model, "unk_token", None)
        self.unk_id = None if not isinstance(unknown, str) else self.id_of(unknown)
        ends = [token.id for token in self.added if token.special and token.text in END_TEXTS]
        self.stop_ids = tuple(dict.fromkeys([self.eos_id] if self.eos_id is not None else [])) or tuple(ends)
        if self.eos_id is None and ends:
            self.eos_id = ends[0]

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Engine.encode`."""
        with self._lock:  # the library stores this setting in the tokenizer
            self._library.encode_special_tokens = not special
            return _guarded(lambda: self._library.encode(text, add_special_tokens=False).ids)

    def spell(self, text: str, first: bool) -> list[int]:
        """See `Engine.spell`."""
        return _guarded(lambda: self._spelt(text, first))

    def _spelt(self, text: str, first: bool) -> list[int]:
        """Runs the file's steps one by one, because the library cannot skip the step that reads added tokens."""
        library = self._library
        normal = text if library.normalizer is None else library.normalizer.normalize_str(text)
        splitter = library.pre_tokenizer if first else self._splitter_behind()
        words = [normal] if splitter is None else [word for word, _ in splitter.pre_tokenize_str(normal)]
        return [token.id for word in words if word for token in library.model.tokenize(word)]

    def _splitter_behind(self) -> Any:
        """The pre-tokenizer for text after another part: a prepend scheme "first" becomes "never"."""
        from tokenizers import pre_tokenizers

        splitter = self._library.pre_tokenizer
        state = None if splitter is None else json.loads(splitter.__getstate__())
        firsts: list[Any] = [step for step in steps_of(state, "pretokenizers") if step.get("prepend_scheme") == "first"]
        if not firsts:
            return splitter
        for step in firsts:
            step["prepend_scheme"] = "never"
        made = pre_tokenizers.Metaspace()
        made.__setstate__(json.dumps(state).encode())
        return made

    def piece(self, index: int) -> str:
        """See `Engine.piece`."""
        return self._library.id_to_token(index) or ""

    def token_bytes(self, index: int) -> bytes:
        """See `Engine.token_bytes`."""
        made = self._bytes.get(index)
        if made is None:
            piece = self._library.id_to_token(index)
            made = self._bytes[index] = UNNAMED if piece is None else self._decoding.bytes_of(piece)
        return made

    def id_of(self, piece: str) -> int | None:
        """See `Engine.id_of`."""
        return self._library.token_to_id(piece)

    def is_spelt(self, index: int) -> bool:
        """Always false: the decoder of a tokenizer.json drops the first space, whatever it came from."""
        return False

    def _put_spaces(self, scheme: str) -> None:
        """Puts spaces before text as the checkpoint says instead of the file, like transformers' LlamaTokenizer."""
        from tokenizers import pre_tokenizers

        self._library.normalizer = None
        self._library.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split=False)
        self._decoding.strips = scheme != "never"

    def _one(self, ids: list[int], where: str) -> int | None:
        """The id that a post-processor puts before, or after, a text."""
        if len(ids) > 1:
            raise EngineError(f"a tokenizer.json that puts {len(ids)} tokens {where} every text: expected at most one")
        if ids and not 0 <= ids[0] < self.size:
            raise EngineError(f"a tokenizer.json that puts id {ids[0]} {where} every text: expected one of its ids")
        return ids[0] if ids else None

    def _add_tokens(self, words: Words) -> None:
        """Adds the checkpoint's added tokens to those of the file."""
        from tokenizers import AddedToken as TheirToken

        for token in words.added:
            flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
            theirs = TheirToken(token.text, special=token.special, **flags)
            add = self._library.add_special_tokens if token.special else self._library.add_tokens
            _guarded(lambda add=add, theirs=theirs: add([theirs]))
            if self._library.token_to_id(token.text) != token.id:
                raise EngineError(
                    f"added token {shortened(token.text)} has id {self._library.token_to_id(token.text)} in its "
                    f"tokenizer.json, but {token.id} among the added tokens: expected the tokenizer that the model was "
                    "trained with"
                )
        special = {token.id for token in words.added if token.special}
        self.added = tuple(
            AddedToken(
                id=index,
                text=token.content,
                special=token.special or index in special,
                **{name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")},
            )
            for index, token in sorted(self._library.get_added_tokens_decoder().items())
        )
        self._bytes = {token.id: b"" if token.special else token.text.encode() for token in self.added}


class _Decoding:
    """How pieces become bytes.

    Attributes:
        space: the character that stands for a space in pieces of text; "" if pieces consist of bytes.
        strips: whether the space that begins a text is removed.
    """

    def __init__(self, space: str = "", byte_pieces: bool = False, strips: bool = False):
        """Without `space`, pieces are decoded by GPT-2's table; with `byte_pieces`, a piece like <0x41> is a byte."""
        self.space, self._byte_pieces, self.strips = space, byte_pieces, strips

    def bytes_of(self, piece: str) -> bytes:
        """The bytes that a piece stands for."""
        if not self.space:
            return bytes_of(piece)
        if self._byte_pieces and _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(self.space, " ").encode()


def _decoding(state: Any) -> _Decoding:
    """Recognises a decoder of the kinds that models of the LLaMA family have.

    Raises:
        EngineError: for any other decoder.
    """
    steps = list(steps_of(state, "decoders"))
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _Decoding()
    if kinds == ["Metaspace"]:
        scheme = steps[0].get("prepend_scheme", "always")
        return _Decoding(space=steps[0].get("replacement", "▁"), strips=scheme != "never")
    replaced = [step for step in steps if step.get("type") == "Replace"]
    strips = [step for step in steps if step.get("type") == "Strip"]
    if (
        set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}
        and [step.get("pattern") for step in replaced] == [{"String": "▁"}]
        and [step.get("content") for step in replaced] == [" "]
        and all((step.get("content"), step.get("start"), step.get("stop")) == (" ", 1, 0) for step in strips)
    ):
        return _Decoding(space="▁", byte_pieces="ByteFallback" in kinds, strips=bool(strips))
    named = ", ".join(map(str, kinds)) or "none"
    raise EngineError(
        f"a tokenizer.json whose decoder ({shortened(named)}) is unknown: expected ByteLevel, Metaspace, or Replace of "
        "▁ by a space"
    )


def _template(state: Any) -> tuple[list[int], list[int]]:
    """The ids that a post-processor puts before a text, and after it.

    Raises:
        EngineError: for an unknown post-processor.
    """
    before: list[int] = []
    behind: list[int] = []
    for step in steps_of(state, "processors"):
        if step.get("type") == "TemplateProcessing":
            where = before
            tokens = step.get("special_tokens", {})
            for piece in step.get("single", []):
                if "Sequence" in piece:
                    where = behind
                    continue
                named = tokens.get(piece["SpecialToken"]["id"])
                if named is None:
                    raise EngineError(
                        f"a tokenizer.json whose post-processor names {shortened(piece)}: expected a token"
                    )
                where += named["ids"]
        elif step.get("type") != "ByteLevel":
            raise EngineError(
                f"a tokenizer.json with the post-processor {shortened(step.get('type'))}: expected "
                "TemplateProcessing or ByteLevel"
            )
    return before, behind


def _check_growth(state: Any) -> None:
    """Refuses normalizers that could make a text many times as long.

    Raises:
        EngineError: if the factor may exceed `_MOST_GROWTH`.
    """
    growth = 1
    for step in steps_of(state, "normalizers"):
        if step.get("type") == "Replace":
            growth *= max(1, len(step.get("content", "")) + (not next(iter(step.get("pattern", {}).values()), "")))
        growth *= 1 if step.get("type") in ("Replace", "Strip", "Lowercase") else 1 + len(step.get("prepend", "")) // 64
        if growth > _MOST_GROWTH:
            raise EngineError(
                f"a tokenizer.json whose normalizer makes text up to {growth} times as long: expected at most "
                f"{_MOST_GROWTH} times"
            )


def _state(library: Any, name: str) -> Any:
    """A part of a tokenizer.json as the library read it; None if the file lacks that part."""
    part = getattr(library, name)
    return None if part is None else json.loads(part.__getstate__())


def _read(data: bytes) -> Any:
    """The library's tokenizer without padding, truncation and dropout, which serve training.

    Raises:
        EngineError: for bytes that the library cannot read.
    """
    import tokenizers  # imported here, because a machine for measuring may lack it (benchmarks/device.py)

    if b'"Precompiled"' in data:
        _check_charsmaps(data)
    library = _guarded(lambda: tokenizers.Tokenizer.from_buffer(data))
    library.no_padding()
    library.no_truncation()
    if getattr(library.model, "dropout", None) is not None:
        library.model.dropout = None  # with dropout, ids would be random
    return library


def _check_charsmaps(data: bytes) -> None:
    """Refuses damaged normalizer tables, on which the library would panic and print to standard error.

    Raises:
        EngineError: for a damaged table.
    """
    from tokenizers import normalizers

    value = _guarded(lambda: json.loads(data))
    steps = _guarded(lambda: list(steps_of(value.get("normalizer"), "normalizers")))
    for table in (step["precompiled_charsmap"] for step in steps if "precompiled_charsmap" in step):
        _guarded(lambda table=table: normalizers.Precompiled(base64.b64decode(table)))


def _guarded(work: Any) -> Any:
    """Returns `work()`; an error of the library, or a panic of its Rust code, becomes an `EngineError`."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # PanicException does not derive from Exception
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineError(f"a tokenizer.json that the library tokenizers cannot read ({shortened(line)})") from None
