"""Quantizers and bit packing in plain NumPy; :mod:`zquant.ops` has the same names with C behind them.

Everything is computed in float32, in the operations and the order written here, so results are equal bit for bit.
Arguments are taken as they are: checking them is the business of :mod:`zquant.ops`.
"""
from __future__ import annotations

import numpy as np

__all__ = [
    "absmax_scale", "dequantize_linear", "dequantize_per_token", "dequantize_weight", "dynamic_quantize_linear", "pack",
    "quantize_linear", "quantize_per_token", "quantize_weight", "quantize_weight_blocks", "range_scale", "unpack",
]

FLT_MIN = np.finfo(np.float32).tiny


def absmax_scale(amax: np.ndarray, levels: int) -> np.ndarray:
    """amax / levels; 0 where that is denormal, which stands for: scale 1, all codes 0; less where levels of it overflow."""
    amax, n = np.asarray(amax, np.float32), np.float32(levels)
    scale = amax / n
    with np.errstate(over="ignore"):
        scale = np.where(np.isinf(scale * n), np.nextafter(scale, np.float32(0)), scale)
    return np.where(amax < FLT_MIN * n, np.float32(0), scale)


def range_scale(lo: np.ndarray, hi: np.ndarray, levels: int) -> np.ndarray:
    """(hi - lo) / levels for lo <= 0 <= hi, without overflow; 0 as in :func:`absmax_scale`."""
    n = np.float32(levels)
    with np.errstate(over="ignore"):
        width = hi - lo
    return np.where(np.isinf(width), hi / n - lo / n, absmax_scale(width, levels))


