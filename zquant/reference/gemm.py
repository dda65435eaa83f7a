"""Linear layers in plain NumPy: exact integer products, float64 epilogues. The oracle of ``zquant.ops.linear``."""
from __future__ import annotations

import math

import numpy as np

from .quantize import quantize_per_token, quantize_weight

__all__ = ["activate", "linear", "linear_w8a8", "linear_grouped", "llm_int8", "quantize_int16"]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def activate(y: np.ndarray, name: str | None) -> np.ndarray:
    """Apply an activation by name to float64 values: relu, gelu (erf), gelu_tanh, silu, or None."""
    if name is None:
        return y
    if name == "relu":
        return np.maximum(y, 0.0)
    if name == "gelu":
        return y * 0.5 * (1.0 + _erf(y / math.sqrt(2.0)))
    if name == "gelu_tanh":
        return 0.5 * y * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * y**3)))
    if name == "silu":
        return 0.5 * y * (1.0 + np.tanh(0.5 * y))
    raise ValueError(f"activation: unknown name {name!r}")


def _finish(y: np.ndarray, bias: np.ndarray | None, activation: str | None, residual: np.ndarray | None) -> np.ndarray:
    if bias is not None:
        y = y + bias.astype(np.float64)
    y = activate(y, activation)
    if residual is not None:
        y = y + residual.astype(np.float64)
    return y


def linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None, activation: str | None = None,
           residual: np.ndarray | None = None) -> np.ndarray:
    """y = act(x w^T + bias) + residual in float64."""
    return _finish(x.astype(np.float64) @ w.astype(np.float64).T, bias, activation, residual)


def quantize_int16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int16 codes (m, k) and float32 scales (m,) of float32 rows: a = rint(x * (32767 / amax)), scale = amax / 32767.

    Rows whose amax is below 32767 times the smallest normal number have scale 1 and codes 0.
    """
    amax = np.abs(x).max(axis=1, initial=0.0).astype(np.float32)
    usable = amax >= np.finfo(np.float32).tiny * np.float32(32767)
    safe = np.where(usable, amax, np.float32(1))
    factor = np.where(usable, np.float32(32767) / safe, np.float32(0)).astype(np.float32)
    codes = np.clip(np.rint(x * factor[:, None]), -32767, 32767).astype(np.int16)
    return codes, np.where(usable, safe / np.float32(32767), np.float32(1)).astype(np.float32)


def linear_w8a8(q: np.ndarray, x_scale: np.ndarray, x_zero: np.ndarray, codes: np.ndarray, scale: np.ndarray,
                bias: np.ndarray | None = None, activation: str | None = None,
                residual: np.ndarray | None = None) -> np.ndarray:
    """y = act((q - zero) codes^T * x_scale * scale + bias) + residual: the product exact, the rest float64.

    q may also be int16 codes of :func:`quantize_int16`, with zero points of 0.
    """
    acc = (q.astype(np.int64) - x_zero.astype(np.int64)[:, None]) @ codes.astype(np.int64).T
    return _finish(acc * x_scale.astype(np.float64)[:, None] * scale.astype(np.float64), bias, activation, residual)


def linear_grouped(q: np.ndarray, x_scale: np.ndarray, x_zero: np.ndarray, codes: np.ndarray, scales: np.ndarray,
                   group_size: int, bias: np.ndarray | None = None, activation: str | None = None,
                   residual: np.ndarray | None = None) -> np.ndarray:
    """y = act(sum_g (q_g - zero) codes_g^T * scales_g * x_scale + bias) + residual."""
    columns = np.arange(codes.shape[1]) // min(group_size, max(codes.shape[1], 1))
    w = codes.astype(np.float64) * scales.astype(np.float64)[:, columns]
    x = q.astype(np.float64) - x_zero.astype(np.float64)[:, None]
    return _finish((x @ w.T) * x_scale.astype(np.float64)[:, None], bias, activation, residual)


def llm_int8(x: np.ndarray, w: np.ndarray, threshold: float, bias: np.ndarray | None = None,
             symmetric: bool = True) -> np.ndarray:
    """LLM.int8(): columns of x with a value of at least the threshold in float64, the rest as codes of 8 bits."""
    outlier = (np.abs(x) >= threshold).any(axis=0)
    rest = np.where(outlier, np.float32(0), x)
    q, x_scale, x_zero = quantize_per_token(rest, symmetric)
    codes, scales, _ = quantize_weight(w, 8)
    y = linear_w8a8(q, x_scale, np.zeros(len(x)) if x_zero is None else x_zero, codes, scales[:, 0], bias)
    return y + x[:, outlier].astype(np.float64) @ w[:, outlier].T.astype(np.float64)
