"""RoPE in GGUF files: keys, and tensors of numbers that each frequency is divided by.

llama.cpp's converter writes Llama 3.1's scaling as a tensor (`generate_extra_tensors` of `LlamaModel`,
conversion/llama.py), and leaves out the four numbers that it follows from. They are found again here, and must give the
same divisors.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llamajax.config import Config, RopeScaling
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Keys
from llamajax.files import shortened

_CLOSE = 2e-6  # relative; the converter computes in float32
FACTORS = "rope_freqs.weight"
# Tensors that hold numbers of RoPE, and no weights.
TENSORS = (FACTORS,)


def read_rope(keys: Keys) -> dict[str, Any]:
    """Fields of `Config` that keys say: theta, and a factor by which all frequencies are divided, or nothing.

    Raises:
        LlamaJaxError: for a scaling that is not known.
    """
    ours: dict[str, Any] = {"rope_theta": keys.take("rope.freq_base")} if "rope.freq_base" in keys else {}
    kind = keys.take("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise LlamaJaxError(
            f"{keys.source}: {keys.prefix}rope.scaling.type is {shortened(kind)}, which is not supported: expected "
            "'none' or 'linear'; Llama 3.1's comes as the tensor rope_freqs.weight"
        )
    if kind == "linear" and factor not in (0, 1):
        ours["rope_scaling"] = {"kind": "linear", "factor": factor}
    return ours


def read_tensors(path: Any, config: Config, keys: Keys, tensors: Mapping[str, np.ndarray]) -> Config:
    """A config with what the file's tensors of `TENSORS` say, float32 each."""
    if FACTORS in tensors:
        original = keys.take("rope.scaling.original_context_length", None)
        config = with_factors(path, config, tensors[FACTORS], original)
    return config


def write_rope(config: Config) -> dict[str, Any]:
    """The keys that say a config's RoPE."""
    said: dict[str, Any] = {"rope.freq_base": float(config.rope_theta)}
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        said |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    elif scaling is not None:  # by the tensor; without effect in llama.cpp, but this makes it certain what made that
        said["rope.scaling.original_context_length"] = scaling.original_context_length
    return said


def write_tensors(config: Config) -> dict[str, np.ndarray]:
    """The tensors that say a config's RoPE, float32."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return {}
    return {FACTORS: divisors_of(config, config.rope_scaling).astype(np.float32)}


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
