"""Schemes: the values that codes of a quantized weight stand for, rounding to codes, code books and scale codes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from quant.packing import PLANE_BITS

# NormalFloat: means of 16 equally probable slices of a normal distribution, scaled to [-1, 1], with an exact zero
# (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, appendix E).
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# E2M1: one sign bit, two of exponent, one of mantissa (OCP Microscaling Formats v1.0, 2023).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# `kvalues_iq4nl` of ggml (ggml-common.h), in units of the scale.
IQ4_NL = (
    *(-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0),
    *(1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0),
)
# The polynomial of least largest error through them, 0.434, lowest power first: rounded it is their values.
IQ4_NL_POLYNOMIAL = (-126.567, 24.1738, -1.37193, 0.0310864, 0.00158604)
_CODEBOOKS = {"nf4": NF4, "mxfp4": E2M1, "nvfp4": E2M1, "iq4_nl": IQ4_NL}
# UE4M3: four bits of exponent and three of mantissa, no sign; 448 is the largest.
_E4M3_LARGEST, _E4M3_LEAST_EXPONENT = 448.0, -6


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Defines the value of a code, before zero point, scale and offset. Hashable: a static field under jit.

    | kind | bits | value of a code |
    |---|---|---|
    | int | 2 to 8 | code - 2**(bits - 1): signed, symmetric |
    | uint | 2 to 8 | code: asymmetric, by a zero point or an offset per group |
    | ternary | 2 | code - 1: -1, 0 or 1 |
    | nf4 | 4 | NF4[code] |
    | mxfp4 | 4 | E2M1[code]; the scales are powers of two, stored as their exponents |
    | nvfp4 | 4 | E2M1[code]; the scales are floats of 8 bits, UE4M3, or floats as elsewhere |
    | iq4_nl | 4 | IQ4_NL[code] |
    """

    kind: str
    bits: int

    def __post_init__(self) -> None:
        """Checks kind and bits.

        Raises:
            ValueError: for a pair that is not in the table.
        """
        allowed = {"int": PLANE_BITS, "uint": PLANE_BITS, "ternary": (2,)} | dict.fromkeys(_CODEBOOKS, (4,))
        if self.bits not in allowed.get(self.kind, ()):
            raise ValueError(f"no scheme {self.kind!r} with {self.bits} bits: expected one of {', '.join(SCHEMES)}")

    @classmethod
    def named(cls, name: str) -> "Scheme":
        """Returns the scheme called `int4`, `uint4`, `nf4`, `mxfp4`, `ternary`, ….

        Raises:
            ValueError: for an unknown name.
        """
        if name not in SCHEMES:
            raise ValueError(f"no scheme {name!r}: expected one of {', '.join(SCHEMES)}")
        return SCHEMES[name]

    @property
    def name(self) -> str:
        """Name of the scheme in recipes and checkpoints."""
        return f"{self.kind}{self.bits}" if self.kind in ("int", "uint") else self.kind

    @property
    def codebook(self) -> tuple[float, ...] | None:
        """The value of each code for kinds whose values are not equally spaced, else None."""
        return _CODEBOOKS.get(self.kind)

    @property
    def scale_code(self) -> str | None:
        """Format of one-byte scales: "e8m0" (mxfp4) or "ue4m3" (nvfp4); None if scales are floats."""
        return {"mxfp4": "e8m0", "nvfp4": "ue4m3"}.get(self.kind)

    @property
    def signed_scales(self) -> bool:
        """Whether there are no zero points, and a scale has the sign of its group's largest weight."""
        return self.kind in ("int", "iq4_nl")

    @property
    def bias(self) -> int:
        """The code whose value is zero, for kinds whose values are equally spaced."""
        return {"int": 2 ** (self.bits - 1), "ternary": 1}.get(self.kind, 0)

    @property
    def max_code(self) -> int:
        """The largest code that a quantizer writes."""
        return 2 if self.kind == "ternary" else 2**self.bits - 1

    def decode(self, codes: jax.Array) -> jax.Array:
        """Returns the values of uint8 codes, float32. Ternary code 3, which is never written, means 2, as in ggml."""
        if self.codebook is None:
            return codes.astype(jnp.float32) - self.bias
        if self.codebook == E2M1:
            return _e2m1_values(codes.astype(jnp.float32))
        if self.kind == "iq4_nl":
            return jnp.floor(polynomial(codes.astype(jnp.float32), IQ4_NL_POLYNOMIAL) + 0.5)
        # 15 selects replace a gather: they vectorise, fuse and shard like any elementwise operation.
        value = jnp.full(codes.shape, self.codebook[0], jnp.float32)
        for number, entry in enumerate(self.codebook[1:], start=1):
            value = jnp.where(codes == number, entry, value)
        return value

    def encode(self, scaled: jax.Array) -> jax.Array:
        """Returns the nearest codes of `weight / scale` (plus the zero point, for uint): uint8 of the same shape.

        Values beyond the last code get the last code. Halves go to even codes, or as the code book says: NF4 and
        IQ4_NL to the lower value, E2M1 to the one nearer to 0.
        """
        if self.kind in ("nf4", "iq4_nl"):
            return _rank(scaled, _CODEBOOKS[self.kind])
        if self.codebook == E2M1:
            magnitude = _rank(jnp.abs(scaled), E2M1[:8])
            return jnp.where((scaled < 0) & (magnitude > 0), magnitude + 8, magnitude)
        return jnp.clip(jnp.round(scaled) + self.bias, 0, self.max_code).astype(jnp.uint8)

    def round(self, scaled: jax.Array) -> jax.Array:
        """The value of `encode`'s code, in float32 all the way: on a CPU that is several times as fast."""
        if self.kind in ("nf4", "iq4_nl"):
            return _nearest(scaled, _CODEBOOKS[self.kind])
        if self.codebook == E2M1:
            return jnp.copysign(_nearest(jnp.abs(scaled), E2M1[:8]), scaled)
        return jnp.clip(jnp.round(scaled), -self.bias, self.max_code - self.bias)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnyBits(Scheme):
    """An int or uint scheme whose number of bits is data under jit: one program serves them all.

    Attributes:
        kind: int or uint.
        bits: int32 scalar.
    """

    kind: str = dataclasses.field(metadata={"static": True})
    bits: jax.Array  # type: ignore[assignment]  # an int in `Scheme`

    def __post_init__(self) -> None:
        """Checks nothing: `of` takes a valid scheme."""

    @classmethod
    def of(cls, scheme: Scheme) -> "AnyBits":
        """Returns the same scheme with its bits as data."""
        return cls(scheme.kind, jnp.int32(scheme.bits))

    @property
    def bias(self) -> jax.Array:  # type: ignore[override]
        """See `Scheme.bias`; float32."""
        codes = self._codes
        return codes / 2 if self.kind == "int" else jnp.zeros_like(codes)

    @property
    def max_code(self) -> jax.Array:  # type: ignore[override]
        """See `Scheme.max_code`; float32."""
        return self._codes - 1

    @property
    def _codes(self) -> jax.Array:
        return jnp.left_shift(jnp.int32(1), self.bits).astype(jnp.float32)


