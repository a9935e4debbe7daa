"""Quantized weights for JAX: usable without `llamajax`. Here: the matrix product that every weight goes through."""

from quant.matmul import einsum

__all__ = ["einsum"]
