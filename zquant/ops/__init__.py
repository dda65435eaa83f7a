"""The kernels as functions on NumPy arrays: quantizers, integer and float linear layers, Transformer operators.

Arrays in, arrays out; nothing here knows models. Every result has the same bits at every dispatch level and for any
number of threads. :mod:`zquant.reference` has the same functions in plain NumPy.
"""
from __future__ import annotations

from .linear import linear, linear_grouped, linear_w8a8, matmul_integer, qlinear_matmul
from .quantize import (
    dequantize_linear,
    dequantize_per_token,
    dequantize_weight,
    dynamic_quantize_linear,
    pack,
    quantize_linear,
    quantize_per_token,
    quantize_weight,
    quantize_weight_blocks,
    unpack,
)

__all__ = [
    "dequantize_linear", "dequantize_per_token", "dequantize_weight", "dynamic_quantize_linear", "linear", "linear_grouped",
    "linear_w8a8", "matmul_integer", "pack", "qlinear_matmul", "quantize_linear", "quantize_per_token", "quantize_weight",
    "quantize_weight_blocks", "unpack",
]
