"""Linear layers on NumPy arrays: float32, int8 and grouped int4/int8 weights, and ONNX's integer products."""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import _core

__all__ = ["linear", "linear_w8a8", "linear_grouped", "matmul_integer", "qlinear_matmul", "ACTIVATIONS"]

#: Activation names that linear layers fuse, and their codes in the C core.
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_QUANT = {"symmetric": 1, "asymmetric": 2}
_INPUTS = {**_QUANT, "int16": 3}


def _activation(name: str | None) -> int:
    if not (name is None or isinstance(name, str)) or name not in ACTIVATIONS:
        known = ", ".join(str(a) for a in ACTIVATIONS)
        raise ValueError(f"activation: expected one of {known}, got {name!r}")
    return ACTIVATIONS[name]


def _inputs(name: str) -> int:
    """How x is quantized, in the C core's codes."""
    if not isinstance(name, str) or name not in _INPUTS:
        raise ValueError(f"activations: expected 'asymmetric', 'symmetric' or 'int16', got {name!r}")
    return _INPUTS[name]


def _scales(value: Any, name: str, dtype: type = np.float64, positive: bool = False) -> np.ndarray:
    """A number, or an array of them, as finite (and, where it is divided by, positive) floats."""
    a = np.asarray(value)
    if a.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected a number or an array of numbers, got {_shown(value, a)}")
    with np.errstate(over="ignore"):  # a number beyond the type becomes Inf, which is refused below
        a = a.astype(dtype)
    bad = ~np.isfinite(a) | ((a <= 0) & positive)
    if bad.any():
        raise ValueError(f"{name}: expected finite{' positive' * positive} values, got {np.asarray(value)[bad].flat[0]}")
    return a


def _shown(value: Any, array: np.ndarray) -> str:
    return f"an array of {array.dtype}" if array.ndim else repr(value)


def _zero_points(value: Any, name: str, dtype: Any) -> np.ndarray:
    """An integer, or an array of them (floats too that are whole), in the range of a type, as int32."""
    a, info = np.asarray(value), np.iinfo(dtype)
    if a.dtype.kind not in "fiu":
        raise TypeError(f"{name}: expected an integer or an array of integers, got {_shown(value, a)}")
    bad = (a != np.rint(a)) | (a < info.min) | (a > info.max)  # NaN differs from itself
    if bad.any():
        raise ValueError(f"{name}: expected integers of {info.min} to {info.max}, got {a[bad].flat[0]}")
    return a.astype(np.int32)


def _sized(a: np.ndarray, count: int, name: str) -> np.ndarray:
    """One value, or one for each of ``count``, as a vector."""
    if a.size not in (1, count):
        raise ValueError(f"{name}: expected 1 or {count} values, got {a.size}")
    return a.reshape(-1)


