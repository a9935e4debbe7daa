"""Moves the bits of ggml's blocks to the planes of FORMAT.md and back: permutations, so both directions are lossless.

Every function takes and returns contiguous uint8 arrays [N, bytes] of N blocks, and works on words of up to 8 bytes.
Most of them exchange two bits of an index: the index of a field inside a byte with that of a word. They follow the
structures in ggml-common.h and the loops of `dequantize_row_*` in ggml-quants.c.
"""

from collections.abc import Sequence

import numpy as np

Bytes = np.ndarray
_NIBBLE = 0x0F0F0F0F0F0F0F0F


def _exchange(low: np.ndarray, high: np.ndarray, shift: int, mask: int) -> None:
    """Exchanges, in place, the fields of `low` under `mask << shift` with the fields of `high` under `mask`."""
    by, kept = low.dtype.type(shift), low.dtype.type(mask & (1 << 8 * low.dtype.itemsize) - 1)
    moved = (low >> by ^ high) & kept
    high ^= moved
    low ^= moved << by


def _exchange_inside(words: np.ndarray, swaps: Sequence[tuple[int, int]]) -> np.ndarray:
    """Permutes the bits of words: exchanges bits p and q of the index of each bit, for pairs (p, q), p > q."""
    size = 8 * words.dtype.itemsize
    for p, q in swaps:
        mask = sum(1 << place for place in range(size) if not place >> p & 1 and place >> q & 1)
        by = words.dtype.type(2**p - 2**q)
        moved = (words >> by ^ words) & words.dtype.type(mask)
        words = words ^ moved ^ moved << by
    return words


def _transpose_fields(words: np.ndarray, bits: int) -> None:
    """Transposes, in place, [R, S] words of bytes with S = 8 / bits fields: word s, field t becomes word t, field s."""
    slots = 8 // bits
    step = slots // 2
    while step:
        mask = sum((1 << bits) - 1 << bits * slot for slot in range(slots) if not slot & step)
        for low in (slot for slot in range(slots) if not slot & step):
            _exchange(words[:, low], words[:, low + step], bits * step, mask * 0x0101010101010101)
        step //= 2


def _deal_nibbles(words: np.ndarray, step: int) -> None:
    """Deals [R, S] words in place: of two words `step` apart, the first gets all low halves, the second all high."""
    for low in (slot for slot in range(words.shape[1]) if not slot & step):
        _exchange(words[:, low], words[:, low + step], 4, _NIBBLE)


def _swapped(words: np.ndarray) -> np.ndarray:
    """Transposes [R, A, B] to [R, B, A], column by column, because R is long and A and B are short."""
    made = np.empty((len(words), words.shape[2], words.shape[1]), words.dtype)
    for a in range(words.shape[1]):
        for b in range(words.shape[2]):
            made[:, b, a] = words[:, a, b]
    return made


def _words(x: Bytes, dtype: str, *shape: int) -> np.ndarray:
    """Copies blocks [N, bytes] to words [R, *shape]."""
    return x.copy().view(dtype).reshape(-1, *shape)


def _bytes(words: np.ndarray, count: int | None = None) -> Bytes:
    """Returns words as uint8 [N, bytes] of N = `count` blocks, or as many as the first axis is long."""
    return np.ascontiguousarray(words).reshape(count or len(words), -1).view(np.uint8)


def invert_sign(x: Bytes) -> Bytes:
    """Converts int8 in two's complement to codes that are larger by 128, or back."""
    return x ^ np.uint8(0x80)


def negate_half(x: Bytes) -> Bytes:
    """Negates a float16 of any bit pattern."""
    return x ^ np.array([0, 0x80], np.uint8)


def deal_nibbles_16(x: Bytes) -> Bytes:
    """Q4_K, Q5_K `qs`, low halves of 32 bytes a group and high halves the next, <-> 16 bytes for each group."""
    words = _words(x, "<u8", 4)
    _deal_nibbles(words, 2)
    return _bytes(words, len(x))


def split_nibbles(x: Bytes) -> tuple[Bytes, Bytes]:
    """Q2_K `scales`, 16 codes in low halves and 16 in high halves, -> two planes of 8 bytes."""
    words = _words(x, "<u8", 2)
    _deal_nibbles(words, 1)
    return _bytes(words[:, 0]), _bytes(words[:, 1])


