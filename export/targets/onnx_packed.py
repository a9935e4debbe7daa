"""A packed weight as its arrays say it (quant/FORMAT.md), and its codes as digits of 4 bits: NumPy alone."""

import functools
import re

import numpy as np

# Bits of each plane, by the bits of a code.
_PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}
# Codes that are no numbers by themselves: the whole numbers that they stand for, and the unit of these.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), 0.5
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), 1.0
_CODE_BOOKS = {"ternary": ((-1, 0, 1, 2), 1.0), "mxfp4": _E2M1, "nvfp4": _E2M1, "iq4_nl": _IQ4_NL}
# The schemes that are known here, as a regular expression.
SCHEMES = "|".join(["u?int[234568]", *_CODE_BOOKS])
_PARTS = re.compile(r"(scale\.|offset\.)?(planes\.[01]|scale)|zero|offset")


class PackedWeight:
    """A weight [K, M] at rest, whatever its contraction axis: w = (value(code) - zero) * scale + offset.

    Attributes:
        shape: (K, M).
        group: g, elements of K that share a scale.
        zero: [C, M], or one that broadcasts, or None.
        has_offset: whether it has offsets.
    """

    def __init__(self, arrays, scheme, group, axis, of_planes):
        """Takes the arrays by their part: `planes.0`, `scale`, `scale.planes.0`, ….

        Args:
            arrays: those of `known`.
            scheme: of the codes.
            group: g.
            axis: of the contraction, from the end: 2 for arrays [K, M], 1 for [M, K].
            of_planes: the schemes of the planes `scale` and `offset` that are in codes of their own.
        """
        self._arrays = arrays if axis == 2 else {part: array.T for part, array in arrays.items()}
        self._scheme, self._of_planes, self.group = scheme, of_planes, group
        first = self._arrays["planes.0"]
        self.shape = first.shape[0] * 8 // _PLANES[bits_of(scheme)][0], first.shape[1]
        self.zero = self._arrays.get("zero")
        self.has_offset = any(part.startswith("offset") for part in arrays)

    @staticmethod
    def known(parts):
        """Whether these are all that there is to a weight here: no outliers, no order."""
        return all(map(_PARTS.fullmatch, parts))

    def codes(self):
        """uint8 [K, M]."""
        return self._codes("", self._scheme, self.group)

    def scale(self):
        """float32 [C, M]."""
        return self._plane("scale")

    def offset(self):
        """float32 [C, M]."""
        return self._plane("offset")

    def _codes(self, prefix, scheme, group):
        """Codes [K, M] of planes [K * bits / 8, M]: slot i of byte j of a group holds its element j + i * bytes."""
        parts, low = [], 0
        for index, bits in enumerate(_PLANES[bits_of(scheme)]):
            plane = self._arrays[f"{prefix}planes.{index}"]
            bytes_CnM = plane.reshape(-1, group * bits // 8, plane.shape[1])
            slots = [bytes_CnM >> np.uint8(i) & np.uint8((1 << bits) - 1) for i in range(0, 8, bits)]
            parts.append(np.concatenate(slots, axis=1).reshape(-1, plane.shape[1]) << np.uint8(low))
            low += bits
        return functools.reduce(np.bitwise_or, parts)

    def _plane(self, part):
        """A plane of floats, of floats of 8 bits, or of codes with a scale of their own."""
        K, M = self.shape
        if part in self._arrays:
            plane = self._arrays[part]
            if plane.dtype == np.uint8:
                plane = (_e8m0 if self._scheme == "mxfp4" else _ue4m3)(plane.astype(np.int32))
            return np.broadcast_to(plane, (K // self.group, M)).astype(np.float32)
        scheme, scale = self._of_planes[part], self._arrays[f"{part}.scale"].astype(np.float32)
        group = K // self.group // scale.shape[0]
        values, unit = values_of(scheme)
        numbers = values[self._codes(f"{part}.", scheme, group)].astype(np.float32) * np.float32(unit)
        return numbers * np.repeat(scale, group, axis=0)


def _e8m0(codes):
    return np.where(codes == 255, np.nan, np.ldexp(1.0, codes - 127))


def _ue4m3(codes):
    exponent, mantissa = codes >> 3 & 15, codes & 7
    values = np.ldexp(mantissa + 8.0 * (exponent > 0), np.maximum(exponent, 1) - 10)
    return np.where(codes == 255, np.nan, np.where(codes & 127 == 127, 0, values))


def bits_of(scheme):
    """Of a code."""
    return (len(_CODE_BOOKS[scheme][0]) - 1).bit_length() if scheme in _CODE_BOOKS else int(scheme[-1])


def values_of(scheme):
    """What codes stand for: whole numbers by code, int32, and their unit."""
    if scheme in _CODE_BOOKS:
        numbers, unit = _CODE_BOOKS[scheme]
        return np.array(numbers, np.int32), unit
    codes = np.arange(1 << bits_of(scheme), dtype=np.int32)
    return codes - (0 if scheme[0] == "u" else len(codes) // 2), 1.0


def digits_of(values):
    """Whole numbers by code as digits of 4 bits, of which 8 stands for zero.

    Returns:
        What was subtracted of all of them to make them fit; and for each digit its factor, its nibbles by code, uint8,
        and which nibble stands for zero: 8, or where both digits then fit, 0.
    """
    low, high = int(values.min()), int(values.max())
    if high - low <= 15:
        shift = 0 if -8 <= low and high <= 7 else low + 8
        return shift, [(1, (values - shift + 8).astype(np.uint8), 8)]
    shift = 0 if -128 <= low and high <= 127 else low + 128
    zero = 8 if high - shift <= 119 else 0
    low_digits = (values - shift + zero) % 16
    high_digits = (values - shift + zero) // 16 + 8
    return shift, [(16, high_digits.astype(np.uint8), 8), (1, low_digits.astype(np.uint8), zero)]


def raw_digits(bits):
    """Codes as digits of 4 bits whose zero points are those of the weight: as `digits_of`, None for the nibble."""
    codes = np.arange(1 << bits, dtype=np.uint8)
    return [(1 << shift, codes >> np.uint8(shift) & np.uint8(15), None) for shift in ((4, 0) if bits > 4 else (0,))]


def nibbles(codes):
    """The low four bits of two neighbours in a byte, the first in its low four."""
    return codes[..., 0::2] & np.uint8(15) | codes[..., 1::2] << np.uint8(4)
