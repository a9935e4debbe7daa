"""Quantized weights for JAX: usable without `llamajax`.

    quantized = quantize_rtn(weight_DF, "int4", group_size=32)    # 4.5 bits per weight
    y_BF = product(x_BD, quantized)                               # the same call as with an array

FORMAT.md specifies the bytes; `QTensor` is the pytree that holds them.
"""

from quant import bitnet, ggml
from quant.activations import quantize_activations, round_activations
from quant.awq import search_scale
from quant.budget import allocate
from quant.description import WEIGHT_DTYPES, abstract_weight, describe, kinds, schemes
from quant.gptq import quantize_gptq
from quant.grid import with_offset
from quant.hessian import add_to_hessian
from quant.hqq import quantize_hqq
from quant.kernels import Layout, start_indices
from quant.kernels.cpu import TiledWeight
from quant.kernels.cpu_sums import sum_steps
from quant.mixed import Mixed, is_laid_out, kind_of, map_quantized, quantized, with_activations, with_layer
from quant.outliers import outlier_channels, split_outliers
from quant.packing import FORMAT_VERSION, pack, unpack
from quant.prepare import BACKENDS, aligned_copy, aligned_empty, compiler_options, lowerings, prepare
from quant.probe import Probe
from quant.propagation import missing_by_inputs, propagated
from quant.qtensor import QTensor, dequantize, dequantize_runs, has_nan_scales
from quant.recipe import Recipe, Rule, assign, recipe_from
from quant.rtn import quantize_rtn
from quant.scheme import SCHEMES, Scheme
from quant.smoothquant import smoothing_scale
from quant.two_levels import quantize_two_levels, with_float_scales, with_scales_of
from quant.weight import Weight, is_weight, layer_of, nbytes, product, rows, scan_layers, values, view

__all__ = [
    "BACKENDS",
    "FORMAT_VERSION",
    "SCHEMES",
    "WEIGHT_DTYPES",
    "Layout",
    "Mixed",
    "Probe",
    "QTensor",
    "Recipe",
    "Rule",
    "Scheme",
    "TiledWeight",
    "Weight",
    "abstract_weight",
    "add_to_hessian",
    "aligned_copy",
    "aligned_empty",
    "allocate",
    "assign",
    "bitnet",
    "compiler_options",
    "dequantize",
    "dequantize_runs",
    "describe",
    "ggml",
    "has_nan_scales",
    "is_laid_out",
    "is_weight",
    "kind_of",
    "kinds",
    "layer_of",
    "lowerings",
    "map_quantized",
    "missing_by_inputs",
    "nbytes",
    "outlier_channels",
    "pack",
    "prepare",
    "product",
    "propagated",
    "quantize_activations",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_rtn",
    "quantize_two_levels",
    "quantized",
    "recipe_from",
    "round_activations",
    "rows",
    "scan_layers",
    "schemes",
    "search_scale",
    "smoothing_scale",
    "split_outliers",
    "start_indices",
    "sum_steps",
    "unpack",
    "values",
    "view",
    "with_activations",
    "with_float_scales",
    "with_layer",
    "with_offset",
    "with_scales_of",
]