def join_nibbles(low: Bytes, high: Bytes) -> Bytes:
    """Undoes `split_nibbles`."""
    return np.concatenate(split_nibbles(np.concatenate([low, high], 1)), 1)


def deal_q6_low(x: Bytes) -> Bytes:
    """Q6_K `ql` -> groups of 16. In 64 bytes the low halves are two runs of 32 codes, the high halves the next two."""
    words = _words(x, "<u8", 8)  # half a block; bits of the index: 32 bytes of 64, 16 of 32, 8 of 16
    _deal_nibbles(words, 1)
    return _bytes(_swapped(words.reshape(-1, 4, 2)), len(x))


def gather_q6_low(x: Bytes) -> Bytes:
    """Undoes `deal_q6_low`."""
    words = _swapped(_words(x, "<u8", 2, 4)).reshape(-1, 8)
    _deal_nibbles(words, 1)
    return _bytes(words, len(x))


def deal_quarters(x: Bytes) -> Bytes:
    """Q2_K, Q3_K `qs`, Q6_K `qh` -> groups of 16: field s of each of 32 bytes belongs to the sth run of 32 codes."""
    words = _words(x, "<u4", 4)  # half of 32 bytes
    _transpose_fields(words, 2)
    return _bytes(_swapped(words.reshape(-1, 2, 4)), len(x))


def gather_quarters(x: Bytes) -> Bytes:
    """Undoes `deal_quarters`."""
    words = _swapped(_words(x, "<u4", 4, 2)).reshape(-1, 4)
    _transpose_fields(words, 2)
    return _bytes(words, len(x))


def deal_bits_32(x: Bytes) -> Bytes:
    """Q5_K `qh` <-> groups of 32: bit i of each of 32 bytes belongs to the ith group."""
    words = _words(x, "<u4", 8)
    _transpose_fields(words, 1)
    return _bytes(words)


def deal_bits_16(x: Bytes) -> Bytes:
    """Q3_K `hmask` -> groups of 16: bit i of each of 32 bytes belongs to the ith run of 32 codes."""
    words = _words(x, "<u2", 8)
    _transpose_fields(words, 1)
    return _bytes(_swapped(words.reshape(-1, 2, 8)))


def gather_bits_16(x: Bytes) -> Bytes:
    """Undoes `deal_bits_16`."""
    words = _swapped(_words(x, "<u2", 8, 2)).reshape(-1, 8)
    _transpose_fields(words, 1)
    return _bytes(words, len(x))


# Permutations from neighbours in a word to runs in the slots of bytes, as pairs for `_exchange_inside`.
_FIFTH_BIT = ((4, 1), (3, 0), (2, 1), (1, 0))
_XS_LOW = ((4, 3), (3, 2))
_XS_HIGH = ((3, 1), (2, 1))


def deal_fifth_bits(x: Bytes) -> Bytes:
    """Q5_0, Q5_1 `qh`: bit k of 32 -> bit k // 4 of byte k % 4."""
    return _bytes(_exchange_inside(x.view("<u4"), _FIFTH_BIT))


def gather_fifth_bits(x: Bytes) -> Bytes:
    """Undoes `deal_fifth_bits`."""
    return _bytes(_exchange_inside(x.view("<u4"), _FIFTH_BIT[::-1]))


def deal_xs_low(x: Bytes) -> Bytes:
    """IQ4_XS `scales_l`: 8 neighbouring nibbles -> nibble k // 4 of byte k % 4."""
    return _bytes(_exchange_inside(x.view("<u4"), _XS_LOW))


def gather_xs_low(x: Bytes) -> Bytes:
    """Undoes `deal_xs_low`."""
    return _bytes(_exchange_inside(x.view("<u4"), _XS_LOW[::-1]))


def deal_xs_high(x: Bytes) -> Bytes:
    """IQ4_XS `scales_h`: 8 neighbouring fields of 2 bits -> field k // 2 of byte k % 2."""
    return _bytes(_exchange_inside(x.view("<u2"), _XS_HIGH))


def gather_xs_high(x: Bytes) -> Bytes:
    """Undoes `deal_xs_high`."""
    return _bytes(_exchange_inside(x.view("<u2"), _XS_HIGH[::-1]))


