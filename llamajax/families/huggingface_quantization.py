"""Reads `quantization_config` of Hugging Face's config.json: the form of the projections' weights in the files.

Only BitNet's is supported (transformers' `BitNetQuantConfig` and integrations/bitnet.py). It does not belong to one
family: transformers can use BitNet's layers in models of any family, such as fine-tunes of Llama 3 to 1.58 bits.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from llamajax.errors import LlamaJaxError
from llamajax.families.family import Keys, check_read
from llamajax.files import shortened
from llamajax.parameters import Spec

_KEEPS: tuple[list[str], ...] = ([], ["lm_head"])  # `modules_to_not_convert`: the head is in floats in any case


class Ternary(NamedTuple):
    """Projections of -1, 0 and 1 with one scale per matrix, and activations in int8 with one scale per token.

    Attributes:
        online: whether the files hold floats, which are rounded at each multiplication; if not, they hold packed codes
            with their scale.
        divides: whether the stored scale is a divisor (class `BitLinear`) instead of a factor (`AutoBitLinear`).
    """

    online: bool
    divides: bool


def read_quantization(said: Any, source: str) -> Ternary | None:
    """Reads a `quantization_config`; returns None for null, when the files hold floats.

    Raises:
        LlamaJaxError: for a method other than BitNet's, or an unsupported key or value.
    """
    if said is None:
        return None
    if not isinstance(said, Mapping) or said.get("quant_method") != "bitnet":
        shown = said.get("quant_method", dict(said)) if isinstance(said, Mapping) else said
        raise LlamaJaxError(
            f"{source}: quantization_config is {shortened(shown)}, which is not supported: expected null or "
            "quant_method 'bitnet': use the model's files in floats, or its GGUF"
        )
    keys = Keys(said, f"{source}: quantization_config")
    keys.only("quant_method", "bitnet")
    divides = keys.choice("linear_class", {"bitlinear": True, "autobitlinear": False}, "bitlinear")
    online = keys.choice("quantization_mode", {"online": True, "offline": False}, "offline")
    keys.only("use_rms_norm", False)
    keys.take("rms_norm_eps", None)  # has no effect without use_rms_norm
    keys.only("modules_to_not_convert", *_KEEPS)
    check_read(keys, said, lambda key: False, "expected one of BitNetQuantConfig's")
    # transformers uses the mode only in `AutoBitLinear`.
    return Ternary(online and not divides, divides)


# The `quantization_config` of a model whose projections are packed.
PACKED: Mapping[str, Any] = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": None,
}


def is_converted(spec: Spec) -> bool:
    """Whether transformers makes the layer of a weight ternary: every projection except the head."""
    return "product" in spec.roles


def scale_name(tensor: str) -> str:
    """The name of the scale of a packed tensor."""
    return f"{tensor.removesuffix('weight')}weight_scale"
