"""One lowering per backend for products with quantized weights, each beside its reference in `quant.matmul`."""
