"""What the metadata of a GGUF file say of words: its tokenizer, ends, templates, defaults of sampling."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from llamajax.errors import LlamaJaxError
from llamajax.tokenizer.gguf import from_metadata
from llamajax.words import Words


class Said(NamedTuple):
    """What was found.

    Attributes:
        tokenizer_bytes: of the tokenizer at rest, or None.
        words: all beside it.
        problem: why a tokenizer that is there cannot be used, or None.
        consumed: keys that were read.
    """

    tokenizer_bytes: bytes | None
    words: Words
    problem: str | None
    consumed: frozenset[str]


def words_of(path: Any, metadata: Mapping[str, Any], vocab_size: int, sampling: Mapping[str, float]) -> Said:
    """Reads them; a vocabulary that cannot be used is a problem of whoever needs it, not of the weights."""
    words = Words(sampling=dict(sampling))
    try:
        data, found, consumed = from_metadata(metadata)
        tokens = len(metadata["tokenizer.ggml.tokens"]) if data is not None else vocab_size
        if tokens != vocab_size:
            raise LlamaJaxError(f"{tokens} tokens, but the embedding has {vocab_size} rows: expected one for each")
    except LlamaJaxError as error:
        keys = frozenset(key for key in metadata if key.startswith("tokenizer."))
        return Said(None, words, f"{path}: its vocabulary cannot be used: {error}", keys)
    return Said(data, dataclasses.replace(found, sampling=words.sampling), None, consumed)
