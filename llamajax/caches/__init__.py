"""KV caches, each of which implements its own attention; `cache.py` defines the protocol."""

import functools
from typing import Any

from llamajax.caches.attention import Scores
from llamajax.caches.cache import (
    CACHE_DTYPES,
    PARTS,
    STEP_SLOTS,
    KVCache,
    NoCache,
    Part,
    Where,
    check_cache_dtype,
    empty_cache,
)
from llamajax.caches.dense import DensePart
from llamajax.caches.quantized import CODE_OF, QuantizedPart
from llamajax.caches.ring import RingPart, ring_slots
from llamajax.caches.rotated import RotatedPart
from llamajax.caches.tiled import TiledPart
from llamajax.config import Config

__all__ = [
    "CACHE_DTYPES",
    "PARTS",
    "STEP_SLOTS",
    "DensePart",
    "KVCache",
    "NoCache",
    "Part",
    "QuantizedPart",
    "RingPart",
    "RotatedPart",
    "Scores",
    "TiledPart",
    "Where",
    "check_cache_dtype",
    "empty_cache",
]


def _full(config: Config, layers: int, batch: int, slots: int, dtype: str, layout: str) -> Part:
    """Makes a part that keeps every token."""
    if layout not in ("dense", "straight", "scatter", "tiled"):
        raise ValueError(f"layout {layout!r} of a cache: expected dense, straight, scatter or tiled")
    if layout == "tiled" and dtype in CODE_OF:
        raise ValueError(f"a tiled cache in {dtype}: expected a float type, or a dense cache")
    kind = TiledPart if layout == "tiled" else QuantizedPart if dtype in CODE_OF else DensePart
    return kind.empty(config, layers, batch, slots, dtype, layout)  # type: ignore[arg-type]


def _seen(name: str, config: Config, layers: int, batch: int, slots: int, dtype: str, layout: str) -> Part:
    """Makes a part that keeps only the positions that queries see; their number is the config's field `name`.

    If a ring for them would need at least `slots` slots, or `slots` is symbolic, the part keeps every token: it takes
    no more memory than the ring, loses no token, and needs no computation of the position in each slot.
    """
    seen = getattr(config, name)
    needed = ring_slots(seen)
    if isinstance(slots, int) and slots > needed:
        return RingPart(_full(config, layers, batch, needed, dtype, layout), seen)
    return _full(config, layers, batch, slots, dtype, layout)


def _rotated(make: Any, config: Config, layers: int, batch: int, slots: int, dtype: str, layout: str) -> Part:
    """Makes a part whose keys and values are rotated before they become codes; floats stay as they are."""
    part = make(config, layers, batch, slots, dtype, layout)
    return RotatedPart(part) if dtype in CODE_OF else part


PARTS["full"] = functools.partial(_rotated, _full)
PARTS["window"] = functools.partial(_rotated, functools.partial(_seen, "window"))
PARTS["chunk"] = functools.partial(_rotated, functools.partial(_seen, "chunk"))
