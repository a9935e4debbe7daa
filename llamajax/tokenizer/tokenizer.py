"""`Tokenizer` converts text to token ids and back; it is the same for every engine."""

import codecs
import copy
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from llamajax.errors import LlamaJaxError
from llamajax.files import read_bytes
from llamajax.tokenizer.engine import Engine, EngineError
from llamajax.tokenizer.formats import LARGEST_TOKENIZER, at_rest, is_json
from llamajax.tokenizer.in_parts import encode_parts
from llamajax.tokenizer.sentencepiece_engine import SentencePieceEngine
from llamajax.tokenizer.tokenizers_engine import TokenizersEngine
from llamajax.words import AddedToken, Words


class Tokenizer:
    """A tokenizer, and the tokens that a checkpoint adds to it.

    Attributes:
        form: "sentencepiece" or "tokenizers": the library that encodes, and the form of `model_bytes`.
        vocab_size: the number of ids, added tokens included.
        bos_id: the id that begins a sequence, or None.
        eos_id: the id that ends a sequence, or None.
        unk_id: the id for text that cannot be encoded, or None.
        add_bos: whether `encode` puts BOS first by default.
        add_eos: whether `encode` puts EOS last by default.
        stop_ids: the ids at which generation ends: those that the checkpoint lists; if it lists none, those that the
            tokenizer's file names. For a sentencepiece model these are EOS and BOS, because models that were trained on
            documents separated by BOS alone (llama2.c) end a text with BOS.
        added: the added tokens by id, the tokenizer's own and the checkpoint's.
        model_bytes: the bytes that are saved with a checkpoint: a serialized sentencepiece model, or a tokenizer.json.
        words: the checkpoint's own settings of the tokenizer.
    """

    def __init__(self, model_bytes: bytes, source: str = "tokenizer", words: Words | None = None):
        """Reads a tokenizer in any form that `llamajax.tokenizer.formats` knows.

        Raises:
            LlamaJaxError: if the bytes are not a tokenizer, or contradict `words`; the message begins with `source`.
        """
        self.words = words or Words()
        try:
            self.model_bytes = at_rest(model_bytes, self.words)
            engine = TokenizersEngine if is_json(self.model_bytes) else SentencePieceEngine
            self._engine: Engine = engine(self.model_bytes, self.words)
        except EngineError as error:
            raise LlamaJaxError(f"{source}: {error}") from None
        own = self._engine
        self.form: str = own.form
        self.vocab_size: int = own.size
        self.unk_id: int | None = own.unk_id
        stops = self.words.stop_ids
        self.bos_id: int | None = self._id_of(self.words.bos_token, own.bos_id, self.words.bos_id)
        self.eos_id: int | None = self._id_of(self.words.eos_token, own.eos_id, *(stops or ())[:1])
        add_bos, add_eos = self.words.add_bos, self.words.add_eos
        self.add_bos: bool = self.bos_id is not None and (own.add_bos if add_bos is None else add_bos)
        self.add_eos: bool = self.eos_id is not None and (own.add_eos if add_eos is None else add_eos)
        mine = tuple(i for i in (self.bos_id, self.eos_id) if i is not None) if self.form == "sentencepiece" else ()
        self.stop_ids: tuple[int, ...] = (mine or own.stop_ids) if stops is None else stops
        self._shown: dict[int, bytes] = {}  # the bytes of control tokens that are decoded as text (`replying`)

    @classmethod
    def from_file(cls, path: str | Path, words: Words | None = None) -> "Tokenizer":
        """Reads a `tokenizer.model`, `tokenizer.json` or `tokenizer.bin`; the content decides which of them it is.

        Raises:
            LlamaJaxError: if the file does not exist, or is not a tokenizer.
        """
        path = Path(path)
        if not os.path.lexists(path):
            raise LlamaJaxError(f"{path}: no such file: expected a tokenizer.model or tokenizer.json")
        if path.stat().st_size > LARGEST_TOKENIZER:
            raise LlamaJaxError(f"{path}: {path.stat().st_size} bytes: expected a tokenizer of at most 64 MiB")
        return cls(read_bytes(path, LARGEST_TOKENIZER), str(path), words)

    @property
    def added(self) -> tuple[AddedToken, ...]:
        """The added tokens by id."""
        return self._engine.added

    @property
    def controls(self) -> tuple[AddedToken, ...]:
        """Control pieces of the vocabulary that are not among the added tokens."""
        return self._engine.controls

    def encode(
        self, text: str, *, bos: bool | None = None, eos: bool | None = None, special: bool = False
    ) -> list[int]:
        """Returns the ids of `text`.

        An added token in the text that is not special becomes its one id, as in transformers. Special and control
        tokens do not, unless `special` is true: `<s>` in a text is spelt in ordinary pieces.

        Args:
            text: Unicode text.
            bos: whether to put BOS before the ids; None for `add_bos`, the checkpoint's choice (by default yes for a
                sentencepiece model).
            eos: whether to put EOS after the ids; None for `add_eos`, the checkpoint's choice (by default no for a
                sentencepiece model).
            special: whether special tokens in the text become their ids, too; only for texts that are fully trusted.

        Raises:
            LlamaJaxError: for text that is not Unicode, or that the tokenizer's library cannot encode.
        """
        ids = self._beginning(bos) + self._encoded(text, lambda: self._engine.encode(text, special))
        if (self.add_eos if eos is None else eos) and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_parts(
        self, parts: Iterable[tuple[str, bool]], *, bos: bool | None = False, control: Collection[str] = ()
    ) -> list[int]:
        """Returns the ids of a text of which some parts are trusted and others are not, such as a conversation.

        A special token becomes its id only if all of it stands in trusted parts; elsewhere it is spelt in ordinary
        pieces. The text between special tokens is encoded as one text, even if it comes from several parts: if no
        untrusted part spells a special token, the ids equal those of `encode(whole, special=True)`.

        Args:
            parts: texts, each with a flag whether special tokens in it are read.
            bos: whether to put BOS before the ids; None for the checkpoint's choice.
            control: texts of added tokens that are not special, but are treated like special ones: they are read in
                trusted parts alone.

        Raises:
            LlamaJaxError: see `encode`.
        """
        parts = [(text, special) for text, special in parts if text]
        whole = "".join(text for text, _ in parts)
        return self._beginning(bos) + self._encoded(whole, lambda: encode_parts(self._engine, parts, control))

    @property
    def first_id(self) -> int | None:
        """The id that `encode` puts first by default: `bos_id`, or None without `add_bos`."""
        return self.bos_id if self.add_bos else None

    def _beginning(self, bos: bool | None) -> list[int]:
        return [self.bos_id] if (self.add_bos if bos is None else bos) and self.bos_id is not None else []

    def _encoded(self, text: str, encode: Callable[[], list[int]]) -> list[int]:
        """Calls `encode` for a text that must be valid Unicode."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise LlamaJaxError(f"the text is not Unicode at character {error.start}: expected UTF-8") from None
        try:
            return encode()
        except EngineError as error:
            raise LlamaJaxError(f"the text cannot be encoded: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` without control and special tokens; bytes that are not UTF-8 become U+FFFD."""
        decoder = self.stream()
        return "".join([decoder.add(index) for index in ids]) + decoder.finish()

    def stream(self) -> "StreamDecoder":
        """Returns a decoder that takes one id at a time."""
        return StreamDecoder(self)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that an id stands for; b"" for control and special tokens.

        Raises:
            LlamaJaxError: if `index` is not an id of this tokenizer.
        """
        self._check(index)
        return self._shown.get(index) or self._engine.token_bytes(index)

    def replying(self, stop_ids: Iterable[int], marks: Iterable[str] = ()) -> "Tokenizer":
        """Returns a copy of the tokenizer for the answers of a chat.

        Args:
            stop_ids: the ids at which generation ends.
            marks: texts of tokens that are decoded to these texts, even if they are control tokens.
        """
        other = copy.copy(self)
        other.stop_ids = tuple(stop_ids)
        known = [(index, mark) for mark in marks if (index := self.id_of(mark)) is not None]
        other._shown = {index: mark.encode() for index, mark in known if not self.token_bytes(index)}
        return other

    def is_spelt(self, index: int) -> bool:
        """Whether a space at the start of an id's bytes is always its own, never one that encoding added."""
        return self._engine.is_spelt(index)

    @property
    def drops_first_space(self) -> bool:
        """Whether decoding drops the space at the start of the first token, because encoding added it."""
        return self._engine.drops_first_space

    def piece(self, index: int) -> str:
        """The name of an id: the piece of the model, or the text of an added token; "" for an id without a name.

        Raises:
            LlamaJaxError: if `index` is not an id of this tokenizer.
        """
        self._check(index)
        return self._engine.piece(index)

    def id_of(self, piece: str) -> int | None:
        """The id of a piece or an added token by its name; None if there is no such name."""
        return self._engine.id_of(piece)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.vocab_size:
            raise LlamaJaxError(
                f"token {index} is outside the tokenizer's vocabulary: expected 0 to {self.vocab_size - 1}"
            )

    def _id_of(self, text: str | None, own: int | None, *otherwise: int | None) -> int | None:
        """The id of a token by its text; else `own`, the tokenizer's choice; else the first of `otherwise`."""
        by_text = None if text is None else self._engine.id_of(text)
        if by_text is not None:
            return by_text
        return own if own is not None else next(iter(otherwise), None)


class StreamDecoder:
    """Decodes id by id; returns text as soon as it is final, and never a part of a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer):
        """See `Tokenizer.stream`."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer.drops_first_space

    def add(self, index: int) -> str:
        """The text that this id completes; empty while a character is still incomplete."""
        data = self._tokenizer.token_bytes(index)
        if data and self._at_start:
            if not self._tokenizer.is_spelt(index):
                data = data.removeprefix(b" ")
            self._at_start = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """The rest of the text at the end: U+FFFD for a character that is still incomplete, else ""."""
        return self._utf8.decode(b"", final=True)
