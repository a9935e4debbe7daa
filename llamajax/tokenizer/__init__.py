"""Converts text to token ids and back: one `Tokenizer` for every kind of file that LLaMA models come with.

    tokenizer = Tokenizer.from_file("tokenizer.json")     # or sentencepiece, tiktoken ranks, llama2.c's tokenizer.bin
    ids = tokenizer.encode("Once upon a time")
    for index in ids:
        print(tokenizer.piece(index), tokenizer.token_bytes(index))

There are two engines, the libraries sentencepiece and tokenizers, and so a tokenizer is kept in one of two forms: a
serialized ModelProto or a tokenizer.json. Other forms are converted (`formats`), and so is the vocabulary in a GGUF's
metadata (`gguf`).
"""

from llamajax.tokenizer.byte_level import BYTES
from llamajax.tokenizer.filling import infill
from llamajax.tokenizer.formats import FILE_NAMES, LARGEST_TOKENIZER, file_name, is_sentencepiece
from llamajax.tokenizer.json_form import steps_of
from llamajax.tokenizer.model_proto import proto
from llamajax.tokenizer.pre_tokenizers import GPT2
from llamajax.tokenizer.tokenizer import StreamDecoder, Tokenizer
from llamajax.tokenizer.training import train_tokenizer

__all__ = [
    "BYTES",
    "FILE_NAMES",
    "GPT2",
    "LARGEST_TOKENIZER",
    "StreamDecoder",
    "Tokenizer",
    "file_name",
    "infill",
    "is_sentencepiece",
    "proto",
    "steps_of",
    "train_tokenizer",
]
