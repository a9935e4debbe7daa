"""Checks of weights: checksums, finiteness, range of a dtype, and available memory."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llamajax.errors import LlamaJaxError

_PIECE = 1 << 17  # elements
# A prime: the size of sectors, pages and chunks of files is no multiple of a row's, so exchanging two changes the sums.
_ROW = 509


def checksum(array: np.ndarray) -> str:
    """Returns 32 hexadecimal digits that detect damage to an array's bytes, but not forgery.

    The bytes are taken as rows of 509 little-endian 64-bit words. The checksum is the SHA-256 of the sums of the
    columns, modulo 2**64, followed by the bytes behind the last whole row. The sums run at the speed of memory, ten
    times that of a CRC, so that a checkpoint is read as fast as without them.
    """
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = len(data) - len(data) % (8 * _ROW)
    sums = np.add.reduce(data[:whole].view("<u8").reshape(-1, _ROW), axis=0, dtype=np.uint64)
    return hashlib.sha256(sums.tobytes() + data[whole:].tobytes()).hexdigest()[:32]


def is_finite(leaf: jax.Array | np.ndarray) -> bool:
    """Whether no element is NaN or infinite; computed on the array's device, on a CPU without compiling anything."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return True
    if isinstance(leaf, np.ndarray) or all(device.platform == "cpu" for device in leaf.devices()):
        return _all_finite(np.asarray(leaf))
    return bool(jnp.isfinite(leaf).all())


def _all_finite(array: np.ndarray) -> bool:
    """Does what `is_finite` does, by exponent bits: NumPy has no fast isfinite for bfloat16."""
    bits, mask = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80)}[
        str(array.dtype)
    ]
    flat = array.ravel(order="K").view(bits)
    # In pieces that stay in a processor's cache, which is five times as fast.
    pieces = (flat[i : i + _PIECE] for i in range(0, len(flat), _PIECE))
    return not any((piece & bits(mask)).max() == mask for piece in pieces)


def check_fits(name: str, before: Any, after: Any) -> None:
    """Refuses a cast that turned finite numbers into infinities.

    Args:
        name: name of the weight, for the message.
        before: the array before the cast.
        after: the same numbers in another dtype.

    Raises:
        LlamaJaxError: if `after` is not finite.
    """
    if before.dtype == after.dtype or _largest(after.dtype) >= _largest(before.dtype) or is_finite(after):
        return
    value = float(jnp.abs(before).max())
    raise LlamaJaxError(
        f"{name} holds {value:g}: the largest {after.dtype} number is {_largest(after.dtype):g}: expected a dtype with "
        "a wider range, bfloat16 or float32"
    )


def available_memory() -> int | None:
    """Returns the bytes of memory that can be used without swapping; None if the system does not tell.

    It is the lesser of Linux's own estimate (MemAvailable) and the rest of the container's limit, if there is one.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "stat"))
        anonymous = next(int(line.split()[1]) for line in used.splitlines() if line.startswith("anon "))
        found.append(int(limit) - anonymous)
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    return min(found, default=None)


def check_memory(path: Any, what: str, needed: int) -> None:
    """Refuses a model with weights that are floats only in memory, if the model does not fit.

    Args:
        path: path of the file, for the message.
        what: says which weights these are; "" for none.
        needed: bytes of all weights of the model.

    Raises:
        LlamaJaxError: if more memory is needed than is available.
    """
    available = available_memory()
    if what and available is not None and needed > available:
        raise LlamaJaxError(
            f"{path}: {what} become floats in memory, so the model needs {needed / (1 << 30):.1f} GiB, but "
            f"{available / (1 << 30):.1f} GiB are available: pack these weights first, one at a time: llamajax "
            f"quantize --model={path} --output=…"
        )


def _largest(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).max)
