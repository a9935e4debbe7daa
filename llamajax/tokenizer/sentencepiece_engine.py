"""The engine for sentencepiece models: byte-pair encoding or unigram, with the normalizer in the model."""

from typing import Any

from llamajax.files import shortened
from llamajax.tokenizer.added import AddedPatterns
from llamajax.tokenizer.engine import UNNAMED, EngineError
from llamajax.words import AddedToken, Words

# Appended to a serialized ModelProto: normalizer_spec (field 3) { add_dummy_prefix (field 3): false }. If a field
# occurs twice, protobuf takes the values of the later one.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceEngine:
    """See `engine.Engine`. `Words` say which tokens are added, and where a space is put before text."""

    form = "sentencepiece"
    add_bos, add_eos = True, False

    def __init__(self, data: bytes, words: Words):
        """Reads a serialized ModelProto.

        Raises:
            EngineError: if it is not a ModelProto, or contradicts the added tokens.
        """
        try:
            self._processor = _processor(data)
            self._pieces: list[str] = self._processor.id_to_piece(list(range(self._processor.vocab_size())))
            self._token_bytes = self._all_bytes()
        except (RuntimeError, OSError, ValueError):  # ValueError: pieces that are not UTF-8, bytes that are none
            self._token_bytes = []
        if not self._token_bytes:
            raise EngineError("not a sentencepiece model: expected a tokenizer.model")
        self._add_tokens(words)
        self.size = len(self._token_bytes)
        self.bos_id, self.eos_id, self.unk_id = (
            index if index >= 0 else None
            for index in (self._processor.bos_id(), self._processor.eos_id(), self._processor.unk_id())
        )
        self.stop_ids = tuple(index for index in (self.bos_id, self.eos_id) if index is not None)
        # The space at the start of the first piece is not part of the text only if the model adds a dummy prefix.
        first = self._processor.encode("a")
        adds_space = self._processor.decode(first) == "a" and self._pieces[first[0]].startswith("▁")
        self._space = (words.space or "first") if adds_space else "never"
        self.drops_first_space = self._space != "never"
        # The same model without a dummy prefix, for text that gets none, mostly text after an added token.
        self._bare = _processor(data + _NO_DUMMY_PREFIX) if adds_space else self._processor

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Engine.encode`."""
        ids: list[int] = []
        for at, part in self._patterns[special].parts(text):
            ids += [part] if isinstance(part, int) else self.spell(part, at == 0)
        return ids

    def spell(self, text: str, first: bool) -> list[int]:
        """See `Engine.spell`."""
        spaced = self._space == "always" or (self._space == "first" and first)
        return (self._processor if spaced else self._bare).encode(text)

    def piece(self, index: int) -> str:
        """The name of an id: the piece of the sentencepiece model, or the text of an added token."""
        added = self._added.get(index)
        if added is not None:
            return added.text
        return self._pieces[index] if index < len(self._pieces) else ""

    def token_bytes(self, index: int) -> bytes:
        """See `Engine.token_bytes`."""
        return self._token_bytes[index]

    def id_of(self, piece: str) -> int | None:
        """See `Engine.id_of`."""
        for token in self.added:
            if token.text == piece:
                return token.id
        index = self._processor.piece_to_id(piece)
        return index if self._pieces[index] == piece else None

    def is_spelt(self, index: int) -> bool:
        """Whether an id is a byte, an added or the unknown token: a space it begins with is never the dummy prefix."""
        if index in self._added or index >= len(self._pieces):
            return True
        return self._processor.is_byte(index) or self._processor.is_unknown(index)

    def _all_bytes(self) -> list[bytes]:
        """The bytes that each piece stands for."""
        ids = list(range(len(self._pieces)))
        made = [piece.replace("▁", " ").encode() for piece in self._pieces]
        for index, (control, byte, unknown) in enumerate(
            zip(
                self._processor.is_control(ids),
                self._processor.is_byte(ids),
                self._processor.is_unknown(ids),
                strict=True,
            )
        ):
            if control:
                made[index] = b""
            elif byte:
                made[index] = bytes([int(self._pieces[index][3:5], 16)])
            elif unknown:
                made[index] = self._processor.decode([index]).encode()
        return made

    def _add_tokens(self, words: Words) -> None:
        """Adds the added tokens: their bytes, and the patterns that find them in a text."""
        self.added = words.added
        self._added = {token.id: token for token in words.added}
        for index, token in self._added.items():
            if index < len(self._pieces) and self._pieces[index] not in (token.text, token.text.replace(" ", "▁")):
                raise EngineError(
                    f"id {index} is {shortened(self._pieces[index])} in the sentencepiece model, but "
                    f"{shortened(token.text)} among the added tokens: expected the tokenizer that the model was "
                    "trained with"
                )
            # Ids without a token, between those with one, decode like the embedding's ids beyond the tokenizer.
            self._token_bytes += [UNNAMED] * (index + 1 - len(self._token_bytes))
            if token.special or index >= len(self._pieces):
                self._token_bytes[index] = b"" if token.special else token.text.encode()
        texts = {token.text for token in words.added}
        ids = list(range(len(self._pieces)))
        kinds = zip(ids, self._processor.is_control(ids), self._processor.is_unknown(ids), strict=True)
        self.controls = tuple(
            AddedToken(id=index, text=self._pieces[index], special=True)
            for index, is_control, is_unknown in kinds
            if (is_control or is_unknown) and index not in self._added and self._pieces[index] not in ("", *texts)
        )
        self._patterns = {
            False: AddedPatterns(token for token in words.added if not token.special),
            True: AddedPatterns([*words.added, *self.controls]),
        }


def _processor(model_bytes: bytes) -> Any:
    """Sentencepiece's processor. Raises RuntimeError, OSError or ValueError for bytes that are not a model."""
    import sentencepiece  # imported here, because a machine for measuring may lack it (benchmarks/device.py)

    processor = sentencepiece.SentencePieceProcessor()
    if not model_bytes or not processor.LoadFromSerializedProto(model_bytes):
        raise ValueError("no sentencepiece model")
    return processor