def split_k_scales(x: Bytes) -> tuple[Bytes, Bytes, Bytes, Bytes]:
    """Q4_K, Q5_K `scales` (`get_scale_min_k4`): 12 bytes -> both planes of 8 scales and of 8 minima, of 6 bits each."""
    scale, minimum, both = np.moveaxis(x.view("<u4"), 1, 0)
    low_scale = scale & 0x0F0F0F0F | (both & 0x0F0F0F0F) << np.uint32(4)
    low_minimum = minimum & 0x0F0F0F0F | both & 0xF0F0F0F0
    high = [_narrow(word >> np.uint32(4) & 0x0F0F0F0F) for word in (scale, minimum)]
    return _bytes(low_scale), _bytes(high[0]), _bytes(low_minimum), _bytes(high[1])


def join_k_scales(low_scale: Bytes, high_scale: Bytes, low_minimum: Bytes, high_minimum: Bytes) -> Bytes:
    """Undoes `split_k_scales`."""
    low_s, low_m = low_scale.view("<u4")[:, 0], low_minimum.view("<u4")[:, 0]
    high_s, high_m = (_widen(high.view("<u2")[:, 0]) << np.uint32(4) for high in (high_scale, high_minimum))
    both = low_s >> np.uint32(4) & 0x0F0F0F0F | low_m & 0xF0F0F0F0
    return _bytes(np.stack([low_s & 0x0F0F0F0F | high_s, low_m & 0x0F0F0F0F | high_m, both], 1))


def _narrow(nibbles: np.ndarray) -> np.ndarray:
    """uint32 [N], codes j and j + 4 as nibbles of byte j, -> uint16 [N], codes j, j + 2, j + 4, j + 6 in byte j."""
    low, high = nibbles & np.uint32(0xFFFF), nibbles >> np.uint32(16)
    first, second = low & 0x0303 | (low & 0x0C0C) << np.uint32(2), high & 0x0303 | (high & 0x0C0C) << np.uint32(2)
    return (first | second << np.uint32(2)).astype("<u2")


def _widen(fields: np.ndarray) -> np.ndarray:
    """Undoes `_narrow`."""
    wide = fields.astype("<u4")
    low, high = wide & 0x3333, wide >> np.uint32(2) & 0x3333
    low, high = (part & 0x0303 | part >> np.uint32(2) & 0x0C0C for part in (low, high))
    return low | high << np.uint32(16)


def deal_ternary(x: Bytes) -> Bytes:
    """TQ2_0 `qs` -> one group of 256: field s of each of 32 bytes belongs to the sth run of 32 codes of a half."""
    words = _words(x, "<u8", 8)
    for low in range(4):
        _exchange(words[:, low], words[:, low + 4], 2, 0x3333333333333333)
    return _bytes(_swap_middle(words))


def gather_ternary(x: Bytes) -> Bytes:
    """Undoes `deal_ternary`."""
    words = _swap_middle(_words(x, "<u8", 8))
    for low in range(4):
        _exchange(words[:, low], words[:, low + 4], 2, 0x3333333333333333)
    return _bytes(words)


def _swap_middle(words: np.ndarray) -> np.ndarray:
    """Exchanges the second and third of the four fields of every byte."""
    moved = (words >> np.uint64(2) ^ words) & np.uint64(0x0C0C0C0C0C0C0C0C)
    return words ^ moved ^ moved << np.uint64(2)


def ternary_of_powers(qs: Bytes, qh: Bytes) -> Bytes:
    """TQ1_0 `qs`, `qh`, five ternary digits per byte, most significant first, -> one group of 256 2-bit codes.

    A byte is the ternary number times 256 / 243, rounded up, so that the carry of a product with 3 is a digit.
    """
    codes = []
    for part, digits in ((qs[:, :32], 5), (qs[:, 32:], 5), (qh, 4)):
        powers = (3 ** np.arange(digits)).astype(np.uint8)[:, None]
        codes.append(
            ((part[:, None] * powers).astype(np.uint16) * np.uint16(3) >> 8).astype(np.uint8).reshape(len(qs), -1)
        )
    runs = np.concatenate(codes, 1).reshape(-1, 4, 64)
    return runs[:, 0] | runs[:, 1] << 2 | runs[:, 2] << 4 | runs[:, 3] << 6
