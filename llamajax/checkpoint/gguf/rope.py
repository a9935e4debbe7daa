"""RoPE scaling that a GGUF file holds as a tensor: by what each frequency is divided.

llama.cpp's converter writes Llama 3.1's scaling so (`generate_extra_tensors` of `LlamaModel`, convert_hf_to_gguf.py),
and leaves out the four numbers that it follows from. They are found again here, and must give the same divisors.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from llamajax.config import Config, RopeScaling
from llamajax.errors import LlamaJaxError
from llamajax.files import shortened

_CLOSE = 2e-6  # relative; the converter computes in float32


def with_factors(path: Any, config: Config, divisors: np.ndarray, original: Any = None) -> Config:
    """A config whose RoPE frequencies are divided by the numbers of a tensor.

    Args:
        path: for messages.
        config: without that scaling.
        divisors: float32 [H/2].
        original: the original context length, if the metadata say one.

    Raises:
        LlamaJaxError: for divisors that Llama 3.1's scaling does not give, or that come beside another scaling.
    """
    name = f"{path}: rope_freqs.weight"
    if divisors.shape != (config.head_size // 2,):
        raise LlamaJaxError(f"{name} has shape {divisors.shape}: expected {(config.head_size // 2,)}, half a head")
    divisors = divisors.astype(np.float64)
    if not np.isfinite(divisors).all() or (divisors <= 0).any():
        raise LlamaJaxError(f"{name} holds {shortened(divisors.tolist())}: expected finite numbers above 0")
    if (divisors == 1).all():
        return config
    if config.rope_scaling is not None:
        raise LlamaJaxError(f"{name} comes beside RoPE scaling {config.rope_scaling.kind!r}: expected one of them")
    for scaling in _candidates(config, divisors, original):
        if np.allclose(divisors_of(config, scaling), divisors, rtol=_CLOSE, atol=0):
            return dataclasses.replace(config, rope_scaling=scaling)
    raise LlamaJaxError(
        f"{name} holds {shortened(divisors.tolist())}: expected the divisors of Llama 3.1's RoPE scaling: another "
        "scaling is not supported"
    )


def _turns(config: Config) -> np.ndarray:
    """The reciprocal wavelengths, turns a token, [H/2]."""
    pair = np.arange(config.head_size // 2, dtype=np.float64)
    return config.rope_theta ** (-2 * pair / config.head_size) / (2 * math.pi)


def divisors_of(config: Config, scaling: RopeScaling) -> np.ndarray:
    """What frequencies are divided by, [H/2]: the arithmetic of `model.rope_frequencies`."""
    turns = scaling.original_context_length * _turns(config)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return 1 / (keep + (1 - keep) / scaling.factor)


def _candidates(config: Config, divisors: np.ndarray, original: Any) -> list[RopeScaling]:
    """Scalings that may have made the divisors, published numbers first.

    Between the two bounds 1 / divisor is a line in the wavelength's reciprocal. Lengths and the two factors matter by
    their ratios only, so that one of the three is free.
    """
    factor = float(divisors.max())
    if factor <= 1:
        return []
    found = []

    def add(length: float, low: float, high: float) -> None:
        if 1 <= round(length) <= 1 << 27 and 0 <= low < high < math.inf:
            found.append(
                RopeScaling(
                    kind="llama3",
                    factor=factor,
                    low_freq_factor=low,
                    high_freq_factor=high,
                    original_context_length=round(length),
                )
            )

    lengths = [8192, *(1 << bits for bits in range(8, 21)), config.context_length]
    for length in (original, *lengths) if isinstance(original, int) and not isinstance(original, bool) else lengths:
        add(length, 1.0, 4.0)
    keep = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (keep > 1e-6) & (keep < 1 - 1e-6)
    if between.sum() > 1:
        slope, start = np.polyfit(_turns(config)[between], keep[between], 1)
        low, high = -start / slope, (1 - start) / slope  # turns a token at which nothing, and all, is kept
        if 0 < low < high:
            add(1 / low, 1.0, float(high / low))
            add(8192, float(low * 8192), float(high * 8192))
    return found
