"""Recognises the forms of tokenizer files by their content, and converts them to the two forms that are kept.

A tokenizer is kept as a serialized sentencepiece ModelProto (tokenizer.model) or a tokenizer.json. Two other forms are
converted to one of these: Llama 3's tokenizer.model, which holds ranks for tiktoken, and llama2.c's tokenizer.bin.
"""

import re

from llamajax.tokenizer.llama2c import is_llama2c, model_of_llama2c
from llamajax.tokenizer.ranks import json_of_ranks
from llamajax.words import Words

# The largest tokenizer.json in use, with 256,000 pieces, has 33 MB; a sentencepiece model of as many pieces has 4 MB.
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
    """The file name of a tokenizer, given its bytes in one of the two kept forms."""
    return FILE_NAMES["tokenizers" if is_json(data) else "sentencepiece"]


def at_rest(data: bytes, words: Words) -> bytes:
    """Converts a tokenizer of any form to one of the two kept forms; returns unknown bytes unchanged.

    Args:
        data: the bytes of the tokenizer's file.
        words: the checkpoint's words; their added tokens name the ids after tiktoken's ranks.

    Raises:
        EngineError: for damaged ranks or a damaged tokenizer.bin.
    """
    if _RANKS.match(data):
        return json_of_ranks(data, words.added)
    if is_llama2c(data):
        return model_of_llama2c(data)
    return data
