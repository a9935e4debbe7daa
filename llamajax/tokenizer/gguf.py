"""Tokenizers in the metadata of a GGUF: `from_metadata` reads one, `to_metadata` writes it.

Source of what the keys mean: docs/gguf.md of github.com/ggml-org/ggml, and `llama_vocab::impl::load` in
src/llama-vocab.cpp of github.com/ggml-org/llama.cpp for what a file leaves out.
"""

from llamajax.tokenizer.gguf_read import from_metadata
from llamajax.tokenizer.gguf_write import to_metadata

__all__ = ["from_metadata", "to_metadata"]
