"""Reads a packed weight from its arrays (quant/FORMAT.md), and converts its codes to 4-bit digits; needs only NumPy."""

import functools
import re

import numpy as np

# Bits of each plane, by the bits of a code.
_PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
# Schemes whose codes are indices of a table: the table of whole numbers, and their unit.
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), 0.5
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), 1.0
_CODE_BOOKS = {"ternary": ((-1, 0, 1, 2), 1.0), "mxfp4": _E2M1, "nvfp4": _E2M1, "iq4_nl": _IQ4_NL}
# The supported schemes, as a regular expression.
SCHEMES = "|".join(["u?int[2-8]", *_CODE_BOOKS])
_PARTS = re.compile(r"(scale\.|offset\.)?(planes\.[012]|scale)|zero|offset")


class PackedWeight:
    """A stored weight as [K, M], whatever its contraction axis: w = (value(code) - zero) * scale + offset.

    Attributes:
        shape: (K, M).
        group: g, elements of K that share a scale.
        zero: zero points [C, M], or an array that broadcasts to this shape, or None.
        has_offset: whether it has offsets.
    """

    def __init__(self, arrays, scheme, group, axis, of_planes):
        """Takes the arrays by the name of their part: `planes.0`, `scale`, `scale.planes.0`, ….

        Args:
            arrays: the arrays, whose names pass `known`.
            scheme: the scheme of the codes.
            group: g.
            axis: the contraction axis, from the end: 2 for arrays [K, M], 1 for [M, K].
            of_planes: the schemes of `scale` and `offset`, for those that are quantized too.
        """
        self._arrays = arrays if axis == 2 else {part: array.T for part, array in arrays.items()}
        self._scheme, self._of_planes, self.group = scheme, of_planes, group
        first = self._arrays["planes.0"]
        self.shape = first.shape[0] * 8 // _PLANES[bits_of(scheme)][0], first.shape[1]
        self.zero = self._arrays.get("zero")
        self.has_offset = any(part.startswith("offset") for part in arrays)

    @staticmethod
    def known(parts):
        """Whether all parts are supported here; outliers and order are not."""
        return all(map(_PARTS.fullmatch, parts))

    def codes(self):
        """Codes, uint8 [K, M]."""
        return self._codes("", self._scheme, self.group)

    def scale(self):
        """Scales, float32 [C, M]."""
        return self._plane("scale")

    def offset(self):
        """Offsets, float32 [C, M]."""
        return self._plane("offset")

    def _codes(self, prefix, scheme, group):
        """Codes [K, M] from planes [K * bits / 8, M]: slot i of byte j of a group holds its element j + i * bytes."""
        parts, low = [], 0
        for index, bits in enumerate(_PLANES[bits_of(scheme)]):
            plane = self._arrays[f"{prefix}planes.{index}"]
            bytes_CnM = plane.reshape(-1, group * bits // 8, plane.shape[1])
            slots = [bytes_CnM >> np.uint8(i) & np.uint8((1 << bits) - 1) for i in range(0, 8, bits)]
            parts.append(np.concatenate(slots, axis=1).reshape(-1, plane.shape[1]) << np.uint8(low))
            low += bits
        return functools.reduce(np.bitwise_or, parts)

    def _plane(self, part):
        """Reads scales or offsets, which are floats, 8-bit floats, or quantized with scales of their own."""
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
    """Bits of a code."""
    return (len(_CODE_BOOKS[scheme][0]) - 1).bit_length() if scheme in _CODE_BOOKS else int(scheme[-1])


def values_of(scheme):
    """The values of codes: whole numbers by code, int32, and their unit."""
    if scheme in _CODE_BOOKS:
        numbers, unit = _CODE_BOOKS[scheme]
        return np.array(numbers, np.int32), unit
    codes = np.arange(1 << bits_of(scheme), dtype=np.int32)
    return codes - (0 if scheme[0] == "u" else len(codes) // 2), 1.0


def digits_of(values):
    """Splits the whole numbers of codes into 4-bit digits, in which 8 usually stands for zero.

    Returns:
        The number that was subtracted from all values to make them fit, and for each digit: its factor, its nibbles by
        code, uint8, and the nibble that stands for zero (8, or for a low digit 0 if the values do not fit with 8).
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
    """Splits codes into 4-bit digits, whose zero points are the weight's: as `digits_of`, with None for the nibble."""
    codes = np.arange(1 << bits, dtype=np.uint8)
    return [(1 << shift, codes >> np.uint8(shift) & np.uint8(15), None) for shift in ((4, 0) if bits > 4 else (0,))]


def nibbles(codes):
    """Packs the low four bits of two neighbours into a byte, the first in its low four bits."""
    return codes[..., 0::2] & np.uint8(15) | codes[..., 1::2] << np.uint8(4)
