"""Quantizers and bit packing.

Everywhere ``x_hat = (q - zero_point) * scale``: scales multiply on dequantization, rounding is half to even, symmetric
codes use the range -(2^(b-1) - 1) .. 2^(b-1) - 1, and a range with 0 in it makes 0 exact. Input must be float32 and
finite: NaN or Inf is a ValueError that names the array and its row. Arrays may have any strides, alignment and byte
order. Results are the same bits at every dispatch level and for any number of threads.

A range too small for a normal float32 scale counts as zero: scale 1, and codes that dequantize to 0.
"""
from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _core

__all__ = [
    "dequantize_linear", "dequantize_per_token", "dequantize_weight", "dynamic_quantize_linear", "pack", "quantize_linear",
    "quantize_per_token", "quantize_weight", "quantize_weight_blocks", "unpack",
]

Array = npt.NDArray[Any]

#: Code types of the ONNX operators: least and greatest code. Codes below 8 bits are held in whole bytes.
CODE_RANGES = {
    "int2": (-2, 1), "uint2": (0, 3), "int4": (-8, 7), "uint4": (0, 15),
    "int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535),
}


@functools.cache
def _type_name(dtype: np.dtype[Any]) -> str:
    """Name of a type in any byte order. NumPy makes it anew each time, which takes longer than a small operator."""
    return str(dtype.newbyteorder("=").name)


def _array(x: Any, name: str, *dtypes: str) -> Array:
    """x itself if it is an array of one of the types (in any byte order); TypeError otherwise."""
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: expected a NumPy array of {' or '.join(dtypes)}, got {type(x).__name__}")
    if _type_name(x.dtype) not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(dtypes)}, got {x.dtype}")
    return x


def _rows(x: Any, name: str, *dtypes: str) -> Array:
    """x as (rows, last axis)."""
    x = _array(x, name, *dtypes)
    if x.ndim == 0:
        raise ValueError(f"{name}: expected at least 1 dimension, got 0")
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _same_shape(a: Array, shape: tuple[int, ...], name: str) -> Array:
    if a.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {a.shape}")
    return a


def _int32(a: Any, name: str, lo: int = -(2**31), hi: int = 2**31 - 1) -> Array:
    """An integer or an array of integers as int32."""
    a = np.asarray(a)
    if a.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got {a.dtype}")
    if a.size and (a.min() < lo or a.max() > hi):
        raise ValueError(f"{name}: expected {lo} to {hi}, got {a.min()} to {a.max()}")
    return a.astype(np.int32)


def _scale(scale: Any, positive: bool) -> Array:
    """A number or a float32 array of finite (and, where it is divided by, positive) values."""
    a = np.asarray(scale)
    if a.dtype.kind not in "fiu" or (a.ndim and a.dtype.newbyteorder("=") != np.float32):
        raise TypeError(f"scale: expected a number or an array of float32, got {a.dtype}")
    with np.errstate(over="ignore"):  # a number beyond float32 becomes Inf, which is refused below
        a = a.astype(np.float32)
    if not np.isfinite(a).all() or (positive and not (a > 0).all()):
        raise ValueError(f"scale: expected finite{' positive' * positive} values")
    return a


# ---- tokens ----------------------------------------------------------------------------------------------------


