"""Runs a model on rows of tokens: log likelihoods of continuations, and greedy continuations.

Rows are sorted by length and padded at their end to one of a few lengths, so that a task compiles a constant number of
programs. Each finished batch can be stored on disk (`PartsOnDisk`), so that the same call need not repeat it.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.generation.stream import generate
from llamajax.model import Llama
from llamajax.tokenizer import Tokenizer

# A row is padded to _SHORTEST inputs, doubled until they suffice. The number of its scored positions is the smallest of
# _SCORED that suffices, or else the number of its inputs.
_SHORTEST = 16
_SCORED = (8, 32, 128)


class Row(NamedTuple):
    """The ids of a continuation and of the context before it, and their source for error messages."""

    context: list[int]
    continuation: list[int]
    source: str


class Scored(NamedTuple):
    """The log likelihood of a continuation in nats, and whether each of its tokens is the likeliest."""

    log_likelihood: float
    greedy: bool


class Parts(Protocol):
    """Storage of finished batches, such as `llamajax.quantization.resume.PartsOnDisk`."""

    def load_arrays(self, part: str) -> tuple[dict[str, np.ndarray], str] | None:
        """The arrays of a part and its description; None if the part is not stored."""

    def store_arrays(self, part: str, arrays: Mapping[str, Any], description: str = "") -> None:
        """Stores a part."""


class NoParts:
    """`Parts` that stores nothing."""

    def load_arrays(self, part: str) -> None:
        """Returns None."""

    def store_arrays(self, part: str, arrays: Mapping[str, Any], description: str = "") -> None:
        """Does nothing."""


# ---- Ids -------------------------------------------------------------------------------------------------------------


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str, source: str) -> Row:
    """Encodes a context and its continuation, as `TemplateLM._encode_pair` of lm-evaluation-harness does.

    White space at the end of the context belongs to the continuation. If the context alone has n ids, the
    continuation's ids are those after the first n of both texts encoded together. An empty context is encoded as BOS,
    or as EOS if the tokenizer has no BOS.

    Raises:
        LlamaJaxError: if the continuation adds no token, or the context is empty and the tokenizer has neither BOS nor
            EOS.
    """
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if kept:
        context_ids = tokenizer.encode(kept, eos=False)
        ids = tokenizer.encode(kept + continuation, eos=False)[len(context_ids) :]
    else:
        begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if begin is None:
            raise LlamaJaxError(f"{source}: no text before the answer, and the tokenizer has no BOS: expected a text")
        context_ids, ids = [begin], tokenizer.encode(continuation, bos=False, eos=False)
    if not ids:
        raise LlamaJaxError(f"{source}: {continuation!r} adds no token to the text before it: expected at least one")
    return Row(context_ids, ids, source)


# ---- Log likelihoods -------------------------------------------------------------------------------------------------


def log_likelihoods(
    model: Llama,
    rows: Sequence[Row],
    batch: int,
    on_batch: Callable[[int, int], None],
    parts: Parts,
) -> list[Scored]:
    """Log likelihood of each row's continuation, given its context.

    A row longer than the model's context loses tokens at its beginning, as in the harness.

    Args:
        model: the model, prepared or not.
        rows: contexts and continuations.
        batch: rows at once.
        on_batch: called with (rows done, rows in all).
        parts: storage of finished batches.

    Raises:
        LlamaJaxError: for a continuation longer than the model's context, an id outside the vocabulary, or logits that
            are not finite.
    """
    for row in rows:
        _check(row, model)
    lengths = [_padded(row, model.config.context_length) for row in rows]
    result: dict[int, Scored] = {}
    for number, chosen in enumerate(_batches(lengths, batch)):
        part = f"scores-{number:06}"
        if (kept := parts.load_arrays(part)) is not None:
            log_likelihood_b, greedy_b = kept[0]["log_likelihood"], kept[0]["greedy"]
        else:
            log_likelihood_b, greedy_b = _score(model, [rows[i] for i in chosen], *lengths[chosen[0]], batch)
            parts.store_arrays(part, {"log_likelihood": log_likelihood_b, "greedy": greedy_b})
        for i, value, greedy in zip(chosen, log_likelihood_b.tolist(), greedy_b.tolist(), strict=True):
            result[i] = Scored(value, greedy)
        on_batch(len(result), len(rows))
    return [result[i] for i in range(len(rows))]


def _check(row: Row, model: Llama) -> None:
    """Refuses a row whose continuation is longer than the model's context, or with ids outside the vocabulary."""
    config = model.config
    if len(row.continuation) > config.context_length:
        raise LlamaJaxError(
            f"{row.source}: the continuation has {len(row.continuation)} tokens: expected at most "
            f"{config.context_length}, the model's context"
        )
    if max(*row.context, *row.continuation) >= config.vocab_size:
        raise LlamaJaxError(
            f"{row.source}: token {max(*row.context, *row.continuation)}: expected ids below {config.vocab_size}"
        )


def _padded(row: Row, context_length: int) -> tuple[int, int]:
    """The number of inputs that a row is padded to, and the number of its scored positions."""
    inputs = min(len(row.context) + len(row.continuation) - 1, context_length)
    padded = _SHORTEST
    while padded < inputs:
        padded *= 2
    padded = min(padded, context_length)
    return padded, min([size for size in _SCORED if len(row.continuation) <= size <= padded], default=padded)


