"""Reads and writes GGUF keys that several families share; see also the families and `checkpoint.gguf.config`.

Reference: llama.cpp's `load_arch_hparams` of each architecture, src/models/.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from llamajax.config import Config, LayerKind
from llamajax.errors import LlamaJaxError
from llamajax.families.family import Keys
from llamajax.families.huggingface import pattern_of
from llamajax.fields import check_whole
from llamajax.files import shortened

WINDOW = "attention.sliding_window"
_PATTERN = "attention.sliding_window_pattern"


def has_window(keys: Keys) -> bool:
    """Whether a file has a window; 0 means none."""
    value = keys.peek(WINDOW)
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def above_zero(keys: Keys, name: str, default: float | None) -> float | None:
    """The value of a key that is a number above 0, or the default if it is missing."""
    if name not in keys and default is None:
        return keys.take(name, None)
    value = keys.number(name, default)
    if value <= 0:
        raise LlamaJaxError(f"{keys.source}: {keys.prefix}{name} is {value}: expected a number above 0")
    return value


def scale(keys: Keys, name: str) -> float | None:
    """The value of a key that is a multiplier; None for 0 or a missing key, as in llama.cpp."""
    value = keys.number(name, 0.0)
    if value < 0:
        raise LlamaJaxError(f"{keys.source}: {keys.prefix}{name} is {value}: expected 0 or more")
    return value or None


def read_windows(keys: Keys, period: int, default: int | None = None) -> dict[str, Any]:
    """Reads the kinds of the layers, and the window of those that have one.

    Args:
        keys: the keys of the file.
        period: the default of the period: the last of each `period` layers has no window.
        default: the window if the file has none; None if no layer has a window then.
    """
    window, said = keys.take(WINDOW, default), keys.take(_PATTERN, period)
    if window is None or (window == 0 and not isinstance(window, bool)):
        return {}
    check_whole(f"{keys.source}: {keys.prefix}{WINDOW}", window)
    layers = keys.take("block_count")
    if isinstance(said, np.ndarray | list):
        flags = np.asarray(said)
        if flags.shape != (layers,) or not np.isin(flags, (0, 1)).all():
            raise LlamaJaxError(
                f"{keys.source}: {keys.prefix}{_PATTERN} is {shortened(flags.tolist())}: expected {layers} flags, or "
                "one number, the period of the pattern"
            )
        kinds: list[LayerKind] = ["window" if flag else "full" for flag in flags]
    else:
        if isinstance(said, bool) or not isinstance(said, int) or said < 0:
            raise LlamaJaxError(
                f"{keys.source}: {keys.prefix}{_PATTERN} is {shortened(said)}: expected the pattern's period"
            )
        kinds = ["window" if said == 0 or layer % said < said - 1 else "full" for layer in range(layers)]
    pattern = pattern_of(kinds)
    return {"layer_kinds": pattern, "window": window if "window" in pattern else None}


def write_windows(config: Config, period: int) -> dict[str, Any]:
    """The keys for the kinds of layers and the window; the period only if it differs from the architecture's."""
    kinds = [config.kind(layer) for layer in range(config.num_layers)]
    if "window" not in kinds:
        return {WINDOW: 0}
    said = kinds.index("full") + 1 if "full" in kinds else 0
    usual = all((kind == "window") == (layer % period < period - 1) for layer, kind in enumerate(kinds))
    return {WINDOW: config.window} | ({} if usual else {_PATTERN: said})


def read_window(keys: Keys) -> dict[str, Any]:
    """Reads the window of families in which all layers have one, or none has."""
    window = keys.take(WINDOW, 0)
    if window == 0 and not isinstance(window, bool):
        return {}
    check_whole(f"{keys.source}: {keys.prefix}{WINDOW}", window)
    return {"layer_kinds": ("window",), "window": window}


def write_window(config: Config) -> dict[str, Any]:
    """The key for a window of all layers, or of none."""
    return {WINDOW: config.window or 0}


def check_tied(config: Config, architecture: str) -> None:
    """Refuses a separate head, for which some of llama.cpp's architectures have no place."""
    if not config.tied_embeddings:
        raise LlamaJaxError(
            f"tied_embeddings is False: a GGUF of architecture {architecture!r} cannot hold a separate head: "
            "expected tied embeddings"
        )


def query_scale(keys: Keys, largest: int) -> float | None:
    """The scale of Gemma's queries. No key gives it; llama.cpp recognises the 27B by its number of layers."""
    layers, width, heads = (keys.take(key) for key in ("block_count", "embedding_length", "attention.head_count"))
    return (width // heads) ** -0.5 if layers == largest else None


def kinds_of(layers: int, pattern: Sequence[LayerKind]) -> tuple[LayerKind, ...]:
    """The shortest pattern that, repeated and cut to `layers` layers, gives the same kinds as `pattern`."""
    return pattern_of([pattern[layer % len(pattern)] for layer in range(layers)])
