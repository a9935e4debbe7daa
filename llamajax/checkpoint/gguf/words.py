"""What the metadata of a GGUF file say of words: its tokenizer, ends, templates, defaults of sampling."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from llamajax.errors import LlamaJaxError
from llamajax.files import shortened
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
    keys = frozenset(key for key in metadata if key.startswith("tokenizer."))
    words = Words(sampling=dict(sampling))
    if "tokenizer.ggml.model" not in metadata:
        return Said(None, words, None, keys if not keys else frozenset())
    if metadata["tokenizer.ggml.model"] in ("none", "no_vocab"):
        return Said(None, words, None, keys)
    try:
        from llamajax.tokenizer.gguf import from_metadata
    except ImportError:
        return Said(None, words, f"{path}: its vocabulary is not read", keys)
    try:
        data, words, consumed = from_metadata(metadata)
        unknown = sorted(keys - set(consumed))
        if unknown:
            raise LlamaJaxError(
                f"unknown key {shortened(unknown[0])}: if it changes no words, give "
                f"--ignore_key={shortened(unknown[0])[1:-1]} (ignore_keys in the library)"
            )
        tokens = len(metadata["tokenizer.ggml.tokens"])
        if tokens != vocab_size:
            raise LlamaJaxError(f"{tokens} tokens, but the embedding has {vocab_size} rows: expected one for each")
    except LlamaJaxError as error:
        return Said(None, Words(sampling=dict(sampling)), f"{path}: its vocabulary cannot be used: {error}", keys)
    return Said(data, dataclasses.replace(words, sampling={**words.sampling, **sampling}), None, frozenset(consumed))
