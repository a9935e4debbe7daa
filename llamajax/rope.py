"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): frequencies of rotation, and their scaling.

The reference is transformers' `modeling_rope_utils.py`, whose `ROPE_INIT_FUNCTIONS` tests compare with.
"""

import dataclasses
import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from llamajax.errors import LlamaJaxError
from llamajax.fields import check_choice, check_flag, check_number, check_whole, only_known
from llamajax.files import shortened

RopeKind = Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
# The fields of each kind beside its factor.
_OF_KIND: dict[str, tuple[str, ...]] = {
    "linear": (),
    "dynamic": ("original_context_length",),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_context_length"),
    "yarn": (
        *("original_context_length", "beta_fast", "beta_slow", "truncate"),
        *("attention_factor", "mscale", "mscale_all_dim"),
    ),
    "longrope": ("original_context_length", "attention_factor", "short_factors", "long_factors"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """The scaling of RoPE frequencies beyond the trained context.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). `dynamic` increases theta with
    the number of positions of a request beyond the original context (NTK-aware interpolation, of Reddit's bloc97 and
    emozilla). `llama3` leaves short wavelengths alone, divides long ones by `factor` and blends in between (Llama 3.1;
    reference: `apply_scaling` in meta-llama/llama-models). `yarn` does so along the pairs instead, and sharpens
    attention (Peng et al. 2023, arXiv:2309.00071). `longrope` divides each frequency by a separate number from one of
    two sets, by whether a request reaches beyond the original context (Ding et al. 2024, arXiv:2402.13753).

    Attributes:
        kind: one of the above. All fields except `factor` belong to some kinds only and keep their defaults in others.
        factor: the supported context over the original one; for `longrope` it determines the attention factor.
        low_freq_factor: `llama3`: frequencies with at most this many turns in the original context are divided.
        high_freq_factor: `llama3`: frequencies with at least this many turns are kept.
        original_context_length: the trained context length before scaling, in tokens.
        beta_fast: `yarn`: frequencies with at least this many turns in the original context are kept.
        beta_slow: `yarn`: frequencies with at most this many turns are divided.
        truncate: `yarn`: whether the bounds of the blended pairs are whole numbers (gpt-oss: not).
        attention_factor: `yarn`, `longrope`: factor of cosines and sines; None for the paper's value.
        mscale: `yarn`: if `mscale` and `mscale_all_dim` are both given (DeepSeek), the attention factor is
            (0.1 mscale log factor + 1) / (0.1 mscale_all_dim log factor + 1).
        mscale_all_dim: see `mscale`.
        short_factors: `longrope`: divisors within the original context, one for each pair.
        long_factors: `longrope`: divisors of requests that reach beyond it.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        """Refuse values that cannot describe a scaling."""
        check_choice("rope scaling kind", self.kind, get_args(RopeKind))
        check_number("rope scaling factor", self.factor, low=1.0)
        check_whole("original_context_length", self.original_context_length)
        check_number("low_freq_factor", self.low_freq_factor, low=0.0)
        check_number("high_freq_factor", self.high_freq_factor, low=0.0)
        check_number("beta_slow", self.beta_slow, low=0.0, above=True)
        check_number("beta_fast", self.beta_fast, low=self.beta_slow)
        check_flag("truncate", self.truncate)
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low=0.0, above=name == "attention_factor")
        self._check_kind()

    def _check_kind(self) -> None:
        """Refuse fields of other kinds, and values that this kind does not support."""
        of_kind = _OF_KIND[self.kind]
        for field in dataclasses.fields(self):
            known = field.name in of_kind or field.default is dataclasses.MISSING
            if not known and getattr(self, field.name) != field.default:
                raise LlamaJaxError(
                    f"{field.name} is {shortened(getattr(self, field.name))}: expected only fields of rope scaling "
                    f"{self.kind!r}, which has {', '.join(('factor', *of_kind))}"
                )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise LlamaJaxError(
                f"high_freq_factor is {self.high_freq_factor}: expected more than low_freq_factor, "
                f"{self.low_freq_factor}"
            )
        if self.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                factors = getattr(self, name)
                if not isinstance(factors, tuple) or not factors:
                    raise LlamaJaxError(f"{name} is {shortened(factors)}: expected numbers, one for each pair")
                for number in factors:
                    check_number(name, number, low=0.0, above=True)
            if self.original_context_length == 1:
                raise LlamaJaxError("original_context_length is 1: expected more, as longrope divides by its logarithm")

    def to_dict(self) -> dict[str, Any]:
        """Returns the kind's fields as plain JSON values; optional fields only if they have a value."""
        fields = {name: getattr(self, name) for name in ("kind", "factor", *_OF_KIND[self.kind])}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {name: value for name, value in plain.items() if value is not None}

    @classmethod
    def from_dict(cls, fields: Any) -> "RopeScaling":
        """Builds a scaling from `to_dict`'s form.

        Raises:
            LlamaJaxError: for a value that is no scaling, or lacks the original context length.
        """
        fields = only_known(cls, fields)
        if fields["kind"] in ("dynamic", "yarn", "longrope") and "original_context_length" not in fields:
            raise LlamaJaxError(f"missing key 'original_context_length': rope scaling {fields['kind']!r} needs it")
        for name in ("short_factors", "long_factors"):
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        return cls(**fields)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary position embedding: how fast each pair rotates.

    Attributes:
        theta: base of the frequencies.
        scaling: scaling of the frequencies, or None.
    """

    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self):
        """Refuse a base that gives no frequencies."""
        check_number("rope_theta", self.theta, low=1.0)

    def check(self, rotated: int) -> None:
        """Refuses a scaling that heads with `rotated` rotated coordinates cannot have."""
        scaling = self.scaling
        if scaling is None:
            return
        if scaling.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                count = len(getattr(scaling, name))
                if count != rotated // 2:
                    raise LlamaJaxError(f"{name} holds {count} numbers: expected {rotated // 2}, one for each pair")
        if scaling.kind == "dynamic" and rotated == 2:
            raise LlamaJaxError("rope scaling 'dynamic' has 2 rotated coordinates: expected at least two pairs, 4")
        if scaling.kind == "yarn" and self.theta == 1:
            raise LlamaJaxError("rope_theta is 1: expected more, as rope scaling 'yarn' divides by its logarithm")

    def choice(self, reach: int | None) -> Hashable:
        """Returns the variant of the frequencies that `reach` selects: keys of another variant cannot be reused.

        The result is None for a RoPE that does not depend on the reach.
        """
        scaling = self.scaling
        if scaling is None or scaling.kind not in ("dynamic", "longrope"):
            return None
        original = scaling.original_context_length
        reach = original if reach is None else max(reach, original)
        return reach if scaling.kind == "dynamic" else reach > original

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {"theta": self.theta, "scaling": self.scaling and self.scaling.to_dict()}

    @classmethod
    def from_dict(cls, fields: Any) -> "Rope":
        """Builds a RoPE from `to_dict`'s form."""
        fields = only_known(cls, fields)
        scaling: Mapping[str, Any] | None = fields.get("scaling")
        return cls(theta=fields["theta"], scaling=None if scaling is None else RopeScaling.from_dict(scaling))


