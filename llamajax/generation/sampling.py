"""Chooses the next token from logits: pure functions of logits, a key and knobs.

A knob that is None is off and not part of the program. Other knobs are arrays, a scalar or one value for each row, so
that changing a temperature compiles nothing. A filter that no row uses is not executed; `NEUTRAL` has the values for
"off".
Order and meaning follow transformers' logits processors: repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses
import functools
import math
import numbers
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.generation.noise import gumbel_noise
from llamajax.generation.ranks import kth_largest, nucleus

# A token at this logit is never drawn; finite for the reason given at `cache.MASKED`.
_EXCLUDED = -1e30
# Logits divided by a lower temperature would overflow float32, or fall below the mark of excluded tokens.
_LOWEST_TEMPERATURE = 1e-4
# A filter looks first at the 256 blocks of 32 neighbouring tokens that have the largest logits: 8,192 tokens. With
# SmolLM2 at temperature 0.8, top-p 0.95 keeps no other tokens in 98% of the steps.
_BLOCK, _BLOCKS = 32, 256
# Each knob's value for "off", with the dtype of the knob's array: greedy choice, no filter and no penalty.
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
    """The settings by which tokens are chosen; `make_sampler` builds it and checks the values.

    Attributes:
        temperature: float32, divides the logits; None for greedy choice, which ignores all other knobs except the
            penalty. A row whose temperature is 0 (or anything below 1e-4) gets the likeliest token, as all rows do with
            None.
        top_k: int32, keeps only the k likeliest tokens (and those as likely as the k-th).
        top_p: float32, keeps only the fewest tokens that together have this probability; of equally likely tokens those
            of lower id come first (Holtzman et al. 2020, arXiv:1904.09751).
        min_p: float32, keeps only tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024,
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
        """Whether any row is penalized, bool: `sample` uses `seen_BV` only then."""
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
    """Checks the knobs and builds a `Sampler`; temperature 0 is greedy. Lists and arrays give one value to each row.

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
    """Checks a knob and returns it as an array, float32 or int32, scalar or one value per row."""
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
    """Converts numbers and arrays of NumPy and JAX, and sequences of them, to Python's; returns others unchanged."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
        return value if isinstance(value, list | bool | int) else float(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def sample(
    logits_BV: jax.Array,
    key_B: jax.Array,
    sampler: Sampler,
    seen_BV: jax.Array | None = None,
    *,
    narrows: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Chooses one token for each row. If all rows are greedy, it draws no noise and filters nothing.

    Args:
        logits_BV: float32.
        key_B: one PRNG key for each row, so that a row's choice does not depend on the rest of the batch.
        sampler: the knobs.
        seen_BV: bool, tokens that each row holds; needed for a repetition penalty.
        narrows: whether filters look at the likeliest tokens first, and at all tokens only where these do not suffice.
            The tokens are the same up to rounding; False avoids an operation that not every compiler has (`top_k`).

    Returns:
        token_B, int32, and log_probability_B, float32, the log-probability of that token under the model itself, before
            any knob. It is not finite if and only if the row's logits are invalid: one is NaN or +infinity, or all are
            -infinity.
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
            warm_BV, warm_B = _warm(logits_BV, sampler, seen_BV)
            drawn_B = (_drawn if narrows else _drawn_of_all)(warm_BV, key_B, sampler, warm_B)
            return jnp.where(is_greedy_B, token_B, drawn_B)

        token_B = jax.lax.cond(jnp.all(is_greedy_B), lambda: token_B, draw)
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    total_B = jnp.sum(jnp.exp(logits_BV - most_B1), axis=-1)
    chosen_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
    return token_B, (chosen_B1 - most_B1)[:, 0] - jnp.log(total_B)


def filter_logits(logits_BV: jax.Array, sampler: Sampler, seen_BV: jax.Array | None = None) -> jax.Array:
    """Returns logits after penalty and temperature, -1e30 for excluded tokens; greedy rows are only penalized."""
    logits_BV, warm_B = _warm(logits_BV, sampler, seen_BV)
    every_BV = _all_of(logits_BV)
    return _excluded(every_BV, *_kept(every_BV, sampler, warm_B))


def _warm(logits_BV: jax.Array, sampler: Sampler, seen_BV: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Logits after penalty and temperature (greedy rows: penalty alone), and whether each row is sampled, bool [B]."""
    logits_BV = _penalized(logits_BV, sampler, seen_BV)
    warm_B = jnp.ones(logits_BV.shape[:1], bool)
    if sampler.temperature is not None:
        warm_B &= ~_is_greedy(sampler.temperature)
        logits_BV = logits_BV / jnp.where(warm_B, sampler.temperature, 1)[:, None]
    return logits_BV, warm_B


# ---- Draws: of all tokens, or of the likeliest -----------------------------------------------------------------------


class _Candidates(NamedTuple):
    """Some tokens of each row: their logits, float32, and ids, int32 [B, C].

    All tokens with logits above `floor_B` are among them; `floor_B` is None if the candidates are all tokens. `total`
    returns the sum of exp(logit - largest logit) over all tokens.
    """

    logits_BC: jax.Array
    id_BC: jax.Array
    floor_B: jax.Array | None = None
    total: Callable[[], jax.Array] | None = None


def _all_of(logits_BV: jax.Array) -> _Candidates:
    return _Candidates(logits_BV, jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1))


def _drawn(logits_BV: jax.Array, key_B: jax.Array, sampler: Sampler, warm_B: jax.Array) -> jax.Array:
    """Like `_drawn_of_all`, but faster for rows whose filters keep only tokens of the likeliest blocks.

    Whether a row takes the faster path does not depend on the other rows.
    """
    B, V = logits_BV.shape
    uses = [] if sampler.top_k is None else [sampler.top_k < V]
    uses += [] if sampler.top_p is None else [sampler.top_p < 1]
    uses += [] if sampler.min_p is None else [sampler.min_p > 0]
    if V <= _BLOCK * _BLOCKS or not uses:
        return _drawn_of_all(logits_BV, key_B, sampler, warm_B)
    filters_B = functools.reduce(operator.or_, uses) & warm_B

    def of_few() -> tuple[jax.Array, jax.Array]:
        few_BC = _likeliest_blocks(logits_BV)
        floor_B = few_BC.floor_B
        assert floor_B is not None
        least_B, last_B = _kept(few_BC, sampler, warm_B)
        suffices_B = least_B > floor_B
        if sampler.top_k is not None:
            above_B = jnp.sum(few_BC.logits_BC > floor_B[:, None], axis=-1, dtype=jnp.int32)
            suffices_B &= (sampler.top_k >= V) | (above_B >= sampler.top_k)
        return _chosen(few_BC, key_B, V, least_B, last_B), suffices_B

    token_B, suffices_B = jax.lax.cond(
        jnp.any(filters_B), of_few, lambda: (jnp.zeros(B, jnp.int32), jnp.zeros(B, bool))
    )
    return jax.lax.cond(
        jnp.all(suffices_B | ~warm_B),
        lambda: token_B,
        lambda: jnp.where(suffices_B, token_B, _drawn_of_all(logits_BV, key_B, sampler, warm_B)),
    )


def _likeliest_blocks(logits_BV: jax.Array) -> _Candidates:
    """The tokens of the blocks with the largest logits."""
    B, V = logits_BV.shape
    padded_BV = jnp.pad(logits_BV, ((0, 0), (0, -V % _BLOCK)), constant_values=-jnp.inf) if V % _BLOCK else logits_BV
    block_Bnj = padded_BV.reshape(B, -1, _BLOCK)
    peak_Bm, at_Bm = jax.lax.top_k(jnp.max(block_Bnj, axis=-1), _BLOCKS)
    at_Bm1 = at_Bm[:, :, None]
    logits_BC = jnp.take_along_axis(block_Bnj, at_Bm1, axis=1, mode="clip").reshape(B, -1)
    id_BC = (at_Bm1 * _BLOCK + jnp.arange(_BLOCK, dtype=jnp.int32)).reshape(B, -1)
    # A minimum instead of the last element of `peak_Bm`: with that slice XLA sorts all peaks.
    floor_B = jnp.min(peak_Bm, axis=-1)
    most_B1 = jnp.max(peak_Bm, axis=-1, keepdims=True)
    return _Candidates(logits_BC, id_BC, floor_B, lambda: jnp.sum(jnp.exp(logits_BV - most_B1), axis=-1))


def _drawn_of_all(logits_BV: jax.Array, key_B: jax.Array, sampler: Sampler, warm_B: jax.Array) -> jax.Array:
    """Draws a token for each row, int32 [B], from the logits of `_warm` and the knobs, over all tokens."""
    every_BV = _all_of(logits_BV)
    return _chosen(every_BV, key_B, logits_BV.shape[-1], *_kept(every_BV, sampler, warm_B))


def _chosen(few_BC: _Candidates, key_B: jax.Array, V: int, least_B: jax.Array, last_B: jax.Array) -> jax.Array:
    """Draws from the softmax of the kept tokens: the largest sum of logit and noise, as `jax.random.categorical`."""
    id_BC = None if few_BC.floor_B is None else few_BC.id_BC
    chances_BC = _excluded(few_BC, least_B, last_B) + gumbel_noise(key_B, V, id_BC)
    return _first_of_most(chances_BC, few_BC.id_BC, V)


def _excluded(few_BC: _Candidates, least_B: jax.Array, last_B: jax.Array) -> jax.Array:
    """The logits, with -1e30 for tokens that are not kept."""
    logits_BC = few_BC.logits_BC
    is_least_BC = (logits_BC == least_B[:, None]) & (few_BC.id_BC <= last_B[:, None])
    return jnp.where((logits_BC > least_B[:, None]) | is_least_BC, logits_BC, _EXCLUDED)


def _is_greedy(temperature: jax.Array) -> jax.Array:
    return temperature < _LOWEST_TEMPERATURE


def _column(knob: jax.Array, logits_BV: jax.Array) -> jax.Array:
    """A knob, one value or one per row, as [B, 1]."""
    return jnp.broadcast_to(knob, logits_BV.shape[:1])[:, None]


def _penalized(logits_BV: jax.Array, sampler: Sampler, seen_BV: jax.Array | None) -> jax.Array:
    if sampler.repetition_penalty is None:
        return logits_BV
    assert seen_BV is not None, "a repetition penalty needs seen_BV"
    penalty = _column(sampler.repetition_penalty, logits_BV)
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def _likeliest(chances_BV: jax.Array) -> jax.Array:
    """The first token with the largest value, int32 [B]; an arbitrary token for a row that holds NaN."""
    V = chances_BV.shape[-1]
    return _first_of_most(chances_BV, jnp.arange(V, dtype=jnp.int32), V)


def _first_of_most(chances_BC: jax.Array, id_BC: jax.Array, V: int) -> jax.Array:
    """The least id of the candidates with the largest value, int32 [B].

    XLA's `argmax` compares one value at a time on a CPU; these two passes compare a register of them.
    """
    most_B1 = jnp.max(chances_BC, axis=-1, keepdims=True)
    return jnp.min(jnp.where(chances_BC == most_B1, id_BC, V - 1), axis=-1)


def _kept(few_BC: _Candidates, sampler: Sampler, warm_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What top-k, top-p and min-p keep in sampled rows: all tokens above a logit, and some of those equal to it.

    If the candidates are not all tokens, the result equals that over all tokens only if the least kept logit and the
    k-th largest logit of top-k lie above the candidates' floor.

    Returns:
        least_B, float32, the least logit that is kept, and last_B, int32, the last id that is kept with that logit.
    """
    logits_BC, id_BC, floor_B, total = few_BC
    B = logits_BC.shape[0]
    every = jnp.full(B, jnp.iinfo(jnp.int32).max, jnp.int32)
    kept = jnp.full(B, -jnp.inf, logits_BC.dtype), every
    if sampler.top_k is not None:
        top_k_B = jnp.broadcast_to(sampler.top_k, (B,))
        used_B = warm_B & (top_k_B < logits_BC.shape[1])
        kept = _where_used(used_B, kept, lambda: (kth_largest(logits_BC, top_k_B), every))
    if sampler.top_p is not None:
        top_p_B, least_B = jnp.broadcast_to(sampler.top_p, (B,)), kept[0]

        def of_nucleus() -> tuple[jax.Array, jax.Array]:
            if floor_B is None or total is None:
                return nucleus(logits_BC, id_BC, top_p_B, least_B)
            most_B1 = jnp.max(logits_BC, axis=-1, keepdims=True)
            weight_BC = jnp.where(logits_BC >= least_B[:, None], jnp.exp(logits_BC - most_B1), 0)
            total_B = jnp.where(least_B > floor_B, jnp.sum(weight_BC, axis=-1), total())
            return nucleus(logits_BC, id_BC, top_p_B, least_B, total_B)

        # A top-p of 1 keeps all tokens, even those whose probability is lost to rounding in the sum.
        kept = _where_used(warm_B & (top_p_B < 1), kept, of_nucleus)
    if sampler.min_p is not None:
        min_p_B, (least_B, last_B) = jnp.broadcast_to(sampler.min_p, (B,)), kept

        def raised() -> tuple[jax.Array, jax.Array]:
            lowest_B = jnp.max(logits_BC, axis=-1) + jnp.log(min_p_B)
            return jnp.maximum(lowest_B, least_B), jnp.where(lowest_B > least_B, every, last_B)

        kept = _where_used(warm_B & (min_p_B > 0), kept, raised)
    return kept


def _where_used(
    used_B: jax.Array, otherwise: tuple[jax.Array, jax.Array], compute: Callable[[], tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """`compute()` in rows that use it, `otherwise` in others; not executed if no row does. Arrays [B] cost no copy."""
    return jax.lax.cond(
        jnp.any(used_B),
        lambda: jax.tree.map(lambda new_B, old_B: jnp.where(used_B, new_B, old_B), compute(), otherwise),
        lambda: otherwise,
    )
