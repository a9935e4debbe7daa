"""llama.cpp's file types for `yardstick.py`: its own quantization of our float weights, read back packed.

Each tensor is made by `ggml_quantize_chunk` of the wheel `xllamacpp`, in the type that llama.cpp's quantizer chooses
(`tests/llamacpp.py`), and the file is loaded by our GGUF reader: packed weights stay packed, so that the product that
is measured is ours for both.
"""

import importlib.util
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

import llamajax
from llamajax.families import tensors
from llamajax.parameters import Place, inputs
from llamajax.quantization import calibrate

_ROOT = Path(__file__).resolve().parents[1]
TYPES = ("Q2_K", "Q3_K_M", "IQ4_XS", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def check_types(types: list[str]) -> None:
    """Refuses, before any work, types that cannot be made.

    Raises:
        LlamaJaxError: if a package is missing, or a type is unknown.
    """
    missing = [name for name in ("xllamacpp", "gguf", "pytest") if importlib.util.find_spec(name) is None]
    if types and missing:
        raise llamajax.LlamaJaxError(
            f"--types={','.join(types)}: needs {', '.join(missing)}: pip install 'llamajax[parity]', or give --types="
        )
    if types:
        known = _judge().FILE_TYPES
        for kind in types:
            if kind not in known:
                raise llamajax.LlamaJaxError(f"--types={kind}: expected some of {', '.join(known)}")


def quantize_file(source: Path, target: Path, kind: str, importance: Mapping[str, np.ndarray] | None) -> int:
    """Quantizes a file of floats to a type, with llama.cpp.

    Returns:
        The number of bytes of all tensors.
    """
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)  # It tells what it writes.
    _judge().quantize(source, target, kind, importance)
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(target).tensors)


def importance_matrix(model: llamajax.Llama, windows_WT: np.ndarray) -> dict[str, np.ndarray]:
    """Returns what `llama-imatrix` collects: the mean square of each input of the layers' matrices, by tensor name.

    As in `llama-imatrix`, the embedding has no entry, even if it serves as the head.

    Args:
        model: the float model.
        windows_WT: windows of the calibration text.
    """
    config = model.config
    tensor_of = {place: name for name, places in tensors(config, "gguf").items() for place in places}
    embed = jax.jit(llamajax.Llama.embed)
    x_WTD = np.concatenate([np.asarray(embed(model, row[None])) for row in windows_WT])
    means = {}
    for layer in range(config.num_layers):
        block, numbers, groups = model.layer(layer), config.numbers(layer), inputs(config, layer)
        first = {group: members[0] for group, members in groups.items()}
        seen = calibrate.observe(block, x_WTD, first, hessians=False, numbers=numbers)
        for group, members in groups.items():
            mean_K = np.array(seen[group].mean_square_K, np.float32)
            means |= {tensor_of[Place(name, layer)]: mean_K for name in members}
        x_WTD = calibrate.advance(block, x_WTD, numbers)
    return means


def _judge():
    """Imports `tests/llamacpp.py`, which is not installed with the package."""
    if str(_ROOT) not in sys.path:
        sys.path.append(str(_ROOT))
    from tests import llamacpp

    return llamacpp
