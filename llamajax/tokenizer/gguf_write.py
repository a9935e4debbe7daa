"""A tokenizer as the metadata of a GGUF."""

from typing import Any

from llamajax.tokenizer.tokenizer import Tokenizer


def to_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Keys and values for a GGUF's metadata, from which `from_metadata` gives the tokenizer back.

    Args:
        tokenizer: any.
        vocab_size: V, the rows of the model's embedding; tokens that are missing up to it are written as unused.

    Returns:
        Values by key: str; bool; int, for UINT32; lists of str; NumPy arrays of float32, int32 and uint8.

    Raises:
        LlamaJaxError: for a tokenizer that no GGUF holds.
    """
    raise NotImplementedError
