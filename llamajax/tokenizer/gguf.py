"""Tokenizers in the metadata of a GGUF: `from_metadata` reads one, `to_metadata` writes one.

The meaning of the keys is from docs/gguf.md of github.com/ggml-org/ggml, the defaults of missing keys are from
`llama_vocab::impl::load` in src/llama-vocab.cpp of github.com/ggml-org/llama.cpp.
"""

from llamajax.tokenizer.gguf_read import from_metadata
from llamajax.tokenizer.gguf_write import to_metadata

__all__ = ["from_metadata", "to_metadata"]