def _rank(x: jax.Array, ascending: tuple[float, ...]) -> jax.Array:
    """Returns the index of the nearest of ascending values, the lower one at a tie: the number of midpoints below x."""
    midpoints = [(low + high) / 2 for low, high in zip(ascending, ascending[1:], strict=False)]
    return functools.reduce(jnp.add, ((x > middle).astype(jnp.uint8) for middle in midpoints))


def _nearest(x: jax.Array, ascending: tuple[float, ...]) -> jax.Array:
    """Returns the nearest of ascending values, the lower one at a tie."""
    nearest = jnp.full_like(x, ascending[0])
    for low, high in zip(ascending, ascending[1:], strict=False):
        nearest = jnp.where(x > (low + high) / 2, high, nearest)
    return nearest


SCHEMES: dict[str, Scheme] = {
    **{f"int{bits}": Scheme("int", bits) for bits in PLANE_BITS},
    **{f"uint{bits}": Scheme("uint", bits) for bits in PLANE_BITS},
    **{kind: Scheme(kind, 4) for kind in _CODEBOOKS},
    "ternary": Scheme("ternary", 2),
}


def polynomial(x: jax.Array, factors: tuple[float, ...]) -> jax.Array:
    """Evaluates the polynomial with these coefficients, lowest power first, in float32."""
    value = jnp.full_like(x, factors[-1])
    for factor in factors[-2::-1]:
        value = value * x + factor
    return value


def _e2m1_values(code: jax.Array) -> jax.Array:
    """Returns the E2M1 values of codes 0 to 15, float32. Twice the magnitude grows by 1, by 2 and by 4 per code."""
    negative = code >= 8
    size = jnp.where(negative, code - 8, code)
    size = jnp.maximum(size, jnp.maximum(2 * size - 4, 4 * size - 16)) * 0.5
    return jnp.where(negative, -size, size)


def exponent_values(exponents: jax.Array) -> jax.Array:
    """Decodes E8M0: uint8 e -> 2**(e - 127) in float32, NaN for 255 (OCP Microscaling Formats v1.0, 2023).

    It builds the float from its bits, because `exp2` is not exact on every backend. 2**-127 is subnormal: XLA may flush
    it to zero.
    """
    bits = jnp.where(exponents == 0, 0x0040_0000, exponents.astype(jnp.uint32) << 23)
    return jnp.where(exponents == 255, jnp.nan, jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32))


def e4m3_values(codes: jax.Array) -> jax.Array:
    """Decodes UE4M3: uint8 -> float32, as ggml without its factor 1/2: 127 is 0, 255 NaN; else bit 7 is ignored.

    The seven low bits, shifted left by 7, are a float16 of the value times 2**-8; it is exact for subnormals too.
    """
    low = jnp.where((codes & 127) == 127, 0, codes & 127).astype(jnp.uint16)
    value = jax.lax.bitcast_convert_type(low << np.uint16(7), jnp.float16).astype(jnp.float32) * 2.0**8
    return jnp.where(codes == 255, jnp.nan, value)


def e4m3_codes(values: jax.Array) -> jax.Array:
    """Rounds floats >= 0 to UE4M3: uint8, halves to even; larger ones become 448, those not finite 255.

    Values that are not 0 become at least the smallest, 2**-9.
    """
    limited = jnp.minimum(values, _E4M3_LARGEST)
    _, exponent = jnp.frexp(limited)  # values = m * 2**exponent with m in [1/2, 1)
    least = jnp.maximum(exponent - 1, _E4M3_LEAST_EXPONENT)
    # The mantissa with its leading bit, in steps of the binade, 0 to 16; 16 is the first of the next binade.
    steps = jnp.round(jnp.ldexp(limited, 3 - least)).astype(jnp.int32)
    code = (least - _E4M3_LEAST_EXPONENT) * 8 + steps
    code = jnp.where(values > 0, jnp.maximum(code, 1), 0)
    return jnp.where(jnp.isfinite(values), code, 255).astype(jnp.uint8)