def quantize_per_token(x: Array, symmetric: bool = True) -> tuple[Array, Array, Array | None]:
    """Dynamic 8-bit quantization with one scale per token (ZeroQuant, arXiv 2206.01861, section 4.1).

    Symmetric: ``scale = max|x| / 127`` and ``q = rint(x * (127 / max|x|))``. Asymmetric: over ``lo = min(0, min x)`` and
    ``hi = max(0, max x)``, ``scale = (hi - lo) / 255``, ``zero_point = rint(-lo / scale)``.

    Parameters
    ----------
    x : float32, shape (..., k)
        One row of the last axis is one token.
    symmetric
        int8 codes in -127..127 without a zero point, or uint8 codes with one.

    Returns
    -------
    q : int8 or uint8, shape of x
    scale : float32, shape (...)
    zero_point : int32, shape (...), 0..255; None when symmetric

    Raises
    ------
    TypeError
        x is not a float32 array.
    ValueError
        x has no dimension, or NaN or Inf.

    >>> import numpy as np
    >>> from zquant import ops
    >>> q, scale, _ = ops.quantize_per_token(np.array([[1, -2, 0.5], [0, 0, 0]], np.float32))
    >>> q
    array([[  64, -127,   32],
           [   0,    0,    0]], dtype=int8)
    >>> scale
    array([0.01574803, 1.        ], dtype=float32)
    """
    rows = _rows(x, "x", "float32")
    q, scale, zero = _core.quantize_tokens(rows, 1 if symmetric else 2, False)
    scale = scale.reshape(x.shape[:-1])
    if symmetric:
        # The core stores q + 128; flipping the top bit subtracts it.
        return np.bitwise_xor(q, np.uint8(128), out=q).view(np.int8).reshape(x.shape), scale, None
    return q.reshape(x.shape), scale, zero.reshape(x.shape[:-1])


def dequantize_per_token(q: Array, scale: Array, zero_point: Array | None = None) -> Array:
    """``(q - zero_point) * scale`` with one of each per token: the inverse of :func:`quantize_per_token`.

    Parameters
    ----------
    q : int8 or uint8, shape (..., k)
    scale : float32, shape (...)
    zero_point : integers, shape (...), optional

    Returns
    -------
    float32, shape of q

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.dequantize_per_token(np.array([[3, -1]], np.int8), np.array([0.5], np.float32))
    array([[ 1.5, -0.5]], dtype=float32)
    """
    rows = _rows(q, "q", "int8", "uint8")
    scale = _same_shape(_scale(scale, False), q.shape[:-1], "scale").reshape(-1)
    if zero_point is not None:
        zero_point = _same_shape(_int32(zero_point, "zero_point"), q.shape[:-1], "zero_point").reshape(-1)
    return _core.dequantize_rows(rows, scale, zero_point).reshape(q.shape)


# ---- ONNX operators --------------------------------------------------------------------------------------------


