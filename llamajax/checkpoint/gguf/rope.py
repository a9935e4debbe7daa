"""Reads and writes RoPE in GGUF files: metadata keys, and tensors with the divisor of each frequency.

Meanings and defaults are those of llama.cpp: `load_hparams` in src/llama-model.cpp, and the constructor of
`llama_context` for YaRN's attention factor. llama.cpp has no dynamic NTK, and only YaRN whose range is truncated to
whole pairs. Its converter writes the scaling of Llama 3.1 as a tensor (`generate_extra_tensors` of `LlamaModel`,
conversion/llama.py), without the four parameters that define it. They are reconstructed here, and must give the same
divisors.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from llamajax.config import Config, RopeScaling
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Keys
from llamajax.families.gguf import scale
from llamajax.fields import check_whole
from llamajax.files import shortened
from llamajax.rope import Rope, rope_attention_factor

_CLOSE = 2e-6  # relative; the converter computes in float32
FACTORS = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
# Tensors that hold RoPE divisors, not weights.
TENSORS = (FACTORS, _SHORT, _LONG)
_ORIGINAL = "rope.scaling.original_context_length"
_ATTENTION = "rope.scaling.attn_factor"


def read_rope(keys: Keys, tensors: Collection[str]) -> dict[str, Any]:
    """Reads fields of `Config` from keys: theta, and the scaling unless it is stored in tensors.

    Args:
        keys: the file's keys.
        tensors: names of the file's tensors.

    Raises:
        LlamaJaxError: for an unsupported scaling.
    """
    ours: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base")} if "rope.freq_base" in keys else {}
    kind = keys.take("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0)) or 1.0
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise LlamaJaxError(
            f"{keys.source}: {keys.prefix}rope.scaling.type is {shortened(kind)}, which is not supported: expected "
            f"none, linear, yarn or longrope; Llama 3.1's comes as the tensor {FACTORS}"
        )
    if kind == "yarn":
        ours["rope_scaling"] = _yarn(keys, factor)
    elif kind == "longrope" or _SHORT in tensors or _LONG in tensors:
        keys.only("rope.scaling.factor", 0, 1, 0.0, 1.0)
        keys.only("rope.scale_linear", 0, 1, 0.0, 1.0)
        keys.number(_ATTENTION, 1.0)  # used by `read_tensors`
    elif kind == "linear" and factor != 1:
        ours["rope_scaling"] = {"kind": "linear", "factor": factor}
    return ours


def _yarn(keys: Keys, factor: float) -> dict[str, Any]:
    """Reads YaRN's parameters.

    llama.cpp multiplies by the paper's attention factor times `attn_factor`; it ignores `yarn_attn_factor`. For most
    architectures it also ignores the two betas and uses the paper's instead, for which the model was not made.
    """
    keys.only("rope.scaling.yarn_ext_factor", 1, 1.0)
    scaling: dict[str, Any] = {
        "kind": "yarn",
        "factor": factor,
        "original_context_length": keys.take(_ORIGINAL, keys.take("context_length")),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    all_dim = scale(keys, "rope.scaling.yarn_log_multiplier") or 0.0
    if all_dim:
        scaling |= {"mscale": 1.0, "mscale_all_dim": all_dim}
    times = keys.number(_ATTENTION, 1.0)
    if times != 1 and factor > 1:
        growth = 0.1 * math.log(factor)
        scaling["attention_factor"] = times * (growth + 1) / (all_dim * growth + 1)
    elif times != 1:
        scaling["attention_factor"] = times
    return scaling


def read_tensors(path: Any, config: Config, keys: Keys, tensors: Mapping[str, np.ndarray]) -> Config:
    """Returns the config with the scaling that the file's tensors of `TENSORS` define, float32 each.

    Raises:
        LlamaJaxError: if tensors fit no scaling, or the tensors of a scaling are missing.
    """
    if keys.peek("rope.scaling.type") == "longrope" or _SHORT in tensors or _LONG in tensors:
        return _with_longrope(path, config, keys, tensors)
    if FACTORS in tensors:
        config = with_factors(path, config, tensors[FACTORS], keys.take(_ORIGINAL, None))
    return config


def _with_longrope(path: Any, config: Config, keys: Keys, tensors: Mapping[str, np.ndarray]) -> Config:
    """Returns the config with longrope: frequencies are divided by one of two tensors, by the context's length."""
    for name in (_SHORT, _LONG):
        if name not in tensors:
            raise LlamaJaxError(f"{path}: tensor {name!r} is missing: longrope needs it")
    if config.rope_scaling is not None or FACTORS in tensors:
        raise LlamaJaxError(f"{path}: {_SHORT} and another RoPE scaling are given: expected one of them")
    short, long = (_checked(path, name, config, tensors[name]) for name in (_SHORT, _LONG))
    original = keys.take(_ORIGINAL, config.context_length)
    check_whole(f"{path}: {keys.prefix}{_ORIGINAL}", original)
    try:
        scaling = RopeScaling(
            kind="longrope",
            factor=max(1.0, config.context_length / original),
            original_context_length=original,
            short_factors=tuple(short.tolist()),
            long_factors=tuple(long.tolist()),
        )
        times = keys.number(_ATTENTION, 1.0)
        if not math.isclose(times, rope_attention_factor(Rope(theta=1.0, scaling=scaling)), rel_tol=_CLOSE):
            scaling = dataclasses.replace(scaling, attention_factor=times)
    except LlamaJaxError as error:
        raise LlamaJaxError(f"{path}: {error}") from None
    return dataclasses.replace(config, rope_scaling=scaling)


