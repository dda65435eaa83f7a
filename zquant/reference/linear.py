"""Integer matrix products in plain NumPy, exact in int64: the oracle of ``matmul_integer`` and ``qlinear_matmul``."""
from __future__ import annotations

import numpy as np

__all__ = ["matmul_integer", "qlinear_matmul"]


def _centred(a, zero_point, of_rows):
    """a - zero_point in int64; a vector of zero points belongs to the rows of the left or the columns of the right."""
    zero = np.asarray(0 if zero_point is None else zero_point).astype(np.int64)
    return a.astype(np.int64) - (zero[:, None] if of_rows and zero.size > 1 else zero)


def matmul_integer(a, b, a_zero_point=None, b_zero_point=None):
    """ONNX MatMulInteger: (a - a_zero_point) @ (b - b_zero_point) as int32 (modulo 2^32)."""
    return (_centred(a, a_zero_point, True) @ _centred(b, b_zero_point, False)).astype(np.int32)


def qlinear_matmul(a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point):
    """ONNX QLinearMatMul: saturate(rint(product * a_scale * b_scale / y_scale) + y_zero_point), scales in float64."""
    acc = _centred(a, a_zero_point, True) @ _centred(b, b_zero_point, False)
    a_scale, b_scale, y_scale = (np.asarray(s, np.float64) for s in (a_scale, b_scale, y_scale))
    factor = (a_scale[:, None] if a_scale.size > 1 else a_scale) * b_scale / y_scale
    y_zero_point = np.asarray(y_zero_point)
    limits = np.iinfo(y_zero_point.dtype)
    y = np.rint(acc * factor) + y_zero_point.astype(np.float64)
    return np.clip(y, limits.min, limits.max).astype(y_zero_point.dtype)
