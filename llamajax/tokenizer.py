"""Text to token ids and back: one small interface over sentencepiece, the tokenizer of LLaMA 1 and 2."""

import codecs
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llamajax.errors import LlamaJaxError
from llamajax.files import read_bytes, shortened
from llamajax.words import AddedToken, Words

# A sentencepiece model is a protobuf of its pieces; the largest in use (256,000 pieces) has 4 MiB.
LARGEST_TOKENIZER = 64 << 20


class Tokenizer:
    """A sentencepiece tokenizer, and the tokens that a checkpoint adds to it.

    Attributes:
        vocab_size: number of ids, those of added tokens included.
        bos_id: the id that begins a sequence, or None.
        eos_id: the id that ends one, or None.
        unk_id: the id of what cannot be encoded, or None.
        add_bos: whether `encode` puts BOS in front, unless told otherwise.
        add_eos: whether it puts EOS at the end.
        stop_ids: ids at which generation ends: those that the checkpoint lists; if it lists none, the end, and a new
            beginning, which is what models trained on a stream of documents that only BOS separates (llama2.c) say
            instead.
        model_bytes: the serialized sentencepiece model, for saving it with a checkpoint.
        words: what the checkpoint says beside it.
    """

    def __init__(self, model_bytes: bytes, source: str = "tokenizer", words: Words | None = None):
        """Reads a serialized sentencepiece model.

        Raises:
            LlamaJaxError: if it is not one, or does not go with `words`; the message begins with `source`.
        """
        self.model_bytes, self.words = model_bytes, words or Words()
        try:
            self._processor = _processor(model_bytes)
            self._token_bytes = [self._bytes_of(index) for index in range(self._processor.vocab_size())]
        except (RuntimeError, OSError, ValueError):  # ValueError: pieces that are not UTF-8, bytes that are none
            self._token_bytes = []
        if not self._token_bytes:
            raise LlamaJaxError(f"{source}: {_kind(model_bytes)}: expected a tokenizer.model")
        self._pieces = len(self._token_bytes)
        self._add_tokens(source)
        self.vocab_size: int = len(self._token_bytes)
        self.bos_id: int | None = self._id_of(self.words.bos_token, self._processor.bos_id(), self.words.bos_id)
        stops = self.words.stop_ids or ()
        self.eos_id: int | None = self._id_of(self.words.eos_token, self._processor.eos_id(), *stops[:1])
        self.add_bos: bool = self.bos_id is not None and self.words.add_bos is not False
        self.add_eos: bool = self.eos_id is not None and self.words.add_eos is True
        self.unk_id: int | None = self._id_of(None, self._processor.unk_id())
        own = tuple(i for i in (self.bos_id, self.eos_id) if i is not None)
        self.stop_ids: tuple[int, ...] = own if self.words.stop_ids is None else self.words.stop_ids
        # Only with a dummy prefix is the space that the first piece begins with not part of the text.
        self._adds_space = self._processor.decode(self._processor.encode("a")) == "a" and (
            self._processor.id_to_piece(self._processor.encode("a")[0]).startswith("▁")
        )
        self._space = (self.words.space or "first") if self._adds_space else "never"
        # The same model without a dummy prefix, for text that gets none: behind an added token, above all.
        bare = self._adds_space and (self._space == "never" or (self._space == "first" and self._added))
        self._bare = _processor(model_bytes + _NO_DUMMY_PREFIX) if bare else self._processor

    @classmethod
    def from_file(cls, path: str | Path, words: Words | None = None) -> "Tokenizer":
        """Reads a `tokenizer.model` file.

        Raises:
            LlamaJaxError: if there is no such file, or it is not a sentencepiece model.
        """
        path = Path(path)
        if not os.path.lexists(path):
            raise LlamaJaxError(f"{path}: no such file: expected a sentencepiece tokenizer.model")
        if path.stat().st_size > LARGEST_TOKENIZER:
            raise LlamaJaxError(
                f"{path}: {path.stat().st_size} bytes: expected a sentencepiece model of at most 64 MiB"
            )
        return cls(read_bytes(path, LARGEST_TOKENIZER), str(path), words)

    def encode(self, text: str, *, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """Ids of `text`.

        Tokens that the checkpoint lists as added are read out of the text, each as its one id, as transformers does.
        Control tokens that it does not list never are: `<s>` is spelt.

        Args:
            text: Unicode text.
            bos: whether BOS goes before it; None for what the checkpoint says, yes if it says nothing.
            eos: whether EOS goes behind it; None for what the checkpoint says, no if it says nothing.
        """
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise LlamaJaxError(f"the text is not Unicode at character {error.start}: expected UTF-8") from None
        ids = [self.bos_id] if (self.add_bos if bos is None else bos) and self.bos_id is not None else []
        for at, part in self._parts(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                spaced = self._space == "always" or (self._space == "first" and at == 0)
                ids += (self._processor if spaced else self._bare).encode(part)
        if (self.add_eos if eos is None else eos) and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

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
        if not 0 <= index < self.vocab_size:
            raise LlamaJaxError(
                f"token {index} is outside the tokenizer's vocabulary: expected 0 to {self.vocab_size - 1}"
            )
        return self._token_bytes[index]

    def is_spelt(self, index: int) -> bool:
        """Whether an id is a single byte, an added token or the unknown one: its space is never the dummy prefix."""
        if index in self._added or index >= self._pieces:
            return True
        return self._processor.is_byte(index) or self._processor.is_unknown(index)

    @property
    def drops_first_space(self) -> bool:
        """Whether the space that begins the first token is one that encoding put there."""
        return self._space != "never"

    def piece(self, index: int) -> str:
        """The name of an id: the piece of the sentencepiece model, or the text of an added token."""
        added = self._added.get(index)
        return self._processor.id_to_piece(index) if added is None else added.text

    def _bytes_of(self, index: int) -> bytes:
        if self._processor.is_control(index):
            return b""
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_unknown(index):
            return self._processor.decode([index]).encode()
        return piece.replace("▁", " ").encode()

    def _add_tokens(self, source: str) -> None:
        """Takes in the added tokens: their bytes, and the patterns that find them in a text."""
        self._added = {token.id: token for token in self.words.added}
        for index, token in self._added.items():
            if index < self._pieces and self._processor.id_to_piece(index) != token.text:
                raise LlamaJaxError(
                    f"{source}: id {index} is {shortened(self._processor.id_to_piece(index))} in the sentencepiece "
                    f"model, {shortened(token.text)} among the added tokens: expected the tokenizer that the model was "
                    "trained with"
                )
            # Ids that nothing names, between those that have a token, decode like the embeddings beyond the tokenizer.
            self._token_bytes += ["\ufffd".encode()] * (index + 1 - len(self._token_bytes))
            if token.special or index >= self._pieces:
                self._token_bytes[index] = b"" if token.special else token.text.encode()
        self._patterns = []
        for normalized in (False, True):
            tokens = {token.text: token for token in self.words.added if token.normalized is normalized}
            if tokens:
                # The longest of those that begin at one place.
                longest_first = sorted(tokens, key=len, reverse=True)
                self._patterns.append((re.compile("|".join(map(re.escape, longest_first))), tokens))

    def _parts(self, text: str) -> Iterator[tuple[int, str | int]]:
        """The text in parts with the place of each: ids of added tokens, and the text between them."""
        parts: list[tuple[int, str | int]] = [(0, text)]
        for pattern, tokens in self._patterns:
            parts = [
                found
                for at, part in parts
                for found in ([(at, part)] if isinstance(part, int) else _split(at, part, pattern, tokens))
            ]
        return ((at, part) for at, part in parts if part != "")

    def _id_of(self, text: str | None, own: int, *otherwise: int | None) -> int | None:
        """The id of a token by its text; else the sentencepiece model's, which is negative for none; else another."""
        if text is not None:
            by_text = {token.text: token.id for token in self.words.added}
            if text in by_text:
                return by_text[text]
            index = self._processor.piece_to_id(text)
            if self._processor.id_to_piece(index) == text:
                return index
        return own if own >= 0 else next(iter(otherwise), None)


def _split(
    at: int, text: str, pattern: re.Pattern[str], tokens: Mapping[str, AddedToken]
) -> Iterator[tuple[int, str | int]]:
    """Text around added tokens, by the rules of Hugging Face's tokenizers (`find_matches` in added_vocabulary.rs)."""
    done = 0
    for match in pattern.finditer(text):
        token, start, end = tokens[match.group()], match.start(), match.end()
        if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])):
            continue
        start = max(start, done)
        while token.lstrip and start > done and text[start - 1].isspace():
            start -= 1
        while token.rstrip and end < len(text) and text[end].isspace():
            end += 1
        if done < start:
            yield at + done, text[done:start]
        yield at + start, token.id
        done = end
    if done < len(text):
        yield at + done, text[done:]


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


