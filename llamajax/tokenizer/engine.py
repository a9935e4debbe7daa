"""The interface that a `Tokenizer` expects of the library behind it."""

from typing import Protocol

from llamajax.words import AddedToken

# The bytes to which an id without a token decodes.
UNNAMED = "\ufffd".encode()


class EngineError(Exception):
    """The reason why an engine cannot read a tokenizer; the text completes a sentence that the caller begins."""


class Engine(Protocol):
    """A library with a vocabulary, and the tokens that a checkpoint adds to it.

    Attributes:
        form: "sentencepiece" or "tokenizers".
        size: the number of ids, added tokens included; if some ids are unused, the largest id plus one.
        added: all added tokens in the order of their ids, those in the file itself and those of the checkpoint.
        controls: control pieces that are not among the added tokens; they are read out of a text like special tokens.
        bos_id: the BOS id according to the file alone, or None.
        eos_id: the EOS id according to the file alone, or None.
        unk_id: the id for text that cannot be encoded, or None.
        stop_ids: the ids at which generation ends, according to the file alone.
        add_bos: whether `Tokenizer.encode` puts BOS first by default, according to the file alone.
        add_eos: whether it puts EOS last by default.
        drops_first_space: whether decoding drops the space at the start of the first token, because encoding added it.
    """

    form: str
    size: int
    added: tuple[AddedToken, ...]
    controls: tuple[AddedToken, ...]
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    stop_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    drops_first_space: bool

    def encode(self, text: str, special: bool) -> list[int]:
        """Encodes a text without BOS and EOS; special tokens in it are read as text unless `special`."""

    def spell(self, text: str, first: bool) -> list[int]:
        """Encodes a text and reads no added tokens or control pieces in it; `first`: it begins the whole text."""

    def piece(self, index: int) -> str:
        """The name of an id from 0 to `size` - 1."""

    def token_bytes(self, index: int) -> bytes:
        """The bytes that an id stands for; b"" for control and special tokens."""

    def id_of(self, piece: str) -> int | None:
        """The id of a piece by its name, or None."""

    def is_spelt(self, index: int) -> bool:
        """Whether a space at the start of an id's bytes is always its own, never one that encoding added."""
