"""From logits to the next token: pure functions of logits, a key and knobs.

A knob that is None is off and costs nothing; the others are arrays, so that changing a temperature compiles nothing.
Each knob is a scalar or one value a row. Order and meaning follow transformers' logits processors: repetition penalty,
temperature, top-k, top-p, min-p.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.errors import LlamaJaxError

# A token at this logit is never drawn; finite for the reason given at `cache.MASKED`.
_EXCLUDED = -1e30
# Logits divided by less would leave float32, or fall below the mark of excluded tokens.
_LOWEST_TEMPERATURE = 1e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is chosen; built by `make_sampler`, which checks the values.

    Attributes:
        temperature: float32, divides the logits; None for greedy choice, which ignores the knobs below it. A row whose
            temperature is 0 (or anything below 1e-4) gets the likeliest token, as all rows do with None.
        top_k: int32, only the k likeliest tokens (and those as likely as the k-th).
        top_p: float32, only the fewest tokens that together have this probability; of equally likely tokens those of
            lower id come first (Holtzman et al. 2020, arXiv:1904.09751).
        min_p: float32, only tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024,
            arXiv:2407.01082).
        repetition_penalty: float32, divides the positive and multiplies the negative logits of tokens that the row
            already holds (Keskar et al. 2019, arXiv:1909.05858).
    """

    temperature: jax.Array | None = None
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None
    min_p: jax.Array | None = None
    repetition_penalty: jax.Array | None = None


def make_sampler(
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int] | None = None,
    top_p: float | Sequence[float] | None = None,
    min_p: float | Sequence[float] | None = None,
    repetition_penalty: float | Sequence[float] | None = None,
) -> Sampler:
    """Checks the knobs; temperature 0 means greedy. Lists and arrays give one value to each row.

    Raises:
        LlamaJaxError: for a value out of its range.
    """
    if temperature is None:
        raise LlamaJaxError("temperature is None: expected 0 (greedy) or a finite number of at least 1e-4")
    values = {
        "temperature": _checked(
            "temperature", temperature, 0.0, math.inf, "0 (greedy) or a finite number of at least 1e-4"
        ),
        "top_k": _checked("top_k", top_k, 1, 1 << 30, "a whole number from 1 to 2**30"),
        "top_p": _checked("top_p", top_p, 0.0, 1.0, "a number above 0, at most 1", open_low=True),
        "min_p": _checked("min_p", min_p, 0.0, 1.0, "a number from 0 to 1"),
        "repetition_penalty": _checked(
            "repetition_penalty", repetition_penalty, 0.0, math.inf, "a positive number, 1 for none", open_low=True
        ),
    }
    temperatures = _as_list(plain(temperature))
    if all(value == 0 for value in temperatures):
        return Sampler(repetition_penalty=values["repetition_penalty"])
    if any(0 < value < _LOWEST_TEMPERATURE for value in temperatures):
        raise LlamaJaxError(f"temperature is {plain(temperature)}: expected 0 (greedy) or at least 1e-4")
    return Sampler(**values)


def _checked(
    name: str, value: Any, low: float, high: float, expected: str, *, open_low: bool = False
) -> jax.Array | None:
    """A knob as an array, float32 or int32, scalar or one value a row."""
    value = plain(value)
    if value is None:
        return None
    whole = name == "top_k"
    largest = min(high, float(np.finfo(np.float32).max))
    for number in _as_list(value):
        numeric = isinstance(number, numbers.Integral if whole else numbers.Real) and not isinstance(number, bool)
        if not numeric or not low <= number <= largest or (open_low and number == low):
            raise LlamaJaxError(f"{name} is {number!r}: expected {expected}")
    return jax.device_put(np.asarray(value, np.int32 if whole else np.float32))


