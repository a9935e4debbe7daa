"""Families: how each file format describes a model's `Config`, and how it names the weights; nothing else.

A family is a file here, and a name below. No family has a model of its own.
"""

from llamajax.families import bitnet, exaone, gemma, granite, llama, mistral, olmo, phi, qwen, smollm
from llamajax.families.family import FAMILIES, Family, Format, Keys, Names, family_of, register
from llamajax.families.huggingface import config_from_hf, config_to_hf
from llamajax.families.names import Piece, pieces, shape_of, tensors

for _family in (
    llama.FAMILY,
    llama.SEED_OSS,
    mistral.MISTRAL,
    mistral.MINISTRAL,
    mistral.MINISTRAL3,
    qwen.QWEN2,
    qwen.QWEN3,
    gemma.GEMMA,
    gemma.GEMMA2,
    gemma.GEMMA3,
    smollm.SMOLLM3,
    olmo.OLMO2,
    olmo.OLMO3,
    granite.GRANITE,
    phi.PHI3,
    exaone.EXAONE4,
    bitnet.BITNET,
    bitnet.BITNET_3B,
):
    register(_family)

__all__ = [
    "FAMILIES",
    "Family",
    "Format",
    "Keys",
    "Names",
    "Piece",
    "config_from_hf",
    "config_to_hf",
    "family_of",
    "pieces",
    "register",
    "shape_of",
    "tensors",
]
