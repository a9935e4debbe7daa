"""How well a model predicts a text: next-token cross-entropy over windows that do not overlap."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.model import Llama
from llamajax.tokenizer import Tokenizer

DOCUMENT_SEPARATOR = "<|endoftext|>"


def next_token_losses(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    """Negative log-likelihood of each token after the first of its row, in nats, float32 [B, T-1]. Differentiable."""
    logits_BTV, _ = model(tokens_BT[:, :-1])
    log_normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return log_normalizer_BT - target_BT


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file: separated by `<|endoftext|>`, stripped, empty ones left out.

    Raises:
        LlamaJaxError: if the file is missing, not UTF-8 or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise LlamaJaxError(f"{path}: no such file: expected a UTF-8 text, documents separated by {DOCUMENT_SEPARATOR}")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise LlamaJaxError(f"{path}: not UTF-8 at byte {error.start}: expected a UTF-8 text") from None
    documents = [document.strip() for document in text.split(DOCUMENT_SEPARATOR)]
    documents = [document for document in documents if document]
    if not documents:
        raise LlamaJaxError(f"{path}: no text in it: expected at least one document")
    return documents


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """All documents in one row of int32 ids, each encoded by itself with a BOS before it."""
    rows = [np.asarray(tokenizer.encode(document), np.int32) for document in documents]
    return np.concatenate(rows) if rows else np.zeros(0, np.int32)


def cross_entropy(
    model: Llama,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int = 512,
    batch: int = 8,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean cross-entropy in nats a token.

    The text is cut into windows of `window` input tokens that do not overlap; a window's targets are the tokens that
    follow its inputs, so all tokens but the very first are predicted, each once, from at most `window` before it. What
    does not fill a last window is left out.

    Args:
        model: the model.
        tokens: ids of the whole text, [n].
        window: inputs per window.
        batch: windows evaluated at once.
        on_batch: called with (windows done, windows in all).

    Raises:
        LlamaJaxError: if the text is shorter than one window and its last target.
    """
    for name, value in (("window", window), ("batch", batch)):
        if value < 1:
            raise LlamaJaxError(f"{name} is {value}: expected at least 1")
    tokens = np.asarray(tokens, np.int32)
    count = (len(tokens) - 1) // window
    if count < 1:
        raise LlamaJaxError(
            f"the text has {len(tokens)} tokens: expected at least {window + 1}, one window of {window}"
        )
    windows = np.stack([tokens[i * window : (i + 1) * window + 1] for i in range(count)])
    total = 0.0
    for first in range(0, count, batch):
        rows = windows[first : first + batch]
        total += float(np.sum(np.asarray(_window_losses(model, _fill(rows, batch)))[: len(rows)], dtype=np.float64))
        on_batch(min(first + batch, count), count)
    return total / (count * window)


@jax.jit
def _window_losses(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    return next_token_losses(model, tokens_BT)


def _fill(rows: np.ndarray, batch: int) -> np.ndarray:
    """`rows` with its last row repeated up to `batch`, so that the last batch needs no program of its own."""
    return np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
