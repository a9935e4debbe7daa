"""Reads and writes GGUF, the files of llama.cpp; packed weights stay packed as they are in the file.

`container` reads files: metadata, and tensors as blocks of bytes. `names`, `config`, `rope` and `words` interpret the
metadata of a model; `source` reads a model; `write` writes one, with `encode` for the bytes.
"""

from llamajax.checkpoint.gguf.source import open_source, recognise
from llamajax.checkpoint.gguf.write import check_name, save

__all__ = ["check_name", "open_source", "recognise", "save"]
