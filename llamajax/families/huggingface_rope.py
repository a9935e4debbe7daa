"""RoPE in Hugging Face's config.json, in the spelling of transformers 4 and of 5.

Reference: transformers' `modeling_rope_utils.py`.
"""

from collections.abc import Mapping
from typing import Any

from llamajax.config import Config
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Keys
from llamajax.files import shortened


def read_rope(keys: Keys, context_length: Any) -> dict[str, Any]:
    """Fields of `Config` that say RoPE, from whichever spelling is there; they must agree if both are.

    Raises:
        LlamaJaxError: for a scaling that is not known, or one with other parameters than its own.
    """
    read = []
    for key in ("rope_scaling", "rope_parameters"):
        value = keys.take(key, None)
        if value is not None:
            # transformers gives the length outside the object precedence over the one in it.
            original = keys.take("original_max_position_embeddings", None)
            read.append(_rope_object(value, original, context_length, f"{keys.source}: {key}"))
    if len(read) == 2 and read[0] != read[1]:
        raise LlamaJaxError(f"{keys.source}: rope_scaling and rope_parameters differ: expected one of them")
    theta = keys.take("rope_theta", None)
    return ({} if theta is None else {"rope_theta": theta}) | (read[0] if read else {})


# Of no effect where RoPE is not scaled; transformers writes some of them there.
_ROPE_NAMES = frozenset(
    "factor low_freq_factor high_freq_factor original_max_position_embeddings attention_factor beta_fast beta_slow "
    "mscale mscale_all_dim truncate short_factor long_factor".split()
)


def _rope_object(value: Any, original: Any, context_length: Any, source: str) -> dict[str, Any]:
    """One object of RoPE parameters in our names, as transformers 5 reads it for a LLaMA.

    Args:
        value: of `rope_scaling` or `rope_parameters`.
        original: `original_max_position_embeddings` outside the object, or None.
        context_length: what the original length is where nothing says it.
        source: what messages begin with.
    """
    if not isinstance(value, Mapping):
        raise LlamaJaxError(f"{source} is {shortened(value)}: expected an object")
    if value and all(isinstance(part, Mapping) for part in value.values()):
        raise LlamaJaxError(
            f"{source} differs by kind of layer ({shortened(sorted(map(str, value)))}), which a LLaMA's does not: "
            "expected one rope_type and its values"
        )
    rope = {key: part for key, part in value.items() if part is not None or key in ("rope_type", "type")}
    ours = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    kinds = [rope.pop(key) for key in ("rope_type", "type") if key in rope]
    # Nothing but a theta is what transformers calls the default type.
    kind = "default" if not kinds and not rope else kinds[0] if kinds and kinds.count(kinds[0]) == len(kinds) else None
    if kind == "default" and set(rope) <= _ROPE_NAMES:
        return ours
    names = {"factor": "factor"}
    if kind == "linear":
        rope.pop("original_max_position_embeddings", None)  # of no effect there
    if kind == "llama3":
        names |= {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
        names |= {"original_max_position_embeddings": "original_context_length"}
        rope.setdefault("original_max_position_embeddings", context_length)
        if original is not None:
            rope["original_max_position_embeddings"] = original
    if kind not in ("linear", "llama3") or set(rope) != set(names):
        raise LlamaJaxError(
            f"{source}: RoPE scaling {shortened(kind)} with {shortened(sorted(map(str, rope)))} is not supported: "
            "expected 'linear' with factor, or 'llama3' with factor, low_freq_factor, high_freq_factor, "
            "original_max_position_embeddings"
        )
    return ours | {"rope_scaling": {"kind": kind} | {names[key]: part for key, part in rope.items()}}


def write_rope(config: Config) -> dict[str, Any]:
    """The keys that say a config's RoPE."""
    fields: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = {"rope_type": config.rope_scaling.kind, "factor": config.rope_scaling.factor}
        if config.rope_scaling.kind == "llama3":
            scaling["low_freq_factor"] = config.rope_scaling.low_freq_factor
            scaling["high_freq_factor"] = config.rope_scaling.high_freq_factor
            scaling["original_max_position_embeddings"] = config.rope_scaling.original_context_length
        fields["rope_scaling"] = scaling
    return fields