def _rows(x: np.ndarray, name: str) -> tuple[np.ndarray, tuple[int, ...]]:
    """x as 2-D rows and its leading shape."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, got {type(x).__name__}")
    if x.ndim < 1:
        raise ValueError(f"{name}: expected at least 1 dimension, got 0")
    return x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x, x.shape[:-1]


def _output(quantize: str | tuple | None) -> int | tuple:
    """What the core calls quant_out."""
    if quantize is None:
        return 0
    if isinstance(quantize, str):
        if quantize not in _QUANT:
            raise ValueError(f"quantize: expected None, 'symmetric', 'asymmetric' or (scale, zero_point), got {quantize!r}")
        return _QUANT[quantize]
    if not isinstance(quantize, (tuple, list)) or len(quantize) != 2:
        raise ValueError(f"quantize: expected None, 'symmetric', 'asymmetric' or (scale, zero_point), got {quantize!r}")
    scale = _scales(quantize[0], "quantize: scale", np.float32, positive=True)
    return np.atleast_1d(scale), np.atleast_1d(_zero_points(quantize[1], "quantize: zero_point", np.uint8))


def _forward(handle: object, x: np.ndarray, quant: int, activation: str | None, residual: np.ndarray | None,
             quantize: str | tuple | None) -> np.ndarray | tuple:
    rows, lead = _rows(x, "x")
    if residual is not None:
        residual = _rows(residual, "residual")[0]
    _core.check_finite(rows, "x")
    out = _core.linear_forward(handle, rows, quant, _activation(activation), residual, _output(quantize))
    if quantize is None:
        return out.reshape(*lead, out.shape[1])
    if not isinstance(quantize, str):
        return np.ascontiguousarray(out).reshape(*lead, out.shape[1])
    q, scale, zero = out
    if quantize == "symmetric":  # the core keeps q + 128 with zero point 128
        q, zero = (q ^ np.uint8(128)).view(np.int8), None
    q = np.ascontiguousarray(q).reshape(*lead, q.shape[1])
    return q, scale.reshape(lead), None if zero is None else zero.reshape(lead)


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None, activation: str | None = None,
           residual: np.ndarray | None = None, quantize: str | tuple | None = None) -> np.ndarray | tuple:
    """Float32 linear layer: y = act(x w^T + bias) + residual.

    Sums run over k in order with fused multiply-add, so the result is the same at every dispatch level and for
    any number of threads. The weights are packed on each call; for repeated use keep a :class:`zquant.Linear`.

    Parameters
    ----------
    x : float32 (..., k)
    w : float32 (n, k)
    bias : float32 (n,), optional
    activation : None, "relu", "gelu" (erf), "gelu_tanh" or "silu"
    residual : float32 (..., n), optional
        Added after the activation.
    quantize : None, "symmetric", "asymmetric" or (scale, zero_point)
        Re-quantize the output in the same pass: per token and dynamic by name, or to a static uint8 grid with one
        scale and zero point (0 to 255), or one of each per feature.

    Returns
    -------
    float32 (..., n); with a named ``quantize`` a tuple (q int8 or uint8 (..., n), scale (...), zero_point (...) or
    None); with a static grid q uint8 (..., n)

    Raises
    ------
    TypeError
        An array is not float32; a scale or zero point of ``quantize`` is not a number or integer.
    ValueError
        Shapes do not match, x, w or bias has NaN or Inf (the row is named), or an option is not one of those above.

    >>> import numpy as np, zquant as zq
    >>> zq.ops.linear(np.ones((1, 3), np.float32), np.eye(2, 3, dtype=np.float32)).tolist()
    [[1.0, 1.0]]
    """
    return _forward(_core.linear_pack_f32(w, bias), x, 0, activation, residual, quantize)


def linear_w8a8(x: np.ndarray, codes: np.ndarray, scale: np.ndarray, bias: np.ndarray | None = None,
                activation: str | None = None, residual: np.ndarray | None = None,
                activations: str = "asymmetric", quantize: str | tuple | None = None) -> np.ndarray | tuple:
    """INT8 linear layer with token-wise dynamic activations (ZeroQuant, arXiv:2206.01861, section 4.1).

    Rows of x are quantized on the way in, multiplied exactly in int32, and scaled in the epilogue:
    y = act(acc * s_x[i] * scale[j] + bias) + residual, acc = (q_x - z_x) codes^T.

    Parameters
    ----------
    x : float32 (..., k)
    codes : int8 (n, k), in -127..127
    scale : float32 (n,)
        One per output channel; ZeroQuant's row blocks repeat a value.
    bias, activation, residual, quantize : as in :func:`linear`
    activations : "asymmetric" (uint8 with a zero point per token), "symmetric" (int8) or "int16"
        "int16" is for weights whose activations are not to be quantized: the scale is max|x| / 32767 per token, the
        product still exact, at twice the multiplications of the others and none of float32's weight traffic.

    Raises
    ------
    ValueError
        A code of -128, k above 66,000 (int32 accumulation is exact up to there), NaN or Inf, wrong shapes.

    >>> import numpy as np, zquant as zq
    >>> codes, scale, _ = zq.ops.quantize_weight(np.eye(2, dtype=np.float32))
    >>> zq.ops.linear_w8a8(np.float32([[1.0, 2.0]]), codes, scale[:, 0]).round(2).tolist()
    [[1.0, 2.0]]
    """
    inputs = _inputs(activations)
    return _forward(_core.linear_pack_s8(codes, scale, bias), x, inputs, activation, residual, quantize)


def linear_grouped(x: np.ndarray, codes: np.ndarray, scales: np.ndarray, group_size: int, bits: int = 4,
                   bias: np.ndarray | None = None, activation: str | None = None, residual: np.ndarray | None = None,
                   activations: str = "asymmetric", quantize: str | tuple | None = None) -> np.ndarray | tuple:
    """INT8 activations times int4 or int8 weights with one scale per group of input features (ZeroQuant-V2's
    FGQ, arXiv:2303.08302).

    y = act(s_x[i] * sum_g scales[j, g] * acc_g + bias) + residual; each group's sum is exact in int32.

    Parameters
    ----------
    x : float32 (..., k)
    codes : int8 (n, k), in -8..7 for bits=4, -127..127 for bits=8
    scales : float32 (n, ceil(k / group_size))
    group_size : a multiple of 8, or at least k for one scale per channel
    bits : 4 or 8, how codes are stored
    bias, activation, residual, activations, quantize : as in :func:`linear_w8a8`

    Raises
    ------
    ValueError
        Codes out of range, a group size that is neither a multiple of 8 nor >= k, NaN or Inf, wrong shapes.

    >>> import numpy as np, zquant as zq
    >>> w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    >>> codes, scales, _ = zq.ops.quantize_weight(w, bits=4, group_size=32)
    >>> zq.ops.linear_grouped(np.ones((2, 64), np.float32), codes, scales, 32).shape
    (2, 4)
    """
    inputs = _inputs(activations)
    handle = _core.linear_pack_group(codes, scales, group_size, bits, bias)
    return _forward(handle, x, inputs, activation, residual, quantize)


def _zero_rows(zero: np.ndarray | int | None, m: int, name: str, dtype: Any) -> np.ndarray | None:
    """A zero point (scalar, or one per row) in the range of a type, as int32 (m,)."""
    if zero is None:
        return None
    return np.ascontiguousarray(np.broadcast_to(_sized(_zero_points(zero, name, dtype), m, name), (m,)))


def matmul_integer(a: np.ndarray, b: np.ndarray, a_zero_point: np.ndarray | int | None = None,
                   b_zero_point: np.ndarray | int | None = None) -> np.ndarray:
    """ONNX MatMulInteger: (a - a_zero_point) (b - b_zero_point), exact in int32.

    Parameters
    ----------
    a : int8 or uint8 (..., m, k)
    b : int8 or uint8 (k, n), or with the same leading dimensions as a
    a_zero_point : scalar or (m,), of a's range
    b_zero_point : scalar or (n,), of b's range

    Returns
    -------
    int32 (..., m, n)

    Raises
    ------
    TypeError
        a or b of another type; zero points that are not integers.
    ValueError
        Shapes that do not match; zero points out of the range of a's or b's type.

    >>> import numpy as np, zquant as zq
    >>> zq.ops.matmul_integer(np.uint8([[11, 7]]), np.uint8([[1], [2]]), 12, 0).tolist()
    [[-11]]
    """
    for name, x in (("a", a), ("b", b)):
        if not isinstance(x, np.ndarray) or x.dtype not in (np.int8, np.uint8):
            got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
            raise TypeError(f"{name}: expected int8 or uint8, got {got}")
        if x.ndim < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions, got {x.ndim}")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"b: expected {a.shape[-1]} rows, got {b.shape[-2]}")
    if a.ndim > 2 or b.ndim > 2:
        lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a3 = np.broadcast_to(a, (*lead, *a.shape[-2:])).reshape(-1, *a.shape[-2:])
        b3 = np.broadcast_to(b, (*lead, *b.shape[-2:])).reshape(-1, *b.shape[-2:])
        out = [matmul_integer(x, y, a_zero_point, b_zero_point) for x, y in zip(a3, b3)]
        return np.stack(out).reshape(*lead, a.shape[-2], b.shape[-1]) if out else np.zeros(
            (*lead, a.shape[-2], b.shape[-1]), np.int32)
    m, n = a.shape[0], b.shape[1]
    za = _zero_rows(a_zero_point, m, "a_zero_point", a.dtype)
    zb = _zero_rows(b_zero_point, n, "b_zero_point", b.dtype)
    # The kernel multiplies by int8 codes in -127..127; other codes split into two such matrices.
    wide = b.T.astype(np.int16) - (0 if zb is None else zb.astype(np.int16)[:, None])
    half = np.clip(wide, -127, 127)
    total = np.zeros((m, n), np.int32)
    ones = np.ones(n, np.float32)
    while True:
        total += _core.gemm_s32(a, _core.linear_pack_s8(np.ascontiguousarray(half, np.int8), ones, None), za)
        wide = wide - half
        if not wide.any():
            return total
        half = np.clip(wide, -127, 127)


def qlinear_matmul(a: np.ndarray, a_scale: np.ndarray, a_zero_point: np.ndarray, b: np.ndarray, b_scale: np.ndarray,
                   b_zero_point: np.ndarray, y_scale: np.ndarray, y_zero_point: np.ndarray) -> np.ndarray:
    """ONNX QLinearMatMul: quantize((a - a_zero) (b - b_zero) * a_scale * b_scale / y_scale) to y's grid.

    Scales and zero points are scalars or, for a, one per row, for b and y one per column. The result has the type
    of ``y_zero_point``; values are rounded half to even and saturate.

    Raises
    ------
    TypeError
        a, b or y_zero_point that is neither int8 nor uint8; scales that are not numbers, zero points that are not integers.
    ValueError
        Shapes that do not match; scales that are not finite, a y_scale that is not positive; zero points out of range.

    >>> import numpy as np, zquant as zq
    >>> one, zero = np.float32(1), np.uint8(0)
    >>> zq.ops.qlinear_matmul(np.uint8([[2]]), one, zero, np.uint8([[3]]), one, zero, one, zero).tolist()
    [[6]]
    """
    scales = _scales(a_scale, "a_scale"), _scales(b_scale, "b_scale"), _scales(y_scale, "y_scale", positive=True)
    acc = matmul_integer(a, b, a_zero_point, b_zero_point)
    dtype = np.asarray(y_zero_point).dtype
    if dtype not in (np.int8, np.uint8):
        raise TypeError(f"y_zero_point: expected int8 or uint8, got {dtype}")
    m, n = acc.shape[-2:]
    row = _sized(scales[0], m, "a_scale").reshape(-1, 1)
    ratio = row * _sized(scales[1], n, "b_scale") / _sized(scales[2], n, "y_scale")
    info = np.iinfo(dtype)
    y = np.rint(acc * ratio) + _sized(np.asarray(y_zero_point), n, "y_zero_point").astype(np.float64)
    return np.clip(y, info.min, info.max).astype(dtype)
