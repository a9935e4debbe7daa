"""Text to token ids and back: one small interface over sentencepiece, the tokenizer of LLaMA 1 and 2."""

import codecs
import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from llamajax.errors import LlamaJaxError

# A sentencepiece model is a protobuf of its pieces; the largest in use (256,000 pieces) has 4 MiB.
_LARGEST_FILE = 64 << 20


class Tokenizer:
    """A sentencepiece tokenizer.

    Attributes:
        vocab_size: number of ids.
        bos_id: the id that begins a sequence, or None.
        eos_id: the id that ends one, or None.
        stop_ids: ids at which generation ends: the end, and a new beginning, which is what models trained on a stream
            of documents that only BOS separates (llama2.c) say instead.
        model_bytes: the serialized sentencepiece model, for saving it with a checkpoint.
    """

    def __init__(self, model_bytes: bytes, source: str = "tokenizer"):
        """Reads a serialized sentencepiece model.

        Raises:
            LlamaJaxError: if it is not one; the message begins with `source`.
        """
        self.model_bytes = model_bytes
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model_bytes) and self._processor.LoadFromSerializedProto(model_bytes)
            self._token_bytes = [self._bytes_of(index) for index in range(self._processor.vocab_size())]
        except (RuntimeError, OSError, ValueError):  # ValueError: pieces that are not UTF-8, bytes that are none
            loaded = False
        if not loaded or not self._token_bytes:
            raise LlamaJaxError(f"{source}: not a sentencepiece model: expected a tokenizer.model")
        optional = lambda index: index if index >= 0 else None  # noqa: E731
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int | None = optional(self._processor.bos_id())
        self.eos_id: int | None = optional(self._processor.eos_id())
        self.stop_ids: tuple[int, ...] = tuple(i for i in (self.bos_id, self.eos_id) if i is not None)
        # Only with a dummy prefix is the space that the first piece begins with not part of the text.
        self._drops_first_space = self._processor.decode(self._processor.encode("a")) == "a" and (
            self._processor.id_to_piece(self._processor.encode("a")[0]).startswith("▁")
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.model` file.

        Raises:
            LlamaJaxError: if there is no such file, or it is not a sentencepiece model.
        """
        path = Path(path)
        if not path.is_file():
            raise LlamaJaxError(f"{path}: no such file: expected a sentencepiece tokenizer.model")
        if path.stat().st_size > _LARGEST_FILE:
            raise LlamaJaxError(
                f"{path}: {path.stat().st_size} bytes: expected a sentencepiece model of at most 64 MiB"
            )
        return cls(path.read_bytes(), str(path))

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of `text`, after BOS unless told otherwise. Control tokens are never read out of the text itself."""
        prefix = [self.bos_id] if bos and self.bos_id is not None else []
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise LlamaJaxError(f"the text is not Unicode at character {error.start}: expected UTF-8") from None
        return prefix + self._processor.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, control tokens left out; bytes that are not UTF-8 become U+FFFD."""
        decoder = self.stream()
        return "".join([decoder.add(index) for index in ids]) + decoder.finish()

    def stream(self) -> "StreamDecoder":
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one id stands for; none for control tokens.

        Raises:
            LlamaJaxError: if `index` is not an id of this tokenizer.
        """
        if not 0 <= index < self.vocab_size:
            raise LlamaJaxError(
                f"token {index} is outside the tokenizer's vocabulary: expected 0 to {self.vocab_size - 1}"
            )
        return self._token_bytes[index]

    def is_spelt(self, index: int) -> bool:
        """Whether an id is a single byte or the unknown one: their spaces are never the dummy prefix."""
        return self._processor.is_byte(index) or self._processor.is_unknown(index)

    def _bytes_of(self, index: int) -> bytes:
        if self._processor.is_control(index):
            return b""
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_unknown(index):
            return self._processor.decode([index]).encode()
        return piece.replace("▁", " ").encode()


class StreamDecoder:
    """Decodes id by id: text comes out as soon as it is certain, and never half a UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer):
        """See `Tokenizer.stream`."""
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = tokenizer._drops_first_space

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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A LLaMA-style sentencepiece tokenizer learnt from `texts`: byte-pair encoding with byte fallback.

    Settings follow LLaMA's own model: identity normalization, digits split, whitespace kept, ids 0 <unk>, 1 <s>,
    2 </s>, 3–258 the bytes.

    Raises:
        LlamaJaxError: if the texts do not yield `vocab_size` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise LlamaJaxError(
            f"vocab_size is {vocab_size}: the text does not support it: expected at least 259 plus its letters, and "
            f"no more pieces than it has ({str(error).splitlines()[-1][:200]})"
        ) from None
    return Tokenizer(model.getvalue())
