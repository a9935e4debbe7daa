"""Maps each weight to a tensor, or a part of a tensor, in the files of a format."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from llamajax.config import Config
from llamajax.families.family import format_of
from llamajax.parameters import Place, specs


class Piece(NamedTuple):
    """The place of a weight in the files.

    Attributes:
        tensor: the name of the tensor.
        rows: the weight's rows (output channels) in that tensor; None for all.
    """

    tensor: str
    rows: slice | None = None


@functools.lru_cache(maxsize=16)
def pieces(config: Config, format: str) -> Mapping[Place, Piece]:
    """Returns the place of every weight of a model in files of a format, "huggingface" or "gguf".

    Raises:
        LlamaJaxError: if the config's family has no such format.
    """
    names, of = format_of(config, format).names, specs(config)
    cut = {ours: (theirs, whole) for theirs, whole in names.fused.items() for ours in whole}
    found = {}
    for place, spec in of.items():
        if place.name not in cut:
            theirs = names.renamed.get(place.name, spec.foreign.get(format, str(place)))
            found[place] = Piece(theirs.format(place.layer))
            continue
        theirs, whole = cut[place.name]
        first = 0
        for name in whole[: whole.index(place.name)]:
            first += of[Place(name, place.layer)].shape(config)[-1]
        found[place] = Piece(theirs.format(place.layer), slice(first, first + spec.shape(config)[-1]))
    return MappingProxyType(found)


@functools.lru_cache(maxsize=16)
def tensors(config: Config, format: str) -> Mapping[str, tuple[Place, ...]]:
    """Returns every tensor in the files of a model, with the weights that it holds in the order of its rows."""
    found: dict[str, tuple[Place, ...]] = {}
    order = sorted(pieces(config, format).items(), key=lambda item: item[1].rows.start if item[1].rows else 0)
    for place, piece in order:
        found[piece.tensor] = (*found.get(piece.tensor, ()), place)
    return MappingProxyType({piece.tensor: found[piece.tensor] for piece in pieces(config, format).values()})


def shape_of(config: Config, places: tuple[Place, ...]) -> tuple[int, ...]:
    """The shape in foreign files of a tensor that holds some weights; a projection is [out, in]."""
    shapes = []
    for place in places:
        spec = specs(config)[place]
        shape = spec.shape(config)
        shapes.append(shape[::-1] if spec.transposed else shape)
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