def _batches(lengths: Sequence[tuple[int, int]], batch: int) -> Iterator[list[int]]:
    """Yields batches of indices of rows with equal padded lengths, the shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for length in sorted(set(lengths)):
        equal = [i for i in order if lengths[i] == length]
        yield from (equal[i : i + batch] for i in range(0, len(equal), batch))


def _score(model: Llama, rows: Sequence[Row], inputs: int, scored: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Log likelihoods, float64 [b], and whether each is greedy, bool [b]; the last row is repeated to fill the batch.

    The tokens' log likelihoods are summed in float64.
    """
    tokens_BT = np.zeros((batch, inputs + 1), np.int32)
    count_B = np.zeros(batch, np.int32)
    for b in range(batch):
        row = rows[min(b, len(rows) - 1)]
        ids = (row.context + row.continuation)[-(inputs + 1) :]
        tokens_BT[b, : len(ids)] = ids
        count_B[b] = len(ids) - 1
    log_likelihood_BC, greedy_BC = (np.asarray(x) for x in _target_scores(model, tokens_BT, count_B, scored))
    values, greedy = [], []
    for b, row in enumerate(rows):
        counted = slice(scored - len(row.continuation), None)
        values.append(log_likelihood_BC[b, counted].sum(dtype=np.float64))
        greedy.append(greedy_BC[b, counted].all())
        if not np.isfinite(values[-1]):
            raise LlamaJaxError(
                f"{row.source}: the model's logits are not finite: its numbers overflow: give another dtype, such as "
                "float32"
            )
    return np.array(values), np.array(greedy)


@functools.partial(jax.jit, static_argnames="scored")
def _target_scores(model: Llama, tokens_BT: jax.Array, count_B: jax.Array, scored: int) -> tuple[jax.Array, jax.Array]:
    """For the last C targets of rows with `count_B` inputs: log likelihood [B, C], and whether they are the likeliest.

    The head, the widest matrix, is multiplied with the hidden states of these positions only. If a row has fewer than C
    targets, its first values have no meaning. A log likelihood is NaN if any logit of its position is not finite.
    """
    x_BTD, _ = model.blocks(model.embed(tokens_BT[:, :-1]))
    position_BC = jnp.maximum(count_B[:, None] - scored + jnp.arange(scored, dtype=jnp.int32), 0)
    logits_BCV = model.head(jnp.take_along_axis(x_BTD, position_BC[..., None], axis=1))
    target_BC = jnp.take_along_axis(tokens_BT, position_BC + 1, axis=1)
    log_likelihood_BC = jnp.take_along_axis(jax.nn.log_softmax(logits_BCV), target_BC[..., None], axis=-1)[..., 0]
    finite_BC = jnp.isfinite(logits_BCV).all(axis=-1)
    return jnp.where(finite_BC, log_likelihood_BC, jnp.nan), jnp.argmax(logits_BCV, axis=-1) == target_BC


# ---- Answers ---------------------------------------------------------------------------------------------------------


def answers(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[list[int], str]],
    *,
    stop: Iterable[str],
    max_new_tokens: int,
    batch: int,
    on_batch: Callable[[int, int], None],
    parts: Parts,
) -> list[str]:
    """Continues prompts greedily, up to a stop string, a stop token or `max_new_tokens`.

    A prompt that leaves no room for so many tokens loses its beginning, as in the harness.

    Args:
        model: the model, prepared or not.
        tokenizer: tokenizer of the ids.
        prompts: the ids of each prompt, and their source for error messages.
        stop: strings that end an answer and are no part of it.
        max_new_tokens: maximum number of tokens of an answer.
        batch: prompts at once.
        on_batch: called with (prompts done, prompts in all).
        parts: storage of finished batches.

    Raises:
        LlamaJaxError: if the model's context has no room for an answer, or as `generate`.
    """
    room = model.config.context_length - max_new_tokens
    if room < 1:
        raise LlamaJaxError(
            f"max_new_tokens is {max_new_tokens}: expected less than {model.config.context_length}, the model's context"
        )
    shortened = [ids[-room:] for ids, _ in prompts]
    for ids, source in zip(shortened, (source for _, source in prompts), strict=True):
        if not ids:
            raise LlamaJaxError(f"{source}: the prompt has no tokens: expected at least one")
    order = sorted(range(len(prompts)), key=lambda i: (len(shortened[i]), i))
    result: dict[int, str] = {}
    for number, first in enumerate(range(0, len(order), batch)):
        chosen = order[first : first + batch]
        part = f"answers-{number:06}"
        if (kept := parts.load_arrays(part)) is not None:
            texts = json.loads(kept[1])
        else:
            filled = [shortened[i] for i in chosen] + [shortened[chosen[-1]]] * (batch - len(chosen))
            made = generate(
                model, tokenizer, filled, temperature=0, stop=list(stop) or None, max_new_tokens=max_new_tokens
            )
            texts = [completion.text for completion in made[: len(chosen)]]
            parts.store_arrays(part, {"count": np.int32(len(texts))}, json.dumps(texts))
        result |= dict(zip(chosen, texts, strict=True))
        on_batch(len(result), len(prompts))
    return [result[i] for i in range(len(prompts))]
