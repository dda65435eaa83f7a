"""The kernels as functions on NumPy arrays: quantizers, integer and float linear layers, Transformer operators.

Arrays in, arrays out; nothing here knows models. Every result has the same bits at every dispatch level and for any
number of threads.
"""
from __future__ import annotations

from .linear import linear, linear_grouped, linear_w8a8, matmul_integer, qlinear_matmul

__all__ = ["linear", "linear_w8a8", "linear_grouped", "matmul_integer", "qlinear_matmul"]
