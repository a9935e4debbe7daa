"""Whether weights are those that were written, whether they are finite, and whether another dtype holds them."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llamajax.errors import LlamaJaxError

_PIECE = 1 << 17  # elements
# A prime: neither sectors, pages nor chunks of files are a multiple of a row, so that exchanging two changes the sums.
_ROW = 509


def checksum(array: np.ndarray) -> str:
    """32 hexadecimal digits that detect damage to an array's bytes; not forgery.

    SHA-256 of the sums, modulo 2**64, of the columns of the bytes taken as rows of 509 little-endian 64-bit words,
    followed by the bytes behind the last whole row. Sums run at the speed of memory, ten times that of a CRC: reading
    a checkpoint takes no longer with them.
    """
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = len(data) - len(data) % (8 * _ROW)
    sums = np.add.reduce(data[:whole].view("<u8").reshape(-1, _ROW), axis=0, dtype=np.uint64)
    return hashlib.sha256(sums.tobytes() + data[whole:].tobytes()).hexdigest()[:32]


def is_finite(leaf: jax.Array | np.ndarray) -> bool:
    """Whether no element is NaN or infinite; where the array is, without compiling anything for a CPU."""
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return True
    if isinstance(leaf, np.ndarray) or all(device.platform == "cpu" for device in leaf.devices()):
        return _all_finite(np.asarray(leaf))
    return bool(jnp.isfinite(leaf).all())


def _all_finite(array: np.ndarray) -> bool:
    """By exponent bits: NumPy has no fast isfinite for bfloat16."""
    bits, mask = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80)}[
        str(array.dtype)
    ]
    flat = array.ravel(order="K").view(bits)
    # In pieces that stay in a processor's cache: five times as fast.
    pieces = (flat[i : i + _PIECE] for i in range(0, len(flat), _PIECE))
    return not any((piece & bits(mask)).max() == mask for piece in pieces)


def check_fits(name: str, before: Any, after: Any) -> None:
    """Refuses a cast of finite numbers that made infinities of some.

    Args:
        name: of the weight, for the message.
        before: the array.
        after: the same numbers in another dtype.

    Raises:
        LlamaJaxError: if `after` is not finite.
    """
    if before.dtype == after.dtype or _largest(after.dtype) >= _largest(before.dtype) or is_finite(after):
        return
    value = float(jnp.abs(before).max())
    raise LlamaJaxError(
        f"{name} holds {value:g}: {after.dtype} has numbers up to {_largest(after.dtype):g}: expected a dtype of a "
        "wider range, bfloat16 or float32"
    )


def available_memory() -> int | None:
    """Bytes that can be taken without others losing theirs; None where the system does not say.

    Linux's own estimate, and the limit of the container where there is one.
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
    """Refuses weights that are floats in memory only, where they do not fit.

    Args:
        path: of the file, for the message.
        what: says which weights these are.
        needed: bytes of all weights.

    Raises:
        LlamaJaxError: if more is needed than there is.
    """
    available = available_memory()
    if what and available is not None and needed > available:
        raise LlamaJaxError(
            f"{path}: {what} are floats in memory: {needed / (1 << 30):.1f} GiB in all, "
            f"{available / (1 << 30):.1f} GiB are available: pack them first, weight by weight: llamajax quantize "
            f"--model={path} --output=…"
        )


def _largest(dtype: Any) -> float:
    return float(ml_dtypes.finfo(dtype).max)
