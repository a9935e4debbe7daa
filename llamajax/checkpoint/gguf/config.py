"""Reads a `Config` from a GGUF file's metadata. Each key of the architecture is read, has no effect, or is an error.

Keys of all architectures are read here, keys of one family in `families/`. Meanings and defaults are those of
llama.cpp: `load_hparams` in src/llama-model.cpp, and each architecture's in src/models/.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from llamajax.checkpoint.gguf.header import is_whole
from llamajax.checkpoint.gguf.rope import read_rope
from llamajax.config import MOST_LAYERS, Config
from llamajax.errors import LlamaJaxError
from llamajax.families.family import FAMILIES, Family, Keys, check_read
from llamajax.fields import LARGEST_DIMENSION, check_whole
from llamajax.files import shortened
from llamajax.rope import Rope
from llamajax.words import SAMPLING, sampling_in_range

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION of ggml.h: the layout of blocks
# Our field for each key that sets one.
FIELDS = {
    "embedding_length": "width",
    "feed_forward_length": "ffn_width",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_size",
    "context_length": "context_length",
    "attention.layer_norm_rms_epsilon": "norm_eps",
}
_REQUIRED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
    "attention.layer_norm_rms_epsilon",
)
# Keys that hold one number for all layers, or an array with one for each.
_OF_LAYERS = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
# Keys of a family that may hold an array.
_ARRAYS = ("attention.sliding_window_pattern",)
# Keys that would change the forward pass: allowed only at the values at which they do nothing, unless a family reads
# them.
_ONLY_VALUE: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "use_parallel_residual": (False,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0, 0.0),
    "attention.clamp_kqv": (0, 0.0),
    "attention.scale": (0, 0.0),
    "attention.sliding_window": (0,),
    "attention.temperature_scale": (0, 0.0),
    "logit_scale": (0, 1, 0.0, 1.0),
    "residual_scale": (0, 1, 0.0, 1.0),
    "embedding_scale": (0, 1, 0.0, 1.0),
    "attn_logit_softcapping": (0, 0.0),
    "final_logit_softcapping": (0, 0.0),
    "rope.scaling.attn_factor": (0, 1, 0.0, 1.0),
    "rope.scaling.alpha": (0, 0.0),
}
# Keys that must equal the size of a head, unless a family reads them.
_OF_HEADS = ("attention.value_length", "rope.dimension_count")
# Keys without effect if RoPE is not scaled by YaRN, if no layer has a window, or if llama.cpp never uses them.
_NO_EFFECT = frozenset(
    (
        *("rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scaling.yarn_log_multiplier"),
        *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
        *("attention.sliding_window_pattern", "rope.freq_base_swa", "attention.temperature_length"),
    )
)
# Switches of `Config` that are on if a file has the tensor; no key says so.
_BIASES = {
    "qkv_bias": "blk.0.attn_q.bias",
    "out_bias": "blk.0.attn_output.bias",
    "ffn_bias": "blk.0.ffn_up.bias",
}
HEAD = "output.weight"

# The sampling parameters among gguf-py's `Keys.General`, with our names.
SAMPLING_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
_OFF = ("top_k", "min_p")  # values of 0 or less turn them off
# Prefixes of other known keys: descriptions of the model, and of how the file was made.
_DESCRIPTIONS = ("general.", "quantize.", "split.", "imatrix.", "training.")


def config_of(
    path: Any,
    architecture: str,
    metadata: Mapping[str, Any],
    vocab_size: int,
    tensors: Collection[str],
    ignore_keys: Collection[str] = (),
) -> tuple[Config, Keys, list[str]]:
    """Reads a model's config, without RoPE factors that are stored as a tensor.

    Args:
        path: path of the file, for messages.
        architecture: its name, the prefix of its keys.
        metadata: the file's metadata.
        vocab_size: number of rows of the embedding.
        tensors: names of the file's tensors.
        ignore_keys: keys to ignore.

    Returns:
        The config; the keys of the architecture; and notes.

    Raises:
        LlamaJaxError: if a key of the architecture is missing, unknown, or has an unsupported value, or if a key to be
            ignored is needed for the config.
    """
    prefix = f"{architecture}."
    said = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    ignored = {key.removeprefix(prefix) for key in ignore_keys}
    keys = Keys({key: _one_value(path, prefix, key, value) for key, value in said.items()}, str(path), prefix=prefix)
    for key in _REQUIRED:
        if key not in keys:
            raise LlamaJaxError(f"{path}: missing key {prefix + key!r}: the file is damaged, or not a {architecture}")
    for key, field in FIELDS.items():
        if key in keys and field != "norm_eps":
            check_whole(
                f"{path}: {prefix}{key}", keys.take(key), MOST_LAYERS if field == "num_layers" else LARGEST_DIMENSION
            )
    layers = keys.take("block_count")
    if layers > len(tensors):  # checked before anything is allocated for so many layers
        raise LlamaJaxError(f"{path}: {layers} layers by its metadata, but {len(tensors)} tensors: some are missing")
    family = _family(architecture, keys)
    assert family.gguf is not None
    ours = _sizes(keys) | {"vocab_size": vocab_size, "tied_embeddings": HEAD not in tensors, "family": family.name}
    ours |= {switch: True for switch, name in _BIASES.items() if name in tensors}
    ours |= read_rope(keys, tensors) | family.gguf.read(keys)
    rows = keys.take("vocab_size", vocab_size)
    check_whole(f"{path}: {prefix}vocab_size", rows)
    needed = sorted(keys.read & ignored)
    if needed:
        raise LlamaJaxError(f"{prefix + needed[0]!r} cannot be ignored: the architecture depends on it")
    remedy = "if it does not change the forward pass, give --ignore_key={key} (ignore_keys in the library)"
    check_read(keys, said.keys() - ignored, (_NO_EFFECT | {*_ONLY_VALUE, *_OF_HEADS}).__contains__, remedy)
    config = Config.from_dict(ours, f"{path}: {architecture}")
    if config.window_rope == Rope(theta=config.rope_theta, scaling=config.rope_scaling):
        config = dataclasses.replace(config, window_rope=None)
    _check_values(keys, config, ignored)
    notes = []
    if rows != vocab_size:
        notes.append(
            f"{path}: {prefix}vocab_size is {shortened(rows)}, but the embedding has {vocab_size} rows: "
            "the number of rows is used"
        )
    return config, keys, notes


def _one_value(path: Any, prefix: str, key: str, value: Any) -> Any:
    """Returns a value; for an array with a number for each layer, the number that all layers share."""
    if key in _ARRAYS or not isinstance(value, np.ndarray | list):
        return value
    values = np.asarray(value)
    if key not in _OF_LAYERS or values.ndim != 1 or not len(values):
        raise LlamaJaxError(f"{path}: {prefix}{key} is an array of {len(value)}: expected one value")
    if (values != values[0]).any():
        raise LlamaJaxError(
            f"{path}: {prefix}{key} differs between layers ({shortened(values.tolist())}): expected one number"
        )
    return values[0].item()


def _sizes(keys: Keys) -> dict[str, Any]:
    """Reads the fields that every architecture has."""
    ours = {name: keys.take(key) for key, name in FIELDS.items() if key in keys}
    ours["norm_eps"] = keys.number("attention.layer_norm_rms_epsilon")
    ours.setdefault("num_kv_heads", ours["num_heads"])
    ours.setdefault("head_size", ours["width"] // ours["num_heads"])
    return ours


def _family(architecture: str, keys: Keys) -> Family:
    """Returns the family of a file: among families of its architecture, the one that applies to its keys."""
    forms = [(family, family.gguf) for family in FAMILIES.values() if family.gguf and architecture in family.gguf.kinds]
    for family, form in forms:
        if form.applies is not None and form.applies(keys):
            return family
    return next(family for family, form in forms if form.applies is None)


def _check_values(keys: Keys, config: Config, ignored: Collection[str]) -> None:
    """Checks that keys which are not supported have the values at which they have no effect."""
    allowed = _ONLY_VALUE | dict.fromkeys(_OF_HEADS, (config.head_size,))
    scale = keys.peek("attention.scale")
    if isinstance(scale, float) and math.isclose(scale, config.score_scale, rel_tol=1e-6):
        allowed["attention.scale"] = (scale,)
    for key, values in allowed.items():
        if key not in keys.read and key not in ignored:
            keys.only(key, *values)


def check_quantization(path: Any, metadata: Mapping[str, Any]) -> None:
    """Checks that blocks have the layout that all GGUF files have so far."""
    version = metadata.get("general.quantization_version", QUANTIZATION_VERSION)
    if not is_whole(version) or version != QUANTIZATION_VERSION:
        raise LlamaJaxError(
            f"{path}: general.quantization_version is {shortened(version)}, which is not supported: expected "
            f"{QUANTIZATION_VERSION}"
        )


def sampling_of(path: Any, metadata: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Returns default sampling parameters, and a note on each setting that is not followed."""
    found, notes = {}, []
    for key, name in SAMPLING_KEYS.items():
        value = metadata.get(key)
        if value is None or (name in _OFF and (is_whole(value) or isinstance(value, float)) and value <= 0):
            continue
        number = is_whole(value) or (isinstance(value, float) and math.isfinite(value) and name != "top_k")
        if not number or not sampling_in_range(name, max(value, 0) if name == "temperature" else value):
            notes.append(f"{path}: {key} is {shortened(value)}, which is invalid: ignored")
            continue
        found[name] = max(value, 0) if name == "temperature" else value
    notes += [
        f"{path}: {key} is {shortened(metadata[key])}, which is not supported: ignored"
        for key in sorted(metadata)
        if key.startswith("general.sampling.") and key not in SAMPLING_KEYS and not _asks_nothing(key, metadata)
    ]
    return {name: found[name] for name in SAMPLING if name in found}, notes


def _asks_nothing(key: str, metadata: Mapping[str, Any]) -> bool:
    """Whether an unsupported sampling setting has no effect, given the other settings."""
    name = key.removeprefix("general.sampling.")
    needs = {"penalty_last_n": ("penalty_repeat", 1), "xtc_threshold": ("xtc_probability", 0)}
    needs |= {"mirostat_tau": ("mirostat", 0), "mirostat_eta": ("mirostat", 0)}
    name, nothing = needs.get(name, (name, 0))
    value = metadata.get(f"general.sampling.{name}", nothing)
    return (is_whole(value) or isinstance(value, float)) and value == nothing


def unknown_keys(metadata: Mapping[str, Any], architecture: str, consumed: Collection[str]) -> list[str]:
    """Returns keys that are neither read nor known."""
    known = (f"{architecture}.", *_DESCRIPTIONS)
    return sorted(key for key in metadata if not key.startswith(known) and key not in consumed)
