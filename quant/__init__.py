"""Quantized weights for JAX: usable without `llamajax`.

    quantized = quantize_rtn(weight_DF, "int4", group_size=32)    # 4.5 bits a weight
    y_BF = einsum("BD,DF->BF", x_BD, quantized)                   # the same call as with an array

FORMAT.md specifies the bytes; `QTensor` is the pytree that holds them.
"""

from quant.activations import quantize_activations, round_activations
from quant.awq import search_scale
from quant.gptq import quantize_gptq
from quant.hqq import quantize_hqq
from quant.kernels import start_indices
from quant.matmul import einsum, take_rows
from quant.outliers import outlier_channels, split_outliers
from quant.packing import FORMAT_VERSION, pack, unpack
from quant.prepare import aligned_copy, aligned_empty, compiler_options, prepare
from quant.probe import Probe
from quant.qtensor import QTensor, dequantize, dequantize_runs
from quant.rtn import quantize_rtn
from quant.runs import LayerRuns, scan_layers, split_runs
from quant.scheme import SCHEMES, Scheme
from quant.smoothquant import smoothing_scale

__all__ = [
    "FORMAT_VERSION",
    "SCHEMES",
    "LayerRuns",
    "Probe",
    "QTensor",
    "Scheme",
    "aligned_copy",
    "aligned_empty",
    "compiler_options",
    "dequantize",
    "dequantize_runs",
    "einsum",
    "outlier_channels",
    "pack",
    "prepare",
    "quantize_activations",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_rtn",
    "round_activations",
    "scan_layers",
    "search_scale",
    "smoothing_scale",
    "split_outliers",
    "split_runs",
    "start_indices",
    "take_rows",
    "unpack",
]
