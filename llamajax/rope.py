"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): what turns how fast, and how that is stretched."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llamajax.errors import LlamaJaxError
from llamajax.fields import check_flag, check_number, check_whole, only_known
from llamajax.files import shortened


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3` leaves short
    wavelengths alone, divides long ones by `factor` and blends in between (Llama 3.1; reference: `apply_scaling` in
    meta-llama/llama-models).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_length: int = 8192

    def __post_init__(self):
        """Refuse values that cannot describe a scaling."""
        if self.kind not in ("linear", "llama3"):
            raise LlamaJaxError(
                f"rope scaling kind {shortened(self.kind)} is not supported: expected 'linear' or 'llama3'"
            )
        check_number("rope scaling factor", self.factor, low=1.0)
        check_number("low_freq_factor", self.low_freq_factor, low=0.0)
        check_number("high_freq_factor", self.high_freq_factor, low=0.0)
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise LlamaJaxError(
                f"high_freq_factor is {self.high_freq_factor}: expected more than low_freq_factor, "
                f"{self.low_freq_factor}"
            )
        check_whole("original_context_length", self.original_context_length)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Any) -> "RopeScaling":
        """Of `to_dict`'s form."""
        return cls(**only_known(cls, fields))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """How fast pairs turn.

    Attributes:
        theta: base of the frequencies.
        scaling: stretching of the frequencies, or None.
    """

    theta: float
    scaling: RopeScaling | None = None

    def __post_init__(self):
        """Refuse a base that gives no frequencies."""
        check_number("rope_theta", self.theta, low=1.0)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {"theta": self.theta, "scaling": self.scaling and self.scaling.to_dict()}

    @classmethod
    def from_dict(cls, fields: Any) -> "Rope":
        """Of `to_dict`'s form."""
        fields = only_known(cls, fields)
        scaling: Mapping[str, Any] | None = fields.get("scaling")
        return cls(theta=fields["theta"], scaling=None if scaling is None else RopeScaling.from_dict(scaling))


def rope_frequencies(rope: Rope, rotated: int, reach: int | None = None) -> jax.Array:
    """Angular frequency of each RoPE pair, radians a token, float32 [rotated/2].

    Args:
        rope: theta and scaling.
        rotated: coordinates of a head that turn.
        reach: the positions that a request may come to: slots of its cache, or tokens where there is none.
    """
    pair = jnp.arange(rotated // 2, dtype=jnp.float32)
    frequency = rope.theta ** (-2.0 * pair / rotated)
    scaling = rope.scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # llama3: turns completed within the original context decide. Many turns: keep; few: slow down; between: blend.
    turns = scaling.original_context_length * frequency / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return frequency * (keep + (1 - keep) / scaling.factor)


def rope_attention_factor(rope: Rope, reach: int | None = None) -> float:
    """By what cosines and sines are multiplied, queries and keys both; 1 but for YaRN and longrope."""
    return 1.0


def apply_rope(
    x_BTNH: jax.Array,
    position_BT: jax.Array,
    frequency: jax.Array,
    scale: jax.Array | float | None = None,
    factor: float = 1.0,
) -> jax.Array:
    """Rotates pair (i, i + R/2) of the first R coordinates of each head by position x frequency[i], and scales.

    Halves rather than neighbours: the layout of Hugging Face checkpoints; others are permuted once, at load. Angles in
    float32: in bfloat16 whole positions beyond 256 are no longer distinct.

    Args:
        x_BTNH: queries or keys.
        position_BT: of the tokens.
        frequency: radians a token, float32 [R/2].
        scale: what comes out is multiplied by; a number, or [B, T, 1, 1].
        factor: what rotated coordinates are multiplied by besides.
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
    """Queries grow with their position: times 1 + beta log(1 + floor((position + offset) / length)).

    Reference: `_get_llama_4_attn_scale` of transformers' `modeling_ministral3.py` (offset 0), and `attn_scale` of
    `modeling_llama4.py` (offset 1; only of layers without RoPE).

    Attributes:
        beta: how much.
        length: positions after which they grow first.
        offset: added to a position.
        only_nope: whether layers of other kinds than "nope" go without.
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
        """What queries are multiplied by, float32 [B, T]."""
        whole_BT = jnp.floor((position_BT + self.offset).astype(jnp.float32) / self.length)
        return 1 + self.beta * jnp.log1p(whole_BT)
