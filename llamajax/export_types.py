"""Registers names of pytree types, which `jax.export` needs to serialize functions of a model.

    exported = jax.export.export(jax.jit(lambda model, tokens_BT: model(tokens_BT)[0]))(model, tokens_BT)
    data = exported.serialize()

Reading it back needs `import llamajax` first. The static fields of a type are written as JSON; nothing is unpickled.
"""

import dataclasses
import json
from typing import Any

import jax.export
import numpy as np
from flax import nnx
from flax.nnx.graphlib import HashableMapping
from flax.nnx.pytreelib import PytreeState

from llamajax.caches import KVCache, NoCache, Part
from llamajax.config import Config, RopeScaling
from llamajax.generation.programs import Asked, EngineState, Made
from llamajax.generation.sampling import Sampler
from llamajax.model import Attention, Block, FeedForward, Llama, RMSNorm
from llamajax.parameters import Stack
from quant import Mixed, QTensor, Scheme, TiledWeight

_MODULES = (Llama, Block, Attention, FeedForward, RMSNorm)
_STATES = (KVCache, NoCache, EngineState, Asked, Made, Sampler)
_WEIGHTS = (QTensor, Mixed, TiledWeight)
_FLAX = (nnx.Param, PytreeState)
_VALUES = {cls.__name__: cls for cls in (Config, RopeScaling, Scheme, Stack)}


def register_export_types() -> None:
    """Registers the names of the types, once in a process."""
    for cls in (*_MODULES, *_STATES, *_parts(Part), *_WEIGHTS, *_FLAX):
        name = f"{cls.__module__.partition('.')[0]}.{cls.__name__}"
        try:
            jax.export.register_pytree_node_serialization(
                cls, serialized_name=name, serialize_auxdata=_encode, deserialize_auxdata=_decode
            )
        except ValueError:
            if cls not in _FLAX:  # another package may have registered Flax's types
                raise


def _parts(cls: type[Part]) -> list[type[Part]]:
    """Returns all classes below `cls`, so that a new kind of cache needs no entry here."""
    below = cls.__subclasses__()
    return below + [kind for one in below for kind in _parts(one)]


def _encode(value: Any) -> bytes:
    return json.dumps(_to_json(value)).encode()


def _decode(data: bytes) -> Any:
    return _from_json(json.loads(data))


def _to_json(value: Any) -> Any:
    """Converts to JSON; tuples, Flax's mappings, dtypes and our frozen dataclasses become objects with one key each."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_to_json(item) for item in value]}
    if isinstance(value, HashableMapping):
        return {"mapping": [[key, _to_json(item)] for key, item in value.items()]}
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    name = type(value).__name__
    if _VALUES.get(name) is type(value):
        fields = {field.name: _to_json(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
        return {name: fields}
    raise TypeError(f"{value!r} beside the arrays of a pytree: expected values that JSON can hold")


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(map(_from_json, content))
    if kind == "mapping":
        return HashableMapping({key: _from_json(item) for key, item in content})
    if kind == "dtype":
        return jax.numpy.dtype(content)
    return _VALUES[kind](**{name: _from_json(item) for name, item in content.items()})
