"""GGUF: the files of llama.cpp, read where they are, packed as they are.

`container` knows files: metadata, and tensors as blocks of bytes. `names`, `config`, `rope` and `words` know what a
model's mean; `source` reads it; `write` writes it, with `encode` for the bytes.
"""

from llamajax.checkpoint.gguf.source import open_source, recognise
from llamajax.checkpoint.gguf.write import check_name, save

__all__ = ["check_name", "open_source", "recognise", "save"]
