"""Measures how well a model predicts a text, and how near its predictions are to those of another model.

The functions measure a model in the layout that its weights have. A model from `llamajax.prepare` is measured as it
runs on that backend, with the rounding that the layout adds for `activations="bfloat16"`. Other models are measured
with the reference product, which dequantizes each weight whole. The command `llamajax eval` prepares its models.
"""

import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.evaluation.windows import (
    CONVENTIONS,
    Windows,
    as_windows,
    document_windows,
    gptq_windows,
    llama_cpp_windows,
)
from llamajax.files import read_bytes
from llamajax.model import Llama
from llamajax.tokenizer import Tokenizer

DOCUMENT_SEPARATOR = "<|endoftext|>"
_LARGEST_TEXT = 1 << 32  # TinyStories, the largest text file that we know of, has 2.2 GB


# ---- Texts -----------------------------------------------------------------------------------------------------------


def read_text(path: str | Path) -> str:
    """Reads a text file without changing its newlines.

    Raises:
        LlamaJaxError: if the file is missing or not UTF-8.
    """
    try:
        return read_bytes(path, _LARGEST_TEXT).decode("utf-8")
    except FileNotFoundError:
        raise LlamaJaxError(
            f"{path}: no such file: expected a UTF-8 text, documents separated by {DOCUMENT_SEPARATOR}"
        ) from None
    except UnicodeDecodeError as error:
        raise LlamaJaxError(f"{path}: not UTF-8 at byte {error.start}: expected a UTF-8 text") from None


def split_documents(text: str) -> list[str]:
    """Splits a text at `<|endoftext|>` into its documents, strips them, and leaves out empty ones."""
    documents = [document.strip() for document in text.split(DOCUMENT_SEPARATOR)]
    return [document for document in documents if document]


def read_documents(path: str | Path) -> list[str]:
    """Reads the documents of a text file (see `split_documents`).

    Raises:
        LlamaJaxError: if the file is missing, not UTF-8 or empty.
    """
    documents = split_documents(read_text(path))
    if not documents:
        raise LlamaJaxError(f"{path}: no text in it: expected at least one document")
    return documents


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> np.ndarray:
    """Encodes each document by itself, with BOS if the tokenizer adds one, and joins them in one array of int32 ids."""
    rows = [np.asarray(tokenizer.encode(document), np.int32) for document in documents]
    return np.concatenate(rows) if rows else np.zeros(0, np.int32)


def dataset_text(text: str) -> str:
    r"""Turns a file such as `wiki.test.raw` into `"\n\n".join(dataset["text"])`, the text of the GPTQ convention.

    The rows of Hugging Face's wikitext-2-raw-v1 are the lines of that file, each with its newline, except that a line
    of white space only is an empty row (`_generate_examples` of datasets/wikitext/wikitext.py in huggingface/datasets).
    """
    rows = io.StringIO(text, newline=None)
    return "\n\n".join(row if row.strip() else "" for row in rows)


def text_windows(text: str, tokenizer: Tokenizer, window: int = 512, convention: str = "documents") -> Windows:
    """Cuts a text into windows by one of the conventions that `llamajax.evaluation.windows` describes.

    "documents" splits the text at `<|endoftext|>`; the others encode it as a whole: "llama.cpp" without one final
    newline (which that program drops from a file it reads), "gptq" after `dataset_text`.

    Raises:
        LlamaJaxError: if the text is too short, or there is no such convention.
    """
    if convention == "documents":
        return document_windows(encode_documents(tokenizer, split_documents(text)), window)
    if convention == "llama.cpp":
        return llama_cpp_windows(tokenizer.encode(text.removesuffix("\n")), window, tokenizer.first_id)
    if convention == "gptq":
        return gptq_windows(tokenizer.encode(dataset_text(text)), window)
    raise LlamaJaxError(f"convention is {convention!r}: expected one of {', '.join(CONVENTIONS)}")


# ---- Measures --------------------------------------------------------------------------------------------------------


def next_token_losses(model: Llama, tokens_BT: jax.Array, **options: Any) -> jax.Array:
    """Negative log-likelihood of each token after the first of its row, in nats, float32 [B, T-1]. Differentiable.

    Options are `hooks` and `remat` of `Llama.blocks`.
    """
    return _losses(model(tokens_BT[:, :-1], **options)[0], tokens_BT[:, 1:])


