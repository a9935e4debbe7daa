"""From logits to the next token: pure functions of logits, a key and knobs.

A knob that is None is off and left out of the program. The others are arrays, a scalar or one value a row, so that
changing a temperature compiles nothing; and what no row uses is not executed: `NEUTRAL` has the value that is "off".
Order and meaning follow transformers' logits processors: repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses
import math
import numbers
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.generation.noise import gumbel_noise
from llamajax.generation.ranks import kth_largest, nucleus

# A token at this logit is never drawn; finite for the reason given at `cache.MASKED`.
_EXCLUDED = -1e30
# Logits divided by less would leave float32, or fall below the mark of excluded tokens.
_LOWEST_TEMPERATURE = 1e-4
# Each knob's value for "off", whose type is the array's: greedy choice, and all tokens as the model has them.
NEUTRAL: Mapping[str, np.float32 | np.int32] = types.MappingProxyType(
    {
        "temperature": np.float32(0),
        "top_k": np.int32(1 << 30),
        "top_p": np.float32(1),
        "min_p": np.float32(0),
        "repetition_penalty": np.float32(1),
    }
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How a token is chosen; built by `make_sampler`, which checks the values.

    Attributes:
        temperature: float32, divides the logits; None for greedy choice, which ignores the knobs below it but the
            penalty. A row whose temperature is 0 (or anything below 1e-4) gets the likeliest token, as all rows do
            with None.
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

    @property
    def penalizes(self) -> jax.Array:
        """Whether a row is penalized, bool: what `sample` takes as seen matters only then."""
        if self.repetition_penalty is None:
            return jnp.asarray(False)
        return jnp.any(self.repetition_penalty != NEUTRAL["repetition_penalty"])


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
        "top_k": _checked("top_k", top_k, 1, int(NEUTRAL["top_k"]), "a whole number from 1 to 2**30"),
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
    dtype = NEUTRAL[name].dtype
    whole = dtype == np.int32
    largest = min(high, float(np.finfo(np.float32).max))
    for number in _as_list(value):
        numeric = isinstance(number, numbers.Integral if whole else numbers.Real) and not isinstance(number, bool)
        if not numeric or not low <= number <= largest or (open_low and number == low):
            raise LlamaJaxError(f"{name} is {number!r}: expected {expected}")
    return jax.device_put(np.asarray(value, dtype))


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
    """Chooses one token a row. Rows that are greedy draw no noise and filter nothing, unless others beside them do.

    Args:
        logits_BV: float32.
        key_B: one PRNG key a row, so that a row's choice does not depend on the rest of the batch.
        sampler: the knobs.
        seen_BV: bool, tokens that each row holds; needed for a repetition penalty.

    Returns:
        token_B, int32, and log_probability_B, float32: of that token under the model itself, before any knob. It is
        not finite exactly where the row's logits are of no use: one is NaN or +infinity, or all are -infinity.
    """
    if sampler.repetition_penalty is not None:
        token_B = jax.lax.cond(
            sampler.penalizes,
            lambda: _likeliest(_penalized(logits_BV, sampler, seen_BV)),
            lambda: _likeliest(logits_BV),
        )
    else:
        token_B = _likeliest(logits_BV)
    if sampler.temperature is not None:
        is_greedy_B = jnp.broadcast_to(_is_greedy(sampler.temperature), token_B.shape)

        def draw() -> jax.Array:
            # The largest sum of a logit and Gumbel noise is a draw from the softmax, as in `jax.random.categorical`.
            chances_BV = filter_logits(logits_BV, sampler, seen_BV)
            return jnp.where(is_greedy_B, token_B, _likeliest(chances_BV + gumbel_noise(key_B, logits_BV.shape[-1])))

        token_B = jax.lax.cond(jnp.all(is_greedy_B), lambda: token_B, draw)
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    total_B = jnp.sum(jnp.exp(logits_BV - most_B1), axis=-1)
    chosen_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
    return token_B, (chosen_B1 - most_B1)[:, 0] - jnp.log(total_B)


def filter_logits(logits_BV: jax.Array, sampler: Sampler, seen_BV: jax.Array | None = None) -> jax.Array:
    """Logits after penalty and temperature, tokens that the knobs rule out at -1e30; of greedy rows penalized alone."""
    logits_BV = _penalized(logits_BV, sampler, seen_BV)
    warm_B = jnp.ones(logits_BV.shape[:1], bool)
    if sampler.temperature is not None:
        warm_B &= ~_is_greedy(sampler.temperature)
        logits_BV = logits_BV / jnp.where(warm_B, sampler.temperature, 1)[:, None]
    least_B, last_B = _kept(logits_BV, sampler, warm_B)
    id_V = jnp.arange(logits_BV.shape[-1], dtype=jnp.int32)
    is_least_BV = (logits_BV == least_B[:, None]) & (id_V <= last_B[:, None])
    return jnp.where((logits_BV > least_B[:, None]) | is_least_BV, logits_BV, _EXCLUDED)


def _is_greedy(temperature: jax.Array) -> jax.Array:
    return temperature < _LOWEST_TEMPERATURE


def _column(knob: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """A knob, one value or one a row, as [B, 1]."""
    return jnp.broadcast_to(knob, logits_BV.shape[:1])[:, None]


def _penalized(logits_BV: jax.Array, sampler: Sampler, seen_BV: jax.Array | None) -> jax.Array:
    if sampler.repetition_penalty is None:
        return logits_BV
    assert seen_BV is not None, "a repetition penalty needs seen_BV"
    penalty = _column(sampler.repetition_penalty, logits_BV)
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def _likeliest(chances_BV: jax.Array) -> jax.Array:
    """The first token of the largest value, int32 [B]; any for a row that holds NaN.

    XLA's `argmax` compares one value at a time on a CPU; these two passes compare a register of them.
    """
    most_B1 = jnp.max(chances_BV, axis=-1, keepdims=True)
    V = chances_BV.shape[-1]
    id_V = jnp.arange(V, dtype=jnp.int32)
    return jnp.min(jnp.where(chances_BV == most_B1, id_V, V - 1), axis=-1)


def _kept(logits_BV: jax.Array, sampler: Sampler, warm_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What top-k, top-p and min-p keep in the rows that are sampled: all above a logit, and some of those equal to it.

    Returns:
        least_B, float32, the least logit that is kept, and last_B, int32, the last id that is kept with it.
    """
    B, V = logits_BV.shape
    kept = jnp.full(B, -jnp.inf, logits_BV.dtype), jnp.full(B, V, jnp.int32)
    if sampler.top_k is not None:
        top_k_B = jnp.broadcast_to(sampler.top_k, (B,))
        used_B = warm_B & (top_k_B < V)
        kept = _where_used(used_B, kept, lambda: (kth_largest(logits_BV, top_k_B), kept[1]))
    if sampler.top_p is not None:
        top_p_B, least_B = jnp.broadcast_to(sampler.top_p, (B,)), kept[0]
        # At 1 all are kept, also those whose probability is lost beside the sum.
        kept = _where_used(warm_B & (top_p_B < 1), kept, lambda: nucleus(logits_BV, top_p_B, least_B))
    if sampler.min_p is not None:
        min_p_B, (least_B, last_B) = jnp.broadcast_to(sampler.min_p, (B,)), kept

        def raised() -> tuple[jax.Array, jax.Array]:
            floor_B = jnp.max(logits_BV, axis=-1) + jnp.log(min_p_B)
            return jnp.maximum(floor_B, least_B), jnp.where(floor_B > least_B, V, last_B)

        kept = _where_used(warm_B & (min_p_B > 0), kept, raised)
    return kept


def _where_used(
    used_B: jax.Array, otherwise: tuple[jax.Array, jax.Array], compute: Callable[[], tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """What `compute` gives, in the rows that use it; not executed if there are none. Arrays [B], which cost no copy."""
    return jax.lax.cond(
        jnp.any(used_B),
        lambda: jax.tree.map(lambda new_B, old_B: jnp.where(used_B, new_B, old_B), compute(), otherwise),
        lambda: otherwise,
    )
