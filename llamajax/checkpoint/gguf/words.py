"""Reads a GGUF file's settings for text: tokenizer, stop ids, chat templates, default sampling parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from llamajax.errors import LlamaJaxError
from llamajax.tokenizer.gguf import from_metadata
from llamajax.words import Words


class Said(NamedTuple):
    """The settings for text that were found.

    Attributes:
        tokenizer_bytes: the serialized tokenizer, or None.
        words: all other settings.
        problem: why the file's tokenizer cannot be used, or None.
        consumed: metadata keys that were read.
    """

    tokenizer_bytes: bytes | None
    words: Words
    problem: str | None
    consumed: frozenset[str]


def words_of(path: Any, metadata: Mapping[str, Any], vocab_size: int, sampling: Mapping[str, float]) -> Said:
    """Reads the settings for text. A vocabulary that cannot be used is reported in `problem`; it is no error here."""
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
