"""The metadata of a GGUF file as a `Config`: each key of the architecture is read, known to do nothing, or an error.

Meanings and defaults are those of llama.cpp: `load_hparams` in src/llama-model.cpp.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from llamajax.checkpoint.gguf.header import is_whole
from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.files import shortened
from llamajax.words import SAMPLING, sampling_in_range

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h: how blocks are laid out
# Our field for each key that says one.
FIELDS = {
    "embedding_length": "width",
    "feed_forward_length": "ffn_width",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_size",
    "context_length": "context_length",
    "attention.layer_norm_rms_epsilon": "norm_eps",
    "rope.freq_base": "rope_theta",
}
_REQUIRED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    "attention.layer_norm_rms_epsilon",
)
# One number for all layers, or one for each.
_OF_LAYERS = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
_READ = (
    *(*FIELDS, "vocab_size", "attention.value_length", "rope.dimension_count"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"),
)
# Keys that would change the forward pass: allowed only at the values at which they do nothing.
_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.alpha": (0,),
}
# Of no effect where RoPE is not scaled by YaRN, or on what llama.cpp computes at all.
_NO_EFFECT = (
    *("rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.yarn_log_multiplier"),
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
    *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)

# gguf-py's `Keys.General`; what of it decides how tokens are drawn, under our names.
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_OFF = ("top_k", "min_p")  # by 0 or less
# Where other keys that are known begin: descriptions, how a file was made.
_DESCRIPTIONS = ("general.", "quantize.", "split.", "imatrix.", "training.")


def config_of(
    path: Any, architecture: str, metadata: Mapping[str, Any], vocab_size: int, tied: bool
) -> tuple[Config, list[str]]:
    """The architecture's sizes and numbers, without RoPE factors that come as a tensor; and notes.

    Args:
        path: of the file, for messages.
        architecture: its name, which keys begin with.
        metadata: of the file, without keys that are to be ignored.
        vocab_size: rows of the embedding.
        tied: whether there is no head beside it.

    Raises:
        LlamaJaxError: for a key of the architecture that is missing, unknown, or asks for something that we do not do.
    """
    prefix = f"{architecture}."
    said = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    known = {*_READ, *_ONLY_VALUE, *_NO_EFFECT}
    unknown = sorted(key for key in said if key not in known)
    if unknown:
        raise LlamaJaxError(
            f"{path}: unknown key {shortened(prefix + unknown[0])}: if it does not change the forward pass, give "
            f"--ignore_key={shortened(prefix + unknown[0])[1:-1]} (ignore_keys in the library)"
        )
    missing = [key for key in _REQUIRED if key not in said]
    if missing:
        raise LlamaJaxError(
            f"{path}: missing key {prefix + missing[0]!r}: the file is damaged, or of no {architecture}"
        )
    for key in _OF_LAYERS:
        if isinstance(said.get(key), np.ndarray):
            said[key] = _same_in_all(path, prefix + key, said[key])
    for key, value in said.items():
        if isinstance(value, np.ndarray | list):
            raise LlamaJaxError(f"{path}: {prefix}{key} is an array of {len(value)}: expected one value")
    ours: dict[str, Any] = {FIELDS[key]: value for key, value in said.items() if key in FIELDS}
    ours.setdefault("num_kv_heads", ours["num_heads"])
    if "head_size" not in ours and is_whole(ours["width"]) and is_whole(ours["num_heads"]):
        ours["head_size"] = ours["width"] // max(ours["num_heads"], 1)
    scaling = _linear(path, prefix, said)
    config = Config.from_dict(
        ours | {"vocab_size": vocab_size, "tied_embeddings": tied, "rope_scaling": scaling}, f"{path}: {architecture}"
    )
    _check_values(path, prefix, said, config)
    notes = []
    if said.get("vocab_size", vocab_size) != vocab_size:
        notes.append(
            f"{path}: {prefix}vocab_size is {shortened(said['vocab_size'])}, but the embedding has {vocab_size} rows: "
            "the latter is used"
        )
    return config, notes


def check_ignored(ignore_keys: Collection[str], architecture: str) -> None:
    """Refuses to ignore what a model is made by."""
    made_by = {f"{architecture}.{key}" for key in _READ} | {"general.architecture"}
    needed = sorted(made_by & set(ignore_keys))
    if needed:
        raise LlamaJaxError(f"{needed[0]!r} cannot be ignored: the model is made by it")


def _same_in_all(path: Any, key: str, values: np.ndarray) -> Any:
    """The number that all layers have."""
    if values.ndim != 1 or not len(values) or (values != values[0]).any():
        raise LlamaJaxError(f"{path}: {key} differs between layers ({shortened(values.tolist())}): expected one number")
    return values[0].item()


def _linear(path: Any, prefix: str, said: Mapping[str, Any]) -> dict[str, Any] | None:
    """What keys say of RoPE scaling: a factor by which all frequencies are divided, or nothing."""
    kind = said.get("rope.scaling.type", "linear")
    factor = said.get("rope.scaling.factor", said.get("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise LlamaJaxError(
            f"{path}: {prefix}rope.scaling.type is {shortened(kind)}, which is not supported: expected 'none' or "
            "'linear'; Llama 3.1's comes as the tensor rope_freqs.weight"
        )
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise LlamaJaxError(f"{path}: {prefix}rope.scaling.factor is {shortened(factor)}: expected a number")
    return None if kind == "none" or factor in (0, 1) else {"kind": "linear", "factor": float(factor)}


def _check_values(path: Any, prefix: str, said: Mapping[str, Any], config: Config) -> None:
    """That keys which we do not compute by have the values at which they do nothing."""
    allowed = dict(_ONLY_VALUE)
    allowed["attention.value_length"] = allowed["rope.dimension_count"] = (config.head_size,)
    window = said.get("attention.sliding_window")
    if isinstance(window, int) and window >= config.context_length:
        allowed["attention.sliding_window"] = (window,)
    scale = said.get("attention.scale")
    if isinstance(scale, float) and math.isclose(scale, config.head_size**-0.5, rel_tol=1e-6):
        allowed["attention.scale"] = (scale,)
    for key, values in allowed.items():
        if key not in said:
            continue
        value = said[key]
        if value not in values:
            raise LlamaJaxError(
                f"{path}: {prefix}{key} is {shortened(value)}, which is not supported: expected {values[0]!r}"
            )


def check_quantization(path: Any, metadata: Mapping[str, Any]) -> None:
    """That blocks are laid out as they have been since GGUF is."""
    version = metadata.get("general.quantization_version", QUANTIZATION_VERSION)
    if not is_whole(version) or version != QUANTIZATION_VERSION:
        raise LlamaJaxError(
            f"{path}: general.quantization_version is {shortened(version)}, which is not read: expected "
            f"{QUANTIZATION_VERSION}"
        )


def sampling_of(path: Any, metadata: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Defaults of sampling, and a note on each that is asked for and not followed."""
    found, notes = {}, []
    for key, name in SAMPLING_KEYS.items():
        value = metadata.get(key)
        if value is None or (name in _OFF and (is_whole(value) or isinstance(value, float)) and value <= 0):
            continue
        number = is_whole(value) or (isinstance(value, float) and math.isfinite(value) and name != "top_k")
        if not number or not sampling_in_range(name, max(value, 0) if name == "temperature" else value):
            notes.append(f"{path}: {key} is {shortened(value)}: left out")
            continue
        found[name] = max(value, 0) if name == "temperature" else value
    notes += [
        f"{path}: {key} is {shortened(metadata[key])}, which is not done"
        for key in sorted(metadata)
        if key.startswith("general.sampling.") and key not in SAMPLING_KEYS and not _asks_nothing(key, metadata)
    ]
    return {name: found[name] for name in SAMPLING if name in found}, notes


def _asks_nothing(key: str, metadata: Mapping[str, Any]) -> bool:
    """Whether a setting of sampling that is not done changes nothing beside the others."""
    name = key.removeprefix("general.sampling.")
    needs = {"penalty_last_n": ("penalty_repeat", 1), "xtc_threshold": ("xtc_probability", 0)}
    needs |= {"mirostat_tau": ("mirostat", 0), "mirostat_eta": ("mirostat", 0)}
    name, nothing = needs.get(name, (name, 0))
    value = metadata.get(f"general.sampling.{name}", nothing)
    return (is_whole(value) or isinstance(value, float)) and value == nothing


def unknown_keys(metadata: Mapping[str, Any], architecture: str, consumed: Collection[str]) -> list[str]:
    """Keys that are of nothing that we know."""
    known = (f"{architecture}.", *_DESCRIPTIONS)
    return sorted(key for key in metadata if not key.startswith(known) and key not in consumed)
