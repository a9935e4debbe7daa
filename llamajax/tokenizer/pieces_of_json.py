"""Lists the pieces of a tokenizer.json by id, with the types and scores that other formats need."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from llamajax.errors import LlamaJaxError
from llamajax.files import shortened
from llamajax.tokenizer.model_proto import BYTE, BYTE_PIECE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llamajax.tokenizer.tokenizer import Tokenizer

_PAD = re.compile(r"\[PAD(\d+)\]")
# The score of pieces that no merge makes, below all others.
_UNMERGED = -1e6


@dataclasses.dataclass
class Pieces:
    """Pieces by id.

    Attributes:
        tokens: the text of each piece.
        types: the sentencepiece type of each piece (`model_proto`).
        merges: pairs of pieces in the order in which they are merged.
    """

    tokens: list[str]
    types: list[int]
    merges: list[tuple[str, str]]

    def scores(self) -> list[float]:
        """Scores with which sentencepiece merges in the order of `merges`: the sooner, the higher.

        Raises:
            LlamaJaxError: if there are no such scores, because merges into the same piece do not follow each other.
        """
        order: dict[str, int] = {}
        last = ""
        for left, right in self.merges:
            piece = left + right
            if piece != last and piece in order:
                raise LlamaJaxError(
                    f"the tokenizer.json gives the merges into {shortened(piece)} different ranks, which the scores of "
                    "pieces cannot express"
                )
            order.setdefault(piece, len(order))
            last = piece
        return [
            0.0
            if kind in (CONTROL, UNKNOWN, BYTE, USER_DEFINED)
            else -float(order[token])
            if token in order
            else _UNMERGED
            for token, kind in zip(self.tokens, self.types, strict=True)
        ]


def pieces_of_json(tokenizer: Tokenizer, model: Mapping[str, Any]) -> Pieces:
    """Returns the pieces of a tokenizer whose form is "tokenizers".

    Args:
        tokenizer: the tokenizer.
        model: the parsed "model" of its file, which must be byte-pair encoding.
    """
    fallback = bool(model.get("byte_fallback"))
    tokens, types = [], []
    added = {token.id: token for token in tokenizer.added}
    for index in range(tokenizer.vocab_size):
        text = tokenizer.piece(index)
        token = added.get(index)
        if index == tokenizer.unk_id:
            kind = UNKNOWN
        elif token is not None:
            kind = CONTROL if token.special else USER_DEFINED
        elif text == "" or ((pad := _PAD.fullmatch(text)) and int(pad[1]) == index):
            text, kind = f"[PAD{index}]", UNUSED
        else:
            kind = BYTE if fallback and BYTE_PIECE.fullmatch(text) else NORMAL
        tokens.append(text)
        types.append(kind)
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    return Pieces(tokens, types, merges)  # type: ignore[arg-type]