class _Layout:
    """How a scale and a zero point lie on an array: everything comes down to one of each, one of each per item of the
    last axis, or one of each per element.

    ``rows(x)`` is x as the (m, k) array for the core, ``params(a)`` the (1,) or (k,) parameters, ``back(y)`` undoes rows.
    """

    def __init__(self, shape: tuple[int, ...], scale: Array, axis: int | None, block_size: int) -> None:
        self.shape, self.block, self.axis = shape, block_size, axis
        if block_size:
            if axis is None or scale.ndim != len(shape):
                raise ValueError(f"scale: blocks need an axis and a scale of {len(shape)} dimensions, got {scale.ndim}")
            self.axis = axis = self._axis(axis)
            want = tuple(-(-n // block_size) if i == axis else n for i, n in enumerate(shape))
        elif scale.size == 1 and (axis is None or scale.ndim == 0 or shape[self._axis(axis)] != 1):
            self.axis, want = None, scale.shape
        elif axis is None:
            raise ValueError(f"scale: one value expected without an axis, got {scale.size}")
        else:
            self.axis = axis = self._axis(axis)
            want = (shape[axis],)
        _same_shape(scale, want, "scale")

    def _axis(self, axis: int) -> int:
        if not -len(self.shape) <= axis < len(self.shape):
            raise ValueError(f"axis: expected {-len(self.shape)} to {len(self.shape) - 1}, got {axis}")
        return axis % len(self.shape)

    def rows(self, x: Array) -> Array:
        if self.block or self.axis is None:
            return x.reshape(1, x.size)
        moved = np.moveaxis(x, self.axis, -1)
        return moved.reshape(int(np.prod(moved.shape[:-1])), moved.shape[-1])

    def params(self, a: Array) -> Array:
        if self.block:
            length = self.shape[self.axis or 0]
            a = np.repeat(a, self.block, self.axis).take(np.arange(length), self.axis)
        return a.reshape(-1)

    def back(self, y: Array) -> Array:
        if self.block or self.axis is None:
            return y.reshape(self.shape)
        moved = [n for i, n in enumerate(self.shape) if i != self.axis] + [self.shape[self.axis]]
        return np.ascontiguousarray(np.moveaxis(y.reshape(moved), -1, self.axis))


def _zero_point(zero_point: Any, scale: Array, lo: int, hi: int) -> Array:
    if zero_point is None:
        return np.zeros(scale.shape, np.int32)
    zero = _int32(zero_point, "zero_point", lo, hi)
    if zero.size == 1 and scale.size == 1:
        return zero.reshape(scale.shape)
    return _same_shape(zero, scale.shape, "zero_point")


def _block_size(block_size: int) -> int:
    if block_size < 0:
        raise ValueError(f"block_size: expected at least 0, got {block_size}")
    return block_size


def quantize_linear(
    x: Array, scale: Any, zero_point: Any = None, dtype: Any = np.int8, axis: int | None = None, block_size: int = 0
) -> Array:
    """ONNX QuantizeLinear: ``q = saturate(rint(x / scale) + zero_point)``.

    Parameters
    ----------
    x : float32, any shape
    scale : number or float32 array, > 0
        One value; or, with `axis`, shape (x.shape[axis],); or, with `axis` and `block_size`, the shape of x with
        ceil(n / block_size) in place of n along the axis.
    zero_point : integers of the shape of scale, optional
        In the range of dtype; 0 by default.
    dtype
        np.int8, np.uint8, np.int16, np.uint16, or "int4", "uint4", "int2", "uint2" (held in int8 or uint8).
    axis, block_size
        As in ONNX, except that axis None, the default, means one scale for all of x.

    Returns
    -------
    array of codes, shape of x

    >>> import numpy as np
    >>> from zquant import ops
    >>> x = np.array([[0.26, 1.0], [-9.0, 3.0]], np.float32)
    >>> ops.quantize_linear(x, 0.5, dtype="int4")
    array([[ 1,  2],
           [-8,  6]], dtype=int8)
    >>> ops.quantize_linear(x, np.array([1, 0.5], np.float32), np.array([10, 0], np.uint8), np.uint8, axis=0)
    array([[10, 11],
           [ 0,  6]], dtype=uint8)
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in CODE_RANGES:
        raise ValueError(f"dtype: expected one of {', '.join(CODE_RANGES)}, got {name}")
    lo, hi = CODE_RANGES[name]
    x = _array(x, "x", "float32")
    scale = _scale(scale, True)
    layout = _Layout(x.shape, scale, axis, _block_size(block_size))
    zero = _zero_point(zero_point, scale, lo, hi)
    rows, s, z = layout.rows(x), layout.params(scale), layout.params(zero)
    if hi - lo > 255:
        return layout.back(_quantize_wide(rows, s, z, lo, hi, name))
    return layout.back(_core.quantize_static(rows, s, z, lo, hi, lo < 0))


def _quantize_wide(x: Array, scale: Array, zero: Array, lo: int, hi: int, name: str) -> Array:
    """16-bit codes serve ONNX models only, so they have no kernel."""
    bad = ~np.isfinite(x).all(1)
    if bad.any():
        raise ValueError(f"x: NaN or Inf in row {int(bad.argmax())}")
    with np.errstate(over="ignore"):
        scaled = np.rint(x / scale)
    return np.clip(scaled.astype(np.float64) + zero, lo, hi).astype(name)


def dequantize_linear(q: Array, scale: Any, zero_point: Any = None, axis: int | None = None, block_size: int = 0) -> Array:
    """ONNX DequantizeLinear: ``x = (q - zero_point) * scale`` in float32.

    Parameters
    ----------
    q : int8, uint8, int16 or uint16, any shape
        Codes of less than 8 bits are held in int8 or uint8; see :func:`unpack`.
    scale, zero_point, axis, block_size
        As in :func:`quantize_linear`; scales need only be finite.

    Returns
    -------
    float32, shape of q

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.dequantize_linear(np.array([0, 128, 255], np.uint8), 0.5, 128)
    array([-64. ,   0. ,  63.5], dtype=float32)
    """
    q = _array(q, "q", "int8", "uint8", "int16", "uint16")
    scale = _scale(scale, False)
    layout = _Layout(q.shape, scale, axis, _block_size(block_size))
    zero = _zero_point(zero_point, scale, *CODE_RANGES[q.dtype.newbyteorder("=").name])
    rows, s, z = layout.rows(q), layout.params(scale), layout.params(zero)
    if q.dtype.itemsize == 2:
        return layout.back((rows.astype(np.int32) - z).astype(np.float32) * s)
    return layout.back(_core.dequantize_static(rows, s, z))


def dynamic_quantize_linear(x: Array) -> tuple[Array, np.float32, np.uint8]:
    """ONNX DynamicQuantizeLinear: one uint8 scale and zero point over the range of all of x, with 0 in it.

    Unlike :func:`quantize_per_token` it divides by the scale, as ONNX says.

    Parameters
    ----------
    x : float32, any shape

    Returns
    -------
    q : uint8, shape of x
    scale : float32
    zero_point : uint8

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.dynamic_quantize_linear(np.array([0, 2, -3, -2.5], np.float32))[0]
    array([153, 255,   0,  26], dtype=uint8)
    """
    flat = _array(x, "x", "float32").reshape(1, -1)
    lo, hi = _core.minmax_rows(flat)
    half = np.float32(255)
    with np.errstate(over="ignore"):
        width = hi - lo
    scale = np.where(np.isinf(width), hi / half - lo / half, width / half)
    if width[0] < np.finfo(np.float32).tiny * half:
        scale[:] = 1
        return np.zeros(x.shape, np.uint8), scale[0], np.uint8(0)
    zero = np.clip(np.rint(-lo / scale), 0, 255).astype(np.int32)
    q = _core.quantize_static(flat, scale, zero, 0, 255, False)
    return q.reshape(x.shape), scale[0], np.uint8(zero[0])


# ---- weights ---------------------------------------------------------------------------------------------------


def quantize_weight(
    w: Array, bits: int = 8, group_size: int | None = None, symmetric: bool = True
) -> tuple[Array, Array, Array | None]:
    """Round-to-nearest quantization of a weight matrix, one scale per run of inputs of an output channel.

    Per group, symmetric: ``scale = max|w| / (2^(b-1) - 1)``, ``q = rint(w / scale)``. Asymmetric, over the range with 0:
    ``scale = (hi - lo) / (2^b - 1)``, ``zero = rint(-lo / scale)``, ``q = rint(w / scale) + zero``, clamped. Groups along
    the input dimension are ZeroQuant-V2's FGQ (arXiv 2303.08302).

    Parameters
    ----------
    w : float32, shape (n, k)
        (out, in).
    bits
        2 to 8.
    group_size
        Inputs per scale; the last group may be shorter. None: one scale per output channel.
    symmetric
        int8 codes in +-(2^(bits-1) - 1), or uint8 codes in 0..2^bits - 1 with zero points.

    Returns
    -------
    codes : int8 or uint8, shape (n, k)
    scales : float32, shape (n, ceil(k / group_size))
    zeros : int32, shape of scales; None when symmetric

    >>> import numpy as np
    >>> from zquant import ops
    >>> w = np.array([[0.7, -0.1, 3.5, 7.0]], np.float32)
    >>> codes, scales, _ = ops.quantize_weight(w, bits=4, group_size=2)
    >>> codes, scales
    (array([[ 7, -1,  4,  7]], dtype=int8), array([[0.1, 1. ]], dtype=float32))
    """
    w = _array(w, "w", "float32")
    return _core.quantize_groups(w, _group(w, group_size), bits, bool(symmetric))


def _group(w: Array, group_size: int | None) -> int:
    if group_size is None:
        return max(w.shape[-1] if w.ndim else 1, 1)
    if group_size < 1:
        raise ValueError(f"group_size: expected at least 1, got {group_size}")
    return group_size


def quantize_weight_blocks(w: Array, num_blocks: int, bits: int = 8) -> tuple[Array, Array]:
    """ZeroQuant's own grouping (arXiv 2206.01861): blocks of whole output rows share a symmetric scale.

    Parameters
    ----------
    w : float32, shape (n, k)
    num_blocks
        A divisor of n; the paper uses 48 for BERT-base and 64 for GPT-2.
    bits
        2 to 8.

    Returns
    -------
    codes : int8, shape (n, k)
    scales : float32, shape (n, 1)
        Written out per row, so that the result is used like any per-channel one.

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.quantize_weight_blocks(np.array([[1], [2], [10], [-127]], np.float32), 2)[1]
    array([[0.01574803],
           [0.01574803],
           [1.        ],
           [1.        ]], dtype=float32)
    """
    codes, scales = _core.quantize_row_blocks(_array(w, "w", "float32"), num_blocks, bits)
    return codes, scales[:, None]


def dequantize_weight(codes: Array, scales: Array, zeros: Array | None = None, group_size: int | None = None) -> Array:
    """``(codes - zeros) * scales``: the inverse of :func:`quantize_weight` and :func:`quantize_weight_blocks`.

    Parameters
    ----------
    codes : int8 (zeros None) or uint8, shape (n, k)
    scales : float32, shape (n, ceil(k / group_size)); (n,) will do where there is one scale per row
    zeros : int32, shape of scales, optional
    group_size
        As it was given to :func:`quantize_weight`.

    Returns
    -------
    float32, shape (n, k)

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.dequantize_weight(np.array([[7, -1, 4]], np.int8), np.array([[0.5, 2]], np.float32), group_size=2)
    array([[ 3.5, -0.5,  8. ]], dtype=float32)
    """
    codes = _array(codes, "codes", "int8" if zeros is None else "uint8")
    scales = _array(scales, "scales", "float32")
    if scales.ndim == 1:
        scales = scales[:, None]
        zeros = zeros if zeros is None else np.asarray(zeros).reshape(-1, 1)
    return _core.dequantize_groups(codes, scales, zeros, _group(codes, group_size))


# ---- bit streams -----------------------------------------------------------------------------------------------


def pack(codes: Array, bits: int) -> Array:
    """Codes as a dense stream of bits, least significant bit first, one stream per row.

    Code i takes the bits i * bits to i * bits + bits - 1. At 4 bits the even code is the low nibble; read as
    little-endian 32-bit words, it is the layout of GPTQ and compressed-tensors.

    Parameters
    ----------
    codes : int8 or uint8, shape (n,) or (rows, n)
        In the range of a signed (int8) or unsigned (uint8) number of that many bits.
    bits
        2 to 8.

    Returns
    -------
    uint8, shape (ceil(n * bits / 8),) or (rows, ceil(n * bits / 8)); unused high bits are 0

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.pack(np.array([1, 2, 3, -1], np.int8), 4).tobytes().hex()
    '21f3'
    """
    packed = _core.pack_bits(codes, bits)  # before the range, because it checks the arguments
    if codes.size:
        lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if codes.dtype.kind == "i" else (0, 2**bits - 1)
        least, most = int(codes.min()), int(codes.max())
        if least < lo or most > hi:
            raise ValueError(f"codes: expected {lo} to {hi} for {bits} bits, got {least} to {most}")
    return packed


def unpack(packed: Array, bits: int, count: int, signed: bool) -> Array:
    """The inverse of :func:`pack`.

    Parameters
    ----------
    packed : uint8, shape (ceil(count * bits / 8),) or (rows, ceil(count * bits / 8))
    bits
        2 to 8.
    count
        Codes per row.
    signed
        int8 with the sign extended, or uint8.

    Returns
    -------
    int8 or uint8, shape (count,) or (rows, count)

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.unpack(np.frombuffer(bytes.fromhex("21f3"), np.uint8), 4, 4, signed=True)
    array([ 1,  2,  3, -1], dtype=int8)
    """
    return _core.unpack_bits(packed, count, bits, bool(signed))
