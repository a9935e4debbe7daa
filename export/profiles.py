"""The form of programs that a runtime needs, and the programs of a bundle."""

import dataclasses
from typing import Literal

from llamajax import LlamaJaxError

_FLOAT_OPERATIONS = frozenset(
    "abs add and broadcast_in_dim call compare concatenate constant convert cosine divide dot_general dynamic_slice "
    "dynamic_update_slice exponential floor func gather iota log logistic maximum minimum multiply negate not or pad "
    "power reduce reshape return round_nearest_even rsqrt select sine slice sort sqrt subtract tanh transpose".split()
)

_INTEGER_OPERATIONS = frozenset("bitcast_convert shift_left shift_right_arithmetic shift_right_logical xor".split())

# `sample` finds thresholds in loops, and its branches skip what no row uses. A weight whose layers have several types
# chooses one by a clamped index.
_LOOPS = frozenset({"case", "clamp", "while"})

# Additional operations that the layout of a CPU needs.
_OTHER_XLA = frozenset({"optimization_barrier", "remainder", "sign"})


@dataclasses.dataclass(frozen=True)
class Profile:
    """The form of programs that a runtime needs.

    Attributes:
        name: the key in `PROFILES`.
        layers: "scanned", one loop over stacked weights; or "unrolled", each layer's weights an argument of their own.
        arithmetic: the way of unpacking codes, an argument of `quant.unpack`.
        operations: the permitted operations, without their dialect.
        backend: the backend whose layout the programs' weights have: the program `prepare` converts the packed weights
            to it once. None: programs take the packed weights.
    """

    name: str
    layers: Literal["scanned", "unrolled"]
    arithmetic: Literal["integer", "float"]
    operations: frozenset[str]
    backend: str | None = None


PROFILES = {
    profile.name: profile
    for profile in (
        Profile("scanned", "scanned", "integer", _FLOAT_OPERATIONS | _INTEGER_OPERATIONS | _LOOPS),
        Profile("unrolled", "unrolled", "integer", _FLOAT_OPERATIONS | _INTEGER_OPERATIONS),
        Profile("float", "unrolled", "float", _FLOAT_OPERATIONS),
        Profile(
            "cpu",
            "scanned",
            "integer",
            _FLOAT_OPERATIONS | _INTEGER_OPERATIONS | _LOOPS | _OTHER_XLA,
            "cpu",
        ),
    )
}

# Programs that `lower` can make in addition to prefill and decode.
OPTIONAL_PROGRAMS = ("sample", "score", "embed", "verify")


@dataclasses.dataclass(frozen=True)
class Spec:
    """The programs to make and their sizes.

    Attributes:
        batch: B, rows.
        slots: S, slots of the cache.
        cache_dtype: dtype of keys and values, a float type.
        buckets: T of each prefill program.
        programs: additional programs, from `OPTIONAL_PROGRAMS`.
        drafts: k, drafted tokens that `verify` checks.
        profile: the form of the programs, a value of `PROFILES`.
    """

    batch: int = 1
    slots: int = 512
    cache_dtype: str = "float32"
    buckets: tuple[int, ...] = (16, 64, 256)
    programs: tuple[str, ...] = ()
    drafts: int = 4
    profile: Profile = PROFILES["scanned"]

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            LlamaJaxError: for a value out of range.
        """
        if self.batch < 1 or self.slots < 1 or self.drafts < 1:
            raise LlamaJaxError(f"batch {self.batch}, slots {self.slots}, drafts {self.drafts}: expected at least 1")
        if self.cache_dtype not in ("float32", "bfloat16", "float16"):
            raise LlamaJaxError(f"cache_dtype {self.cache_dtype!r}: expected float32, bfloat16 or float16 to export")
        if list(self.buckets) != sorted(set(self.buckets)) or not self.buckets or self.buckets[0] < 1:
            raise LlamaJaxError(f"buckets {self.buckets}: expected increasing numbers of tokens, at least 1")
        if self.buckets[-1] > self.slots or self.drafts >= self.slots:
            raise LlamaJaxError(
                f"bucket {self.buckets[-1]}, drafts {self.drafts}: expected no more than the {self.slots} slots"
            )
        if unknown := set(self.programs) - set(OPTIONAL_PROGRAMS):
            raise LlamaJaxError(f"program {sorted(unknown)[0]!r}: expected one of {', '.join(OPTIONAL_PROGRAMS)}")
