"""How well a model predicts a text, and how near it is to another: over windows that do not overlap."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

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
    count = 0
    total = 0.0
    for rows, used in _windows(tokens, window, batch, on_batch):
        total += float(np.sum(np.asarray(_window_losses(model, rows))[:used], dtype=np.float64))
        count += used
    return total / (count * window)


class Comparison(NamedTuple):
    """How a model's predictions differ from a reference's on the same text.

    Attributes:
        kl_divergence: mean of KL(reference || model) over all positions, in nats.
        top1_agreement: fraction of positions at which both find the same token likeliest.
        cross_entropy: of the model, in nats a token.
        reference_cross_entropy: of the reference.
    """

    kl_divergence: float
    top1_agreement: float
    cross_entropy: float
    reference_cross_entropy: float


def compare(
    model: Llama,
    reference: Llama,
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int = 512,
    batch: int = 4,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compares a model (quantized, say) with the one that it was made from, over the windows of `cross_entropy`.

    Raises:
        LlamaJaxError: as `cross_entropy`, or if the vocabularies differ.
    """
    if model.config.vocab_size != reference.config.vocab_size:
        raise LlamaJaxError(
            f"the model has {model.config.vocab_size} tokens, the reference {reference.config.vocab_size}: "
            "expected one vocabulary"
        )
    sums, count = np.zeros(len(Comparison._fields)), 0
    for rows, used in _windows(tokens, window, batch, on_batch):
        sums += np.sum(np.asarray(_window_comparison(model, reference, rows))[:, :used], axis=(1, 2), dtype=np.float64)
        count += used
    return Comparison(*(float(value) for value in sums / (count * window)))


def _windows(
    tokens: Sequence[int] | np.ndarray, window: int, batch: int, on_batch: Callable[[int, int], None]
) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of windows [batch, window + 1], the last one filled up, and how many of each count."""
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
    for first in range(0, count, batch):
        rows = windows[first : first + batch]
        yield _fill(rows, batch), len(rows)
        on_batch(min(first + batch, count), count)


@jax.jit
def _window_comparison(model: Llama, reference: Llama, tokens_BT: jax.Array) -> jax.Array:
    """The fields of `Comparison` at each position, float32 [4, B, T-1]."""
    ours_BTV = jax.nn.log_softmax(model(tokens_BT[:, :-1])[0])
    theirs_BTV = jax.nn.log_softmax(reference(tokens_BT[:, :-1])[0])
    divergence_BT = jnp.sum(jnp.exp(theirs_BTV) * (theirs_BTV - ours_BTV), axis=-1)
    agreement_BT = (jnp.argmax(ours_BTV, axis=-1) == jnp.argmax(theirs_BTV, axis=-1)).astype(jnp.float32)
    target = tokens_BT[:, 1:, None]
    losses = [-jnp.take_along_axis(logits, target, axis=-1)[..., 0] for logits in (ours_BTV, theirs_BTV)]
    return jnp.stack([divergence_BT, agreement_BT, *losses])


@jax.jit
def _window_losses(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    return next_token_losses(model, tokens_BT)


def _fill(rows: np.ndarray, batch: int) -> np.ndarray:
    """`rows` with its last row repeated up to `batch`, so that the last batch needs no program of its own."""
    return np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows), axis=0)])
