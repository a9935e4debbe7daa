"""`quantization_config` of Hugging Face's config.json: what the weights of projections are in the files.

Read here: BitNet's (transformers' `BitNetQuantConfig` and integrations/bitnet.py). It is of no family: transformers has
BitNet's layers in models of any, as its own fine-tunes of Llama 3 to 1.58 bits have.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from llamajax.errors import LlamaJaxError
from llamajax.families.family import Keys, check_read
from llamajax.files import shortened
from llamajax.parameters import Spec

_KEEPS: tuple[list[str], ...] = ([], ["lm_head"])  # `modules_to_not_convert`: the head is in floats in any case


class Ternary(NamedTuple):
    """Projections of -1, 0 and 1 with one scale a matrix, activations in int8 with one scale a token.

    Attributes:
        online: the files have floats, which are rounded whenever they are multiplied; else packed codes with their
            scale.
        divides: whether the scale that is stored divides: class `BitLinear`, not `AutoBitLinear`.
    """

    online: bool
    divides: bool


def read_quantization(said: Any, source: str) -> Ternary | None:
    """What a `quantization_config` says; None of null, where the files have floats.

    Raises:
        LlamaJaxError: for another method, or a key or a value of BitNet's that asks for something else.
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
    keys.take("rms_norm_eps", None)  # of no effect without use_rms_norm
    keys.only("modules_to_not_convert", *_KEEPS)
    check_read(keys, said, lambda key: False, "expected one of BitNetQuantConfig's")
    # transformers looks at the mode in `AutoBitLinear` only.
    return Ternary(online and not divides, divides)


# What config.json says of a model whose projections are packed.
PACKED: Mapping[str, Any] = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": None,
}


def is_converted(spec: Spec) -> bool:
    """Whether transformers makes a ternary layer of a weight's: of every projection but the head."""
    return "product" in spec.roles


def scale_name(tensor: str) -> str:
    """What the scale of a packed tensor is called."""
    return f"{tensor.removesuffix('weight')}weight_scale"
