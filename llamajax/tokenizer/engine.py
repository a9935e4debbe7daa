"""What a `Tokenizer` asks of the library behind it."""

from typing import Protocol

from llamajax.words import AddedToken

# What an id that nothing names decodes to.
UNNAMED = "\ufffd".encode()


class EngineError(Exception):
    """Why bytes are no tokenizer that an engine reads: the end of a sentence, which the caller begins."""


class Engine(Protocol):
    """A library with a vocabulary, and the tokens that a checkpoint adds to it.

    Attributes:
        form: "sentencepiece" or "tokenizers".
        size: number of ids, those of added tokens included; where ids have holes, one more than the largest.
        added: all added tokens by id, those that the file itself lists and those of the checkpoint.
        controls: control pieces that are not among them: read out of a text like special tokens.
        bos_id: what the file alone says to begin with, or None.
        eos_id: what it says to end with, or None.
        unk_id: the id of what cannot be encoded, or None.
        stop_ids: where generation ends, as far as the file alone says.
        add_bos: whether `Tokenizer.encode` begins with BOS unless told otherwise, by the file alone.
        add_eos: whether it ends with EOS.
        drops_first_space: whether the space that begins the first token is one that encoding put there.
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
        """Ids of a text, without BOS and EOS; special tokens in it are text unless `special`."""

    def spell(self, text: str, first: bool) -> list[int]:
        """Ids of a text in which no added token is read, nor a control piece; `first`: where a whole text begins."""

    def piece(self, index: int) -> str:
        """The name of an id from 0 to `size` - 1."""

    def token_bytes(self, index: int) -> bytes:
        """The bytes that it stands for; none for control and special tokens."""

    def id_of(self, piece: str) -> int | None:
        """The id of a piece by its name, or None."""

    def is_spelt(self, index: int) -> bool:
        """Whether an id's space is its own, and never one that encoding put before the text."""