def write_rope(config: Config) -> dict[str, Any]:
    """Returns the keys that describe a config's RoPE.

    Raises:
        LlamaJaxError: for a scaling that llama.cpp does not support.
    """
    said: dict[str, Any] = {"rope.freq_base": float(config.rope_theta)}
    scaling = config.rope_scaling
    if scaling is None:
        return said
    if scaling.kind == "dynamic" or not scaling.truncate:
        what = "dynamic NTK" if scaling.kind == "dynamic" else "YaRN without truncation"
        raise LlamaJaxError(f"rope_scaling is {what}, for which GGUF has no key: expected another scaling")
    factor = rope_attention_factor(Rope(theta=config.rope_theta, scaling=scaling))
    if scaling.kind == "linear":
        return said | {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    # For Llama 3.1's scaling, which is stored as a tensor, llama.cpp ignores this key; `_candidates` tries it first.
    said[_ORIGINAL] = scaling.original_context_length
    if scaling.kind == "yarn":
        said |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling.factor)}
        said["rope.scaling.yarn_beta_fast"] = float(scaling.beta_fast)
        said["rope.scaling.yarn_beta_slow"] = float(scaling.beta_slow)
        factor /= 0.1 * math.log(scaling.factor) + 1
    if scaling.kind == "longrope":
        said["rope.scaling.type"] = "longrope"
    if not math.isclose(factor, 1, rel_tol=1e-12):
        said[_ATTENTION] = factor
    return said


def write_tensors(config: Config) -> dict[str, np.ndarray]:
    """Returns the tensors that describe a config's RoPE, float32."""
    scaling = config.rope_scaling
    made: dict[str, Any] = {}
    if scaling is not None and scaling.kind == "llama3":
        made = {FACTORS: divisors_of(config, scaling)}
    if scaling is not None and scaling.kind == "longrope":
        made = {_LONG: scaling.long_factors, _SHORT: scaling.short_factors}
    return {name: np.asarray(numbers, np.float32) for name, numbers in made.items()}


def _checked(path: Any, name: str, config: Config, divisors: np.ndarray) -> np.ndarray:
    """Checks a tensor's divisors and returns them, float64 [R/2]."""
    half = config.rotated_size // 2
    if divisors.shape != (half,):
        raise LlamaJaxError(
            f"{path}: {name} has shape {divisors.shape}: expected {(half,)}, half of a head's rotated dimensions"
        )
    if not np.isfinite(divisors).all() or (divisors <= 0).any():
        raise LlamaJaxError(f"{path}: {name} holds {shortened(divisors.tolist())}: expected finite numbers above 0")
    return divisors.astype(np.float64)


def with_factors(path: Any, config: Config, divisors: np.ndarray, original: Any = None) -> Config:
    """Returns the config with RoPE frequencies divided by the numbers of a tensor.

    Args:
        path: path of the file, for messages.
        config: the config without this scaling.
        divisors: float32 [R/2], where R is the number of rotated coordinates of a head.
        original: the original context length, if the metadata have one.

    Raises:
        LlamaJaxError: if Llama 3.1's scaling does not give the divisors, or the config has another scaling as well.
    """
    name = f"{path}: {FACTORS}"
    divisors = _checked(path, FACTORS, config, divisors)
    if (divisors == 1).all():
        return config
    if config.rope_scaling is not None:
        raise LlamaJaxError(f"{name} and RoPE scaling {config.rope_scaling.kind!r} are given: expected one of them")
    for scaling in _candidates(config, divisors, original):
        if np.allclose(divisors_of(config, scaling), divisors, rtol=_CLOSE, atol=0):
            return dataclasses.replace(config, rope_scaling=scaling)
    raise LlamaJaxError(
        f"{name} holds {shortened(divisors.tolist())}: expected the divisors of Llama 3.1's RoPE scaling: another "
        "scaling is not supported"
    )


def _turns(config: Config) -> np.ndarray:
    """Returns the reciprocal wavelengths, in turns per token, [R/2]."""
    pair = np.arange(config.rotated_size // 2, dtype=np.float64)
    return config.rope_theta ** (-2 * pair / config.rotated_size) / (2 * math.pi)


def divisors_of(config: Config, scaling: RopeScaling) -> np.ndarray:
    """Returns the divisors of frequencies, [R/2], with the arithmetic of `rope.rope_frequencies`."""
    turns = scaling.original_context_length * _turns(config)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = np.clip(keep, 0, 1)
    return 1 / (keep + (1 - keep) / scaling.factor)


def _candidates(config: Config, divisors: np.ndarray, original: Any) -> list[RopeScaling]:
    """Returns scalings that may have made the divisors; scalings with published parameters come first.

    Between the two bounds, 1 / divisor is linear in the reciprocal wavelength. Only ratios of the length and the two
    factors matter, so that one of the three is free.
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
        low, high = -start / slope, (1 - start) / slope  # turns per token at which nothing, and everything, is kept
        if 0 < low < high:
            add(1 / low, 1.0, float(high / low))
            add(8192, float(low * 8192), float(high * 8192))
    return found
