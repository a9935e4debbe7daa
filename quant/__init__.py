"""Quantized weights for JAX: usable without `llamajax`.

    quantized = quantize_rtn(weight_DF, "int4", group_size=32)    # 4.5 bits a weight
    y_BF = einsum("BD,DF->BF", x_BD, quantized)                   # the same call as with an array

FORMAT.md specifies the bytes; `QTensor` is the pytree that holds them.
"""

from quant.awq import search_scale
from quant.gptq import quantize_gptq
from quant.hqq import quantize_hqq
from quant.matmul import einsum, take_rows
from quant.packing import FORMAT_VERSION, pack, unpack
from quant.qtensor import QTensor, dequantize
from quant.rtn import quantize_rtn
from quant.scheme import SCHEMES, Scheme

__all__ = [
    "FORMAT_VERSION",
    "SCHEMES",
    "QTensor",
    "Scheme",
    "dequantize",
    "einsum",
    "pack",
    "quantize_gptq",
    "quantize_hqq",
    "quantize_rtn",
    "search_scale",
    "take_rows",
    "unpack",
]