def token_losses(
    model: Llama,
    tokens: Sequence[int] | np.ndarray | Windows,
    *,
    window: int = 512,
    batch: int = 8,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Negative log-likelihood of every token that counts, in nats, float32 [predictions], in the text's order.

    Args:
        model: the model; prepared (`llamajax.prepare`) to measure it as it runs on a backend, or not prepared to
            measure it with the reference product.
        tokens: ids of the whole text, [n], which `document_windows` cuts; or windows of any convention.
        window: inputs per window, if `tokens` are ids.
        batch: windows evaluated at once.
        on_batch: called with (windows done, windows in all).

    Raises:
        LlamaJaxError: if the text is shorter than one window and its last target, or logits are not finite.
    """
    windows = as_windows(tokens, window)
    parts: list[np.ndarray] = []
    for rows, used in windows.batches(batch, on_batch):
        losses = np.asarray(_window_losses(model, rows, windows.first))[:used]
        _check_finite(losses, "model", len(parts) * batch, windows)
        parts.append(losses)
    return np.concatenate([losses.ravel() for losses in parts])


def cross_entropy(
    model: Llama,
    tokens: Sequence[int] | np.ndarray | Windows,
    *,
    window: int = 512,
    batch: int = 8,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """Mean cross-entropy in nats per token: the mean of `token_losses`, with the same arguments and errors.

    Its exponential is the perplexity.
    """
    losses = token_losses(model, tokens, window=window, batch=batch, on_batch=on_batch)
    return float(np.mean(losses, dtype=np.float64))


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of `values`, as llama.cpp's `±`. Tokens of a text are not quite independent."""
    return math.sqrt(np.var(values, dtype=np.float64) / max(1, len(values) - 1))


class Comparison(NamedTuple):
    """How a model's predictions differ from a reference's on the same text: means over all predictions that count.

    Attributes:
        kl_divergence: KL(reference || model), in nats.
        top1_agreement: fraction of positions at which the same token is likeliest in both.
        cross_entropy: cross-entropy of the model, in nats per token.
        reference_cross_entropy: cross-entropy of the reference, in nats per token.
    """

    kl_divergence: float
    top1_agreement: float
    cross_entropy: float
    reference_cross_entropy: float


def compare(
    model: Llama,
    reference: Llama,
    tokens: Sequence[int] | np.ndarray | Windows,
    *,
    window: int = 512,
    batch: int = 4,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compares a model, such as a quantized one, with the one that it was made from: the means of `compare_each`.

    Either model may be prepared for a backend: weights are multiplied in the layout that they have.
    """
    values = compare_each(model, reference, tokens, window=window, batch=batch, on_batch=on_batch)
    return Comparison(*(float(mean) for mean in values.mean(axis=1, dtype=np.float64)))


def compare_each(
    model: Llama,
    reference: Llama,
    tokens: Sequence[int] | np.ndarray | Windows,
    *,
    window: int = 512,
    batch: int = 4,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """The fields of `Comparison` at every position that counts, float32 [4, predictions]; agreement is 0 or 1.

    Arguments are those of `token_losses`.

    Raises:
        LlamaJaxError: for the reasons of `token_losses`, for both models, or if the vocabularies differ.
    """
    check_vocabularies(model, reference)
    windows = as_windows(tokens, window)
    parts: list[np.ndarray] = []
    for rows, used in windows.batches(batch, on_batch):
        compared = np.asarray(_window_comparison(model, reference, rows, windows.first))[:, :used]
        for name, values in (("model", compared[2]), ("reference", compared[3]), ("model", compared[0])):
            _check_finite(values, name, len(parts) * batch, windows)
        parts.append(compared.reshape(4, -1))
    return np.concatenate(parts, axis=1)


def _check_finite(values_BT: np.ndarray, name: str, first_window: int, windows: Windows) -> None:
    """Raises an error if a value is not finite: the mean over the text would be NaN or wrong."""
    if np.isfinite(values_BT).all():
        return
    row, position = np.argwhere(~np.isfinite(values_BT))[0]
    raise LlamaJaxError(
        f"the {name}'s logits are not finite at token {windows.first + position + 1} of window "
        f"{first_window + row + 1} of {len(windows.rows)}: its numbers overflow: give another dtype, such as float32"
    )


def check_vocabularies(model: Llama, reference: Llama) -> None:
    """Raises an error if two models have vocabularies of different sizes."""
    if model.config.vocab_size != reference.config.vocab_size:
        raise LlamaJaxError(
            f"the model has {model.config.vocab_size} tokens, the reference {reference.config.vocab_size}: "
            "expected one vocabulary"
        )


def _scored_logits(model: Llama, tokens_BT: jax.Array, first: int) -> jax.Array:
    """Logits of the predictions that count; the head, the widest matrix, is not multiplied with other positions."""
    x_BTD, _ = model.blocks(model.embed(tokens_BT[:, :-1]))
    return model.head(x_BTD[:, first:])


def _finite(logits_BTV: jax.Array) -> jax.Array:
    """Logits, with all set to NaN at a position where one is not finite: otherwise the loss could hide it."""
    return jnp.where(jnp.isfinite(logits_BTV).all(axis=-1, keepdims=True), logits_BTV, jnp.nan)


def _losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    log_normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return log_normalizer_BT - jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


@functools.partial(jax.jit, static_argnames="first")
def _window_losses(model: Llama, tokens_BT: jax.Array, first: int) -> jax.Array:
    return _losses(_finite(_scored_logits(model, tokens_BT, first)), tokens_BT[:, 1 + first :])


@functools.partial(jax.jit, static_argnames="first")
def _window_comparison(model: Llama, reference: Llama, tokens_BT: jax.Array, first: int) -> jax.Array:
    """The fields of `Comparison` at each position that counts, float32 [4, B, T - first]."""
    ours_BTV = jax.nn.log_softmax(_finite(_scored_logits(model, tokens_BT, first)))
    theirs_BTV = jax.nn.log_softmax(_finite(_scored_logits(reference, tokens_BT, first)))
    divergence_BT = jnp.sum(jnp.exp(theirs_BTV) * (theirs_BTV - ours_BTV), axis=-1)
    agreement_BT = (jnp.argmax(ours_BTV, axis=-1) == jnp.argmax(theirs_BTV, axis=-1)).astype(jnp.float32)
    target = tokens_BT[:, 1 + first :, None]
    losses = [-jnp.take_along_axis(logits, target, axis=-1)[..., 0] for logits in (ours_BTV, theirs_BTV)]
    return jnp.stack([divergence_BT, agreement_BT, *losses])
