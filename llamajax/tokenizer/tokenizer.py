"""Text to token ids and back: `Tokenizer`, the same over every engine."""

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
        form: "sentencepiece" or "tokenizers": the library behind it, and what `model_bytes` are.
        vocab_size: number of ids, those of added tokens included.
        bos_id: the id that begins a sequence, or None.
        eos_id: the id that ends one, or None.
        unk_id: the id of what cannot be encoded, or None.
        add_bos: whether `encode` puts BOS in front, unless told otherwise.
        add_eos: whether it puts EOS at the end.
        stop_ids: ids at which generation ends: those that the checkpoint lists; if it lists none, what the tokenizer
            says of itself: of a sentencepiece model the end, and a new beginning, which is what models trained on a
            stream of documents that only BOS separates (llama2.c) say instead.
        added: the added tokens by id, the tokenizer's own and the checkpoint's.
        model_bytes: what is saved with a checkpoint: a serialized sentencepiece model, or a tokenizer.json.
        words: what the checkpoint says beside it.
    """

    def __init__(self, model_bytes: bytes, source: str = "tokenizer", words: Words | None = None):
        """Reads a tokenizer, of whatever form `llamajax.tokenizer.formats` knows.

        Raises:
            LlamaJaxError: if it is none, or does not go with `words`; the message begins with `source`.
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
        self._shown: dict[int, bytes] = {}  # control tokens that are decoded to more than nothing

    @classmethod
    def from_file(cls, path: str | Path, words: Words | None = None) -> "Tokenizer":
        """Reads a tokenizer's file: `tokenizer.model`, `tokenizer.json` or `tokenizer.bin`, by its content.

        Raises:
            LlamaJaxError: if there is no such file, or it is none.
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
        """Ids of `text`.

        Tokens that are added and not special are read out of the text, each as its one id, as transformers does.
        Special and control tokens are not, unless asked for: `<s>` in a text is spelt.

        Args:
            text: Unicode text.
            bos: whether BOS goes before it; None for what the checkpoint says (of a sentencepiece model: yes, if it
                says nothing).
            eos: whether EOS goes behind it; None for what the checkpoint says, no if it says nothing.
            special: whether special tokens in the text, too, are their ids: for texts whose every part is trusted.

        Raises:
            LlamaJaxError: for text that is not Unicode, or that the library behind it cannot encode.
        """
        ids = self._beginning(bos) + self._encoded(text, lambda: self._engine.encode(text, special))
        if (self.add_eos if eos is None else eos) and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_parts(
        self, parts: Iterable[tuple[str, bool]], *, bos: bool | None = False, control: Collection[str] = ()
    ) -> list[int]:
        """Ids of a text of which some parts are trusted and others are not, as a conversation's.

        Special tokens are their ids where all of one stands in trusted parts, and are spelt elsewhere. Between them,
        what stands beside each other is encoded as one text, whatever parts it comes from: where no part that is not
        trusted spells a special token, the ids are those of `encode` of the whole, with `special`.

        Args:
            parts: texts, each with whether special tokens in it are to be read.
            bos: whether BOS goes before it; None for what the checkpoint says.
            control: texts of added tokens that are no special ones, and that are to be read like them: in trusted
                parts alone.

        Raises:
            LlamaJaxError: as `encode`.
        """
        parts = [(text, special) for text, special in parts if text]
        whole = "".join(text for text, _ in parts)
        return self._beginning(bos) + self._encoded(whole, lambda: encode_parts(self._engine, parts, control))

    def _beginning(self, bos: bool | None) -> list[int]:
        return [self.bos_id] if (self.add_bos if bos is None else bos) and self.bos_id is not None else []

    def _encoded(self, text: str, encode: Callable[[], list[int]]) -> list[int]:
        """What an engine makes of a text, which must be one."""
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
        """The text of `ids`, control and special tokens left out; bytes that are not UTF-8 become U+FFFD."""
        decoder = self.stream()
        return "".join([decoder.add(index) for index in ids]) + decoder.finish()

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one id stands for; none for control and special tokens.

        Raises:
            LlamaJaxError: if `index` is not an id of this tokenizer.
        """
        self._check(index)
        return self._shown.get(index) or self._engine.token_bytes(index)

    def replying(self, stop_ids: Iterable[int], marks: Iterable[str] = ()) -> "Tokenizer":
        """The same tokenizer, for answers of a chat.

        Args:
            stop_ids: ids at which generation ends.
            marks: texts of tokens that are decoded to these texts, whether they are control tokens or not.
        """
        other = copy.copy(self)
        other.stop_ids = tuple(stop_ids)
        known = [(index, mark) for mark in marks if (index := self.id_of(mark)) is not None]
        other._shown = {index: mark.encode() for index, mark in known if not self.token_bytes(index)}
        return other

    def is_spelt(self, index: int) -> bool:
        """Whether an id is a single byte, an added token or the unknown one: its space is never the dummy prefix."""
        return self._engine.is_spelt(index)

    @property
    def drops_first_space(self) -> bool:
        """Whether the space that begins the first token is one that encoding put there."""
        return self._engine.drops_first_space

    def piece(self, index: int) -> str:
        """The name of an id: the piece of the model, or the text of an added token; "" for one without a name.

        Raises:
            LlamaJaxError: if `index` is not an id of this tokenizer.
        """
        self._check(index)
        return self._engine.piece(index)

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, or of an added token, by its name; None if it has none."""
        return self._engine.id_of(piece)

    def _check(self, index: int) -> None:
        if not 0 <= index < self.vocab_size:
            raise LlamaJaxError(
                f"token {index} is outside the tokenizer's vocabulary: expected 0 to {self.vocab_size - 1}"
            )

    def _id_of(self, text: str | None, own: int | None, *otherwise: int | None) -> int | None:
        """The id of a token by its text; else what the tokenizer itself says; else another."""
        by_text = None if text is None else self._engine.id_of(text)
        if by_text is not None:
            return by_text
        return own if own is not None else next(iter(otherwise), None)


class StreamDecoder:
    """Decodes id by id: text comes out as soon as it is certain, and never half a UTF-8 character."""

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
        """What is left at the end: U+FFFD for a character that never became complete."""
        return self._utf8.decode(b"", final=True)