def rope_frequencies(rope: Rope, rotated: int, reach: int | None = None) -> jax.Array:
    """Returns the angular frequency of each RoPE pair in radians per token, float32 [rotated/2].

    It is computed in float64, because rounding the exponent to float32 would change it by 1e-6. Unless `reach` is
    symbolic, it is a constant of the program.

    Args:
        rope: theta and scaling.
        rotated: the number of rotated coordinates of a head.
        reach: the number of positions of a request: slots of its cache, or tokens without a cache. `dynamic` and
            `longrope` use it to select frequencies once per request, as in llama.cpp; transformers selects at each
            call. In exported programs it may be a symbolic size.
    """
    with np.errstate(over="ignore", under="ignore"):
        if rope.choice(None) is None or isinstance(reach, int | None):
            return jnp.asarray(_frequencies(rope, rotated, reach), jnp.float32)
        return _frequencies_of_size(rope, rotated, reach)


def _frequencies_of_size(rope: Rope, rotated: int, reach: Any) -> jax.Array:
    """Computes `rope_frequencies` for a `reach` that is known only when the program is called."""
    scaling, size = rope.scaling, jnp.asarray(reach)
    assert scaling is not None
    original = scaling.original_context_length
    within = jnp.asarray(_frequencies(rope, rotated, original), jnp.float32)
    if scaling.kind == "longrope":
        return jnp.where(size > original, jnp.asarray(_frequencies(rope, rotated, original + 1), jnp.float32), within)
    beyond = jnp.maximum(size - original, 0).astype(jnp.float32) / original
    exponent = jnp.asarray(-2.0 * np.arange(rotated // 2) / (rotated - 2), jnp.float32)
    return within * (1 + scaling.factor * beyond) ** exponent


def _frequencies(rope: Rope, rotated: int, reach: int | None) -> np.ndarray:
    """Computes `rope_frequencies` in float64."""
    exponent, scaling = -2.0 * np.arange(rotated // 2) / rotated, rope.scaling
    frequency = np.float64(rope.theta) ** exponent
    if scaling is None:
        return frequency
    choice = rope.choice(reach)
    if scaling.kind == "linear":
        return frequency / scaling.factor
    if scaling.kind == "dynamic":
        assert isinstance(choice, int)
        beyond = choice / scaling.original_context_length - 1
        return (rope.theta * np.float64(1 + scaling.factor * beyond) ** (rotated / (rotated - 2))) ** exponent
    if scaling.kind == "longrope":
        return frequency / np.asarray(scaling.long_factors if choice else scaling.short_factors, np.float64)
    if scaling.kind == "yarn":
        keep = 1 - _ramp(scaling, rope.theta, rotated)
    else:
        # llama3: turns completed within the original context decide. Many turns: keep; few: slow down; between: blend.
        turns = scaling.original_context_length * frequency / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def _ramp(scaling: RopeScaling, theta: float, rotated: int) -> np.ndarray:
    """Returns, for YaRN, the fraction of each pair's frequency that is divided, from 0 to 1, float64 [rotated/2].

    The ramp extends between the pairs that turn `beta_fast` and `beta_slow` times within the original context, as in
    transformers' `find_correction_range` and `linear_ramp_factor`.
    """
    original, span = scaling.original_context_length / (2 * math.pi), 2 * math.log(theta)
    # Differences of logarithms, because the quotient may overflow for turns that a config may hold.
    low, high = (
        rotated * (math.log(original) - math.log(turns)) / span for turns in (scaling.beta_fast, scaling.beta_slow)
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(rotated // 2) - low) / (high - low), 0.0, 1.0)


def rope_attention_factor(rope: Rope) -> float:
    """Returns the factor of cosines and sines, for queries and keys; 1 except for YaRN and longrope.

    Longrope's factor is the same within and beyond the original context.
    """
    scaling = rope.scaling
    if scaling is None or scaling.kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    growth = math.log(scaling.factor)
    if scaling.kind == "longrope":
        return math.sqrt(1 + growth / math.log(scaling.original_context_length))
    if scaling.mscale and scaling.mscale_all_dim:
        return (0.1 * scaling.mscale * growth + 1) / (0.1 * scaling.mscale_all_dim * growth + 1)
    return 0.1 * growth + 1


def apply_rope(
    x_BTNH: jax.Array,
    position_BT: jax.Array,
    frequency: jax.Array,
    scale: jax.Array | float | None = None,
    factor: float = 1.0,
) -> jax.Array:
    """Rotates pair (i, i + R/2) of the first R coordinates of each head by position x frequency[i], and scales.

    Pairs are halves, not neighbours: the layout of Hugging Face checkpoints; others are permuted once, at load. Angles
    are float32, because bfloat16 cannot distinguish positions beyond 256.

    Args:
        x_BTNH: queries or keys.
        position_BT: positions of the tokens.
        frequency: radians per token, float32 [R/2].
        scale: factor of the result; a number, or [B, T, 1, 1].
        factor: additional factor of the rotated coordinates.
    """
    angle_BT1J = position_BT[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle_BT1J), jnp.sin(angle_BT1J)
    if factor != 1:
        cos, sin = cos * factor, sin * factor
    wide = x_BTNH.astype(jnp.float32)
    rotated = 2 * frequency.shape[0]
    low, high, *rest = jnp.split(wide, 2 if rotated == wide.shape[-1] else (rotated // 2, rotated), axis=-1)
    turned = jnp.concatenate([low * cos - high * sin, high * cos + low * sin, *rest], axis=-1)
    return (turned if scale is None else turned * scale).astype(x_BTNH.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Temperature:
    """Scales queries by their position: times 1 + beta log(1 + floor((position + offset) / length)).

    Reference: `_get_llama_4_attn_scale` of transformers' `modeling_ministral3.py` (offset 0), and `attn_scale` of
    `modeling_llama4.py` (offset 1; only of layers without RoPE).

    Attributes:
        beta: strength of the scaling.
        length: the number of positions before the first step.
        offset: added to a position.
        only_nope: whether only "nope" layers scale queries.
    """

    beta: float
    length: int
    offset: int = 0
    only_nope: bool = False

    def __post_init__(self):
        """Refuse values that cannot describe it."""
        check_number("temperature beta", self.beta, low=0.0)
        check_whole("temperature length", self.length)
        if self.offset not in (0, 1) or isinstance(self.offset, bool):
            raise LlamaJaxError(f"temperature offset is {shortened(self.offset)}: expected 0 or 1")
        check_flag("only_nope", self.only_nope)

    def factor(self, position_BT: jax.Array) -> jax.Array:
        """The factor of the queries, float32 [B, T]."""
        whole_BT = jnp.floor((position_BT + self.offset).astype(jnp.float32) / self.length)
        return 1 + self.beta * jnp.log(1 + whole_BT)
