"""Integer matrix products in plain NumPy, exact in int64."""
from __future__ import annotations

import numpy as np

from .quantize import quantize_linear

__all__ = ["matmul_integer", "qlinear_matmul"]


def _centred(a: np.ndarray, zero_point, rows: bool) -> np.ndarray:
    """a - zero_point in int64; a vector of zero points belongs to the rows of the left or the columns of the right."""
    if zero_point is None:
        return a.astype(np.int64)
    zero = np.asarray(zero_point).astype(np.int64)
    return a.astype(np.int64) - (zero[:, None] if rows and zero.ndim == 1 and zero.size > 1 else zero)


def matmul_integer(a, b, a_zero_point=None, b_zero_point=None):
    """ONNX MatMulInteger: (a - a_zero_point) @ (b - b_zero_point) as int32 (modulo 2^32)."""
    return (_centred(a, a_zero_point, True) @ _centred(b, b_zero_point, False)).astype(np.int32)


def qlinear_matmul(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point):
    """ONNX QLinearMatMul: the product re-quantized to the type of y_zero_point.

    The accumulator is exact; a_scale * b_scale / y_scale is computed in the type of the scales and applied in float32.
    """
    acc = _centred(a, a_zero_point, True) @ _centred(b, b_zero_point, False)
    factor = np.asarray(a_scale) * np.asarray(b_scale) / np.asarray(y_scale)
    y_zero_point = np.asarray(y_zero_point)
    scaled = acc.astype(np.float32) * factor.astype(np.float32)
    return quantize_linear(scaled, np.float32(1), y_zero_point, y_zero_point.dtype)