def _lo_hi(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Range of the last axis, widened to contain 0, so that 0 is representable exactly. Zeros are +0."""
    zero = np.float32(0)
    return x.min(-1, initial=0) + zero, x.max(-1, initial=0) + zero


def quantize_per_token(x, symmetric=True):
    """Dynamic: one scale per row of the last axis, multiplied with its inverse (127 / amax or 255 / width)."""
    if symmetric:
        amax = np.abs(x).max(-1, initial=0)
        scale = absmax_scale(amax, 127)
        used = scale > 0
        inv = np.where(used, np.float32(127) / np.where(used, amax, np.float32(1)), np.float32(0))
        q = np.clip(np.rint(x * inv[..., None]), -127, 127).astype(np.int8)
        return q, np.where(used, scale, np.float32(1)), None
    lo, hi = _lo_hi(x)
    scale = range_scale(lo, hi, 255)
    used = scale > 0
    safe = np.where(used, scale, np.float32(1))
    with np.errstate(over="ignore"):
        width = hi - lo
    inv = np.where(np.isinf(width), np.float32(1) / safe, np.float32(255) / np.where(used, width, np.float32(255)))
    inv = np.where(used, inv, np.float32(0))
    zero = np.clip(np.rint(-lo * inv), 0, 255)
    q = np.clip(np.rint(x * inv[..., None]) + zero[..., None], 0, 255).astype(np.uint8)
    return q, safe, zero.astype(np.int32)


def dequantize_per_token(q, scale, zero_point=None):
    """(q - zero_point) * scale, one of each per row of the last axis."""
    zero = 0 if zero_point is None else np.asarray(zero_point)[..., None]
    return (q.astype(np.int32) - zero).astype(np.float32) * np.asarray(scale)[..., None]


_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3),
           "int16": (-32768, 32767), "uint16": (0, 65535)}


def _spread(a, shape, axis, block_size):
    """A scale or zero point as something that broadcasts against `shape`."""
    a = np.asarray(a)
    if block_size:
        return np.repeat(a, block_size, axis).take(np.arange(shape[axis]), axis)
    if axis is None or a.size == 1:
        return a.reshape(())
    return a.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def quantize_linear(x, scale, zero_point=None, dtype=np.int8, axis=None, block_size=0):
    """ONNX QuantizeLinear: saturate(rint(x / scale) + zero_point); codes of less than 8 bits in whole bytes."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    lo, hi = _RANGES[name]
    storage = np.dtype(name if name.endswith(("8", "16")) else "int8" if lo < 0 else "uint8")
    zero = 0 if zero_point is None else _spread(zero_point, x.shape, axis, block_size).astype(np.int32)
    with np.errstate(over="ignore"):  # a quotient that overflows saturates like any other
        scaled = np.rint(x / _spread(scale, x.shape, axis, block_size))
    # In float64 the sum of an integer below 2^24 and a zero point is exact.
    return np.clip(scaled.astype(np.float64) + zero, lo, hi).astype(storage)


def dequantize_linear(q, scale, zero_point=None, axis=None, block_size=0):
    """ONNX DequantizeLinear: (q - zero_point) * scale in the type of the scale."""
    scale = _spread(scale, q.shape, axis, block_size)
    zero = 0 if zero_point is None else _spread(zero_point, q.shape, axis, block_size).astype(np.int32)
    return (q.astype(np.int32) - zero).astype(scale.dtype) * scale


def dynamic_quantize_linear(x):
    """ONNX DynamicQuantizeLinear: uint8 over the range of all of x with 0; division, not multiplication."""
    lo, hi = _lo_hi(x.reshape(-1))
    scale = range_scale(lo, hi, 255)
    if scale == 0:
        return np.zeros(x.shape, np.uint8), np.float32(1), np.uint8(0)
    zero = np.clip(np.rint(-lo / scale), 0, 255).astype(np.uint8)
    return quantize_linear(x, scale, zero, np.uint8), np.float32(scale), zero


def _groups(w, group_size):
    """(n, groups, group) with the tail group padded with zeros, which change neither |max| nor a range with 0."""
    n, k = w.shape
    size = max(min(group_size or k, k), 1)
    groups = -(-k // size)
    padded = np.zeros((n, groups * size), w.dtype)
    padded[:, :k] = w
    return padded.reshape(n, groups, size)


def quantize_weight(w, bits=8, group_size=None, symmetric=True):
    """One scale per run of `group_size` inputs of an output row; codes by division with the float32 scale."""
    w3, k = _groups(w, group_size), w.shape[1]
    if symmetric:
        qmax = 2 ** (bits - 1) - 1
        scale = absmax_scale(np.abs(w3).max(-1, initial=0), qmax)
        zero, lo = np.zeros(scale.shape, np.float32), -qmax
    else:
        qmax, lo = 2**bits - 1, 0
        least, most = _lo_hi(w3)
        scale = range_scale(least, most, qmax)
        zero = np.clip(np.rint(-least / np.where(scale > 0, scale, np.inf)), 0, qmax)
    used = scale > 0
    scale = np.where(used, scale, np.float32(1))
    codes = np.clip(np.rint(w3 / scale[..., None]) + zero[..., None], lo, qmax) * used[..., None]
    codes = codes.reshape(len(w), w3.shape[1] * w3.shape[2])[:, :k].astype(np.int8 if symmetric else np.uint8)
    return codes, scale, None if symmetric else zero.astype(np.int32)


def quantize_weight_blocks(w, num_blocks, bits=8):
    """ZeroQuant's grouping: num_blocks blocks of whole rows share a symmetric scale each; scales written per row."""
    n, k = w.shape
    codes, scales, _ = quantize_weight(w.reshape(num_blocks, -1), bits)
    if w.size == 0:
        scales = np.ones((num_blocks, 1), np.float32)
    return codes.reshape(n, k), np.repeat(scales, n // num_blocks, 0)


def dequantize_weight(codes, scales, zeros=None, group_size=None):
    """(codes - zeros) * scales, each scale for `group_size` inputs."""
    c3 = _groups(codes.astype(np.int32), group_size)
    zero = 0 if zeros is None else zeros.reshape(c3.shape[:2])[..., None]
    w3 = (c3 - zero).astype(np.float32) * scales.reshape(c3.shape[:2])[..., None]
    return w3.reshape(len(w3), w3.shape[1] * w3.shape[2])[:, : codes.shape[1]].copy()


def pack(codes, bits):
    """The low `bits` bits of each code of the last axis, as one dense stream, least significant bit first."""
    planes = np.unpackbits(np.asarray(codes).view(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(planes.reshape(*codes.shape[:-1], codes.shape[-1] * bits), axis=-1, bitorder="little")


def unpack(packed, bits, count, signed):
    """The inverse of :func:`pack`: `count` codes per row, sign-extended to int8 if signed."""
    stream = np.unpackbits(packed, axis=-1, bitorder="little")[..., : count * bits]
    planes = stream.reshape(*packed.shape[:-1], count, bits)
    codes = (planes.astype(np.int32) << np.arange(bits)).sum(-1)
    if signed:
        return (codes - (codes >> (bits - 1) << bits)).astype(np.int8)
    return codes.astype(np.uint8)