def plain(value: Any) -> Any:
    """Numbers and arrays of NumPy and JAX as numbers and lists of Python; sequences of them likewise; others as is."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
        return value if isinstance(value, list | bool | int) else float(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def sample(
    logits_BV: jax.Array, key_B: jax.Array, sampler: Sampler, seen_BV: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Chooses one token a row.

    Args:
        logits_BV: float32.
        key_B: one PRNG key a row, so that a row's choice does not depend on the rest of the batch.
        sampler: the knobs.
        seen_BV: bool, tokens that each row holds; needed for a repetition penalty.

    Returns:
        token_B, int32, and log_probability_B, float32: of that token under the model itself, before any knob. It is
        not finite exactly where the row's logits are of no use: one is NaN or +infinity, or all are -infinity.
    """
    log_probability_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    chances_BV = filter_logits(logits_BV, sampler, seen_BV)
    if sampler.temperature is not None:
        # The largest sum of a logit and Gumbel noise is a draw from the softmax, as in `jax.random.categorical`.
        noise_BV = jax.vmap(lambda key, logits_V: jax.random.gumbel(key, logits_V.shape, logits_V.dtype))(
            key_B, chances_BV
        )
        chances_BV += jnp.where(_column(_is_greedy(sampler.temperature), logits_BV), 0, noise_BV)
    token_B = jnp.argmax(chances_BV, axis=-1).astype(jnp.int32)
    return token_B, jnp.take_along_axis(log_probability_BV, token_B[:, None], axis=-1)[:, 0]


def filter_logits(logits_BV: jax.Array, sampler: Sampler, seen_BV: jax.Array | None = None) -> jax.Array:
    """Logits after penalty and temperature, tokens that the knobs rule out at -1e30; divided by 1 in greedy rows."""
    if sampler.repetition_penalty is not None:
        assert seen_BV is not None, "a repetition penalty needs seen_BV"
        penalty = _column(sampler.repetition_penalty, logits_BV)
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalized_BV, logits_BV)
    if sampler.temperature is not None:
        temperature = jnp.where(_is_greedy(sampler.temperature), 1, sampler.temperature)
        logits_BV = logits_BV / _column(temperature, logits_BV)
    if sampler.top_k is not None or sampler.top_p is not None:
        logits_BV = jnp.where(_kept_by_rank(logits_BV, sampler), logits_BV, _EXCLUDED)
    if sampler.min_p is not None:
        floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(_column(sampler.min_p, logits_BV))
        logits_BV = jnp.where(logits_BV < floor_B1, _EXCLUDED, logits_BV)
    return logits_BV


def _is_greedy(temperature: jax.Array) -> jax.Array:
    return temperature < _LOWEST_TEMPERATURE


def _column(knob: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """A knob, one value or one a row, as [B, 1]."""
    return jnp.broadcast_to(knob, logits_BV.shape[:1])[:, None]


def _kept_by_rank(logits_BV: jax.Array, sampler: Sampler) -> jax.Array:
    """The tokens that top-k and top-p keep, bool [B, V]: one sort serves both.

    The sort is of logits alone, which takes half the time of one that carries ids along: where equally likely tokens
    straddle the end, they are counted off in the order of their ids instead.
    """
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    V = logits_BV.shape[-1]
    if sampler.top_k is not None:
        last_B1 = jnp.minimum(_column(sampler.top_k, logits_BV), V) - 1
        kth_B1 = jnp.take_along_axis(sorted_BV, last_B1, axis=-1)
        if sampler.top_p is None:
            return logits_BV >= kth_B1
        sorted_BV = jnp.where(sorted_BV >= kth_B1, sorted_BV, _EXCLUDED)
    assert sampler.top_p is not None
    top_p = _column(sampler.top_p, logits_BV)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    # At 1 all are kept, also those whose probability is lost beside the sum.
    keep_BV = (sorted_BV > _EXCLUDED) & ((before_BV < top_p) | (top_p >= 1))
    kept_B1 = jnp.maximum(jnp.sum(keep_BV, axis=-1, keepdims=True, dtype=jnp.int32), 1)
    least_B1 = jnp.take_along_axis(sorted_BV, kept_B1 - 1, axis=-1)
    likelier_B1 = jnp.sum(sorted_BV > least_B1, axis=-1, keepdims=True, dtype=jnp.int32)
    place_BV = jnp.cumsum(logits_BV == least_B1, axis=-1, dtype=jnp.int32)
    return (logits_BV > least_B1) | ((logits_BV == least_B1) & (place_BV <= kept_B1 - likelier_B1))
