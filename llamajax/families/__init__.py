"""Families: for each format what its description says as a `Config`, and what it calls the weights. Nothing else.

A family is a file here, and a name below. No family has a model of its own.
"""

from llamajax.families import bitnet, llama
from llamajax.families.family import FAMILIES, Family, Format, Keys, Names, family_of, register
from llamajax.families.huggingface import config_from_hf, config_to_hf
from llamajax.families.names import Piece, pieces, shape_of, tensors

for _family in (llama.FAMILY, bitnet.FAMILY):
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
