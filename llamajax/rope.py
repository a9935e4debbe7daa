"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864): what turns how fast, and how that is stretched."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from llamajax.errors import LlamaJaxError
from llamajax.fields import check_number, check_whole, only_known
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