# Behind a serialized ModelProto: normalizer_spec (field 3) { add_dummy_prefix (field 3): false }. Where a field comes
# twice, protobuf takes the later one's values.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def _processor(model_bytes: bytes) -> Any:
    """Sentencepiece's. Raises RuntimeError, OSError or ValueError for bytes that are no model."""
    import sentencepiece  # here, because a machine for measuring may be without (benchmarks/device.py)

    processor = sentencepiece.SentencePieceProcessor()
    if not model_bytes or not processor.LoadFromSerializedProto(model_bytes):
        raise ValueError("no sentencepiece model")
    return processor


def _kind(data: bytes) -> str:
    """What bytes that are no sentencepiece model seem to be."""
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
        return "a tiktoken vocabulary, as of Llama 3, which is not read"
    if data.lstrip()[:1] == b"{":
        return "JSON, not a sentencepiece model"
    return "not a sentencepiece model"


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


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A LLaMA-style sentencepiece tokenizer learnt from `texts`: byte-pair encoding with byte fallback.

    Settings follow LLaMA's own model: identity normalization, digits split, whitespace kept, ids 0 <unk>, 1 <s>,
    2 </s>, 3–258 the bytes.

    Raises:
        LlamaJaxError: if the texts do not yield `vocab_size` pieces.
    """
    import sentencepiece  # as above

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
