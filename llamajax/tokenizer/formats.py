"""The forms that tokenizers come in, recognised by content, and the two that they are kept in.

At rest a tokenizer is a serialized sentencepiece ModelProto (tokenizer.model) or a tokenizer.json. Two other forms are
converted into one of them: Llama 3's tokenizer.model, which holds ranks for tiktoken, and llama2.c's tokenizer.bin.
"""

import re

from llamajax.tokenizer.llama2c import is_llama2c, model_of_llama2c
from llamajax.tokenizer.ranks import json_of_ranks
from llamajax.words import Words

# The largest in use, the tokenizer.json of 256,000 pieces, has 33 MB; a sentencepiece model of as many, 4.
LARGEST_TOKENIZER = 64 << 20
FILE_NAMES = {"sentencepiece": "tokenizer.model", "tokenizers": "tokenizer.json"}

_RANKS = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def is_json(data: bytes) -> bool:
    """Whether bytes are a tokenizer.json, if they are a tokenizer."""
    return data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"


def is_sentencepiece(data: bytes) -> bool:
    """Whether bytes are a sentencepiece model, if they are a tokenizer."""
    return not (is_json(data) or _RANKS.match(data) or is_llama2c(data))


def file_name(data: bytes) -> str:
    """What the file of a tokenizer is called, given the bytes of either form at rest."""
    return FILE_NAMES["tokenizers" if is_json(data) else "sentencepiece"]


def at_rest(data: bytes, words: Words) -> bytes:
    """A tokenizer of any form in one of the two that are kept; what is of none is returned as it is.

    Args:
        data: the tokenizer.
        words: their added tokens name what stands behind ranks.

    Raises:
        EngineError: for damaged ranks or a damaged tokenizer.bin.
    """
    if _RANKS.match(data):
        return json_of_ranks(data, words.added)
    if is_llama2c(data):
        return model_of_llama2c(data)
    return data
