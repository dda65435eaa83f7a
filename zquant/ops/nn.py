"""Transformer operators on float32 arrays: normalisation, activations, softmax, attention, rotary embedding.

The last axis is the features of a token. NaN or Inf in an input is a ValueError that names the array and its row. Where
``quantize`` is given, rows leave as 8-bit codes in the same pass, the same codes that
:func:`zquant.ops.quantize_per_token` makes of the float32 result. Results are the same bits at every dispatch level and
for any number of threads.
"""
from __future__ import annotations

from typing import Any

import numpy as np

from .. import _core
from .linear import _QUANT, _activation
from .quantize import Array, _array, _rows, _same_shape

__all__ = ["attention", "causal_attention", "gated", "gelu", "layer_norm", "relu", "rms_norm", "rotary", "silu", "softmax"]

Codes = tuple[Array, Array, "Array | None"]


def _quant(quantize: str | None) -> int:
    if quantize is not None and quantize not in _QUANT:
        raise ValueError(f"quantize: expected None, 'symmetric' or 'asymmetric', got {quantize!r}")
    return 0 if quantize is None else _QUANT[quantize]


def _codes(codes: tuple[Array, Array, Array], shape: tuple[int, ...], quant: int) -> Codes:
    """The core's codes (uint8, padded rows) as public ones: symmetric codes are int8 without a zero point."""
    q, scale, zero = codes
    scale = scale.reshape(shape[:-1])
    if quant == 1:  # the core stores q + 128; flipping the top bit subtracts it
        return np.bitwise_xor(q, np.uint8(128), order="C").view(np.int8).reshape(shape), scale, None
    return np.ascontiguousarray(q).reshape(shape), scale, zero.reshape(shape[:-1])


def _like(a: Array, x: Array, name: str) -> Array:
    """A second operand of x's shape as rows."""
    return _rows(_same_shape(_array(a, name, "float32"), x.shape, name), name, "float32")


def _residual(a: Array | None, x: Array) -> Array | None:
    return None if a is None else _like(a, x, "residual")


def layer_norm(x: Array, weight: Array, bias: Array, eps: float = 1e-12, residual: Array | None = None,
               quantize: str | None = None) -> Array | tuple[Array, Codes]:
    """Layer normalisation over the last axis (Ba et al., arXiv 1607.06450), with the residual added first.

    ``h = x + residual``; ``y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias``. The variance is the mean of squared
    deviations, in two corrected passes, so large means do not cost digits; a constant row gives exactly ``bias``.

    Parameters
    ----------
    x : float32, shape (..., d)
    weight, bias : float32, shape (d,)
    eps
        1e-12 is BERT's; RoBERTa has 1e-5.
    residual : float32, shape of x, optional
    quantize : None, "symmetric" or "asymmetric"
        Also return per-token codes of y, made while the row is in cache.

    Returns
    -------
    y : float32, shape of x; or ``(y, (q, scale, zero_point))`` as :func:`quantize_per_token` returns them

    Raises
    ------
    TypeError
        An array is not float32.
    ValueError
        Shapes do not match, eps is negative, or there is NaN or Inf.

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.layer_norm(np.float32([[1, 3]]), np.ones(2, np.float32), np.zeros(2, np.float32))
    array([[-1.,  1.]], dtype=float32)
    """
    quant, rows = _quant(quantize), _rows(x, "x", "float32")
    y, codes = _core.layer_norm(rows, _residual(residual, x), weight, bias, eps, quant)
    y = y.reshape(x.shape)
    return (y, _codes(codes, x.shape, quant)) if codes is not None else y


def rms_norm(x: Array, weight: Array, eps: float = 1e-6, residual: Array | None = None,
             quantize: str | None = None) -> Array | tuple[Array, Codes]:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich, arXiv 1910.07467).

    ``h = x + residual``; ``y = h / sqrt(mean(h^2) + eps) * weight``. Arguments, results and exceptions are those of
    :func:`layer_norm`, without ``bias``.

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.rms_norm(np.float32([[2, -2]]), np.float32([1, 0.5]), eps=0.0)
    array([[ 1. , -0.5]], dtype=float32)
    """
    quant, rows = _quant(quantize), _rows(x, "x", "float32")
    y, codes = _core.rms_norm(rows, _residual(residual, x), weight, eps, quant)
    y = y.reshape(x.shape)
    return (y, _codes(codes, x.shape, quant)) if codes is not None else y


def _apply(x: Array, activation: str, quantize: str | None) -> Array | Codes:
    quant, rows = _quant(quantize), _rows(x, "x", "float32")
    y = _core.activation(rows, _activation(activation), quant)
    return _codes(y, x.shape, quant) if quant else y.reshape(x.shape)


def gelu(x: Array, approximate: str = "none", quantize: str | None = None) -> Array | Codes:
    """Gaussian error linear unit (Hendrycks and Gimpel, arXiv 1606.08415): ``x * Phi(x)``.

    Parameters
    ----------
    x : float32, shape (..., d)
    approximate : "none" or "tanh"
        ``0.5 x (1 + erf(x / sqrt 2))``, to 1e-6 absolute; or ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``.
    quantize : None, "symmetric" or "asymmetric"

    Returns
    -------
    float32, shape of x; or ``(q, scale, zero_point)`` as :func:`quantize_per_token` returns them

    Raises
    ------
    TypeError
        x is not a float32 array.
    ValueError
        An unknown ``approximate`` or ``quantize``, or NaN or Inf in x.

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.gelu(np.float32([-9, 0, 1, 9])).round(4)
    array([0.    , 0.    , 0.8413, 9.    ], dtype=float32)
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return _apply(x, "gelu" if approximate == "none" else "gelu_tanh", quantize)


def silu(x: Array, quantize: str | None = None) -> Array | Codes:
    """``x / (1 + exp(-x))``, also called swish. Arguments, results and exceptions as :func:`gelu`.

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.silu(np.float32([-200, 0, 1])).round(4) + 0
    array([0.    , 0.    , 0.7311], dtype=float32)
    """
    return _apply(x, "silu", quantize)


def relu(x: Array, quantize: str | None = None) -> Array | Codes:
    """``max(x, 0)``. Arguments, results and exceptions as :func:`gelu`.

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.relu(np.float32([-1, 2]))
    array([0., 2.], dtype=float32)
    """
    return _apply(x, "relu", quantize)


def gated(gate: Array, up: Array, activation: str = "silu", quantize: str | None = None) -> Array | Codes:
    """Gated unit ``activation(gate) * up`` (Shazeer, arXiv 2002.05202); with "silu" the SwiGLU of Llama.

    Parameters
    ----------
    gate, up : float32, same shape (..., d)
    activation : "silu", "gelu", "gelu_tanh" or "relu"
    quantize : None, "symmetric" or "asymmetric"

    Returns
    -------
    float32, shape of gate; or ``(q, scale, zero_point)`` as :func:`quantize_per_token` returns them

    Raises
    ------
    TypeError
        An array is not float32.
    ValueError
        Shapes differ, the activation is unknown, there is NaN or Inf, or the product overflows where it is quantized.

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.gated(np.float32([[1, -1]]), np.float32([[2, 2]]), "relu")
    array([[2., 0.]], dtype=float32)
    """
    quant, rows = _quant(quantize), _rows(gate, "gate", "float32")
    y = _core.gated(rows, _like(up, gate, "up"), _activation(activation), quant)
    return _codes(y, gate.shape, quant) if quant else y.reshape(gate.shape)


def softmax(x: Array, quantize: str | None = None) -> Array | Codes:
    """``exp(x - max(x)) / sum(exp(x - max(x)))`` over the last axis.

    -Inf is allowed, as a mask: it gives 0, and a row of nothing but -Inf gives zeros. exp has a relative error below 2e-7
    and is 0 below -86.99.

    Parameters
    ----------
    x : float32, shape (..., n)
    quantize : None, "symmetric" or "asymmetric"
        "asymmetric" has all of 0 to 255 for probabilities, as in ZeroQuant-HERO (arXiv 2310.17723). Codes are rounded once,
        ``q = rint(255 exp(x - max x))`` with ``scale = 1 / (255 sum)`` (127 if symmetric): of a value in the middle between
        two codes, :func:`quantize_per_token` may make the other one, as the float32 result has been rounded before.

    Returns
    -------
    float32, shape of x; or ``(q, scale, zero_point)`` as :func:`quantize_per_token` returns them

    Raises
    ------
    TypeError
        x is not a float32 array.
    ValueError
        An unknown ``quantize``, or NaN or +Inf in x.

    >>> import numpy as np
    >>> from zquant import ops
    >>> ops.softmax(np.float32([[0, 0, -np.inf]]))
    array([[0.5, 0.5, 0. ]], dtype=float32)
    >>> ops.softmax(np.float32([[0, 0, -np.inf]]), quantize="asymmetric")[0]
    array([[255, 255,   0]], dtype=uint8)
    """
    quant, rows = _quant(quantize), _rows(x, "x", "float32")
    y = _core.softmax(rows, quant)
    return _codes(y, x.shape, quant) if quant else y.reshape(x.shape)


def _valid_rows(lengths: Any, batch: int, tokens: int) -> tuple[Array | None, Array]:
    """Which of batch * tokens rows belong to a sequence (None: all), and the offsets of the sequences once the others are
    left out."""
    if lengths is None:
        return None, np.arange(batch + 1, dtype=np.int64) * tokens
    n = np.asarray(lengths)
    if n.shape != (batch,) or n.dtype.kind not in "iu":
        raise ValueError(f"lengths: expected {batch} integers, got {n.dtype} of shape {n.shape}")
    if n.size and (n.min() < 0 or n.max() > tokens):
        raise ValueError(f"lengths: expected 0 to {tokens}, got {n.min()} to {n.max()}")
    return (np.arange(tokens) < n[:, None]).reshape(-1), np.concatenate(([0], np.cumsum(n))).astype(np.int64)


def _with_padding(rows: Array, keep: Array | None) -> Array:
    """The rows back in their places, zeros in the others."""
    if keep is None:
        return rows
    whole = np.zeros((len(keep), rows.shape[1]), np.float32)
    whole[keep] = rows
    return whole


def attention(q: Array, k: Array, v: Array, num_heads: int, key_mask: Array | None = None, lengths: Any = None,
              scale: float | None = None, int8: bool = False) -> Array:
    """Multi-head self-attention (Vaswani et al., arXiv 1706.03762, section 3.2), in float32 or on 8-bit codes.

    Per head ``softmax(scale * q k^T) v``, over tiles of keys with a running softmax (Dao et al., arXiv 2205.14135), so
    memory does not grow with the square of the length. A hidden key has no influence at all: the result is bit for bit
    that of the sequence without it, and does not depend on the other sequences of the batch.

    Parameters
    ----------
    q, k, v : float32, same shape (B, T, num_heads * head_dim)
    num_heads
        Heads; each owns head_dim adjacent columns.
    key_mask : bool or uint8, shape (B, T), optional
        0 hides a key from all queries of its sequence. A query whose keys are all hidden gets zeros.
    lengths : integers, shape (B,), optional
        Rows of each sequence that exist; the rest is padding, whose keys are hidden and whose output is zero.
    scale
        1 / sqrt(head_dim) by default; positive.
    int8
        Multiply 8-bit codes, exactly, in place of float32, as ZeroQuant-HERO does (arXiv 2310.17723): q and k symmetric per
        token and head, v per feature and tile of 256 keys, the softmax in float32 and its result with the fixed step 1/255 of
        the row's maximum, normalised so that the weights add up to 1. About twice as fast; see
        ``zquant.reference.attention_int8``. |k| beyond 1e27 is then refused.

    Returns
    -------
    float32, shape of q

    Raises
    ------
    TypeError
        An array is not of its type.
    ValueError
        Shapes do not match, the columns cannot be shared out to the heads, there is NaN or Inf (the array and its row,
        counted over B * T, are named), or a score overflows float32.

    >>> import numpy as np
    >>> from zquant import ops
    >>> q = np.zeros((1, 2, 4), np.float32)
    >>> v = np.float32([[[1, 2, 3, 4], [3, 4, 5, 6]]])
    >>> ops.attention(q, q, v, num_heads=2)
    array([[[2., 3., 4., 5.],
            [2., 3., 4., 5.]]], dtype=float32)
    >>> ops.attention(q, q, v, num_heads=2, lengths=[1])
    array([[[1., 2., 3., 4.],
            [0., 0., 0., 0.]]], dtype=float32)
    >>> ops.attention(q, q, v, num_heads=2, int8=True)[0, 0].round(1)
    array([2., 3., 4., 5.], dtype=float32)
    """
    if _array(q, "q", "float32").ndim != 3:
        raise ValueError(f"q: expected 3 dimensions (batch, tokens, features), got {q.ndim}")
    batch, tokens, width = q.shape
    rows = [_rows(q, "q", "float32"), _like(k, q, "k"), _like(v, q, "v")]
    mask = None
    if key_mask is not None:
        mask = _same_shape(_array(key_mask, "key_mask", "bool", "uint8"), (batch, tokens), "key_mask").reshape(-1)
    keep, offsets = _valid_rows(lengths, batch, tokens)
    if keep is not None:
        rows = [a[keep] for a in rows]
        mask = None if mask is None else mask[keep]
    if not int8 or mask is not None:  # int8 meets every NaN and Inf when it makes codes, but not those of hidden keys
        for a, name in zip(rows, "qkv"):
            _core.check_finite(a, name)
    if scale is None:
        scale = (width / num_heads) ** -0.5 if width and num_heads else 1.0
    out = _core.attention(rows[0], rows[1], rows[2], offsets, num_heads, scale, mask, int(bool(int8)))
    return _with_padding(out, keep).reshape(q.shape)


def rotary(x: Array, positions: Array, cos: Array, sin: Array, num_heads: int, interleaved: bool = False) -> Array:
    """Rotary position embedding (Su et al., arXiv 2104.09864, equation 34).

    In every head the pairs ``(a, b)`` of the first ``2 * cos.shape[1]`` elements become
    ``(a cos - b sin, b cos + a sin)``; the other elements stay (partial rotary, as in GPT-NeoX).

    Parameters
    ----------
    x : float32, shape (..., num_heads * head_dim)
    positions : integers, shape of x without its last axis
        The row of ``cos`` and ``sin`` for each token.
    cos, sin : float32, shape (positions, r / 2), r <= head_dim
        Cosine and sine of position times frequency.
    num_heads
        Heads; each owns head_dim adjacent columns.
    interleaved
        False: a pair is elements i and i + r / 2 (Hugging Face's layout); True: 2i and 2i + 1 (GPT-J's).

    Returns
    -------
    float32, shape of x

    Raises
    ------
    TypeError
        An array is not of its type.
    ValueError
        Shapes do not match, a position has no row in the tables, or there is NaN or Inf.

    >>> import numpy as np
    >>> from zquant import ops
    >>> quarter_turns = np.arange(3)[:, None] * np.pi / 2
    >>> cos, sin = np.cos(quarter_turns).astype(np.float32), np.sin(quarter_turns).astype(np.float32)
    >>> ops.rotary(np.float32([[1, 2]]), np.array([1]), cos, sin, num_heads=1)
    array([[-2.,  1.]], dtype=float32)
    """
    rows = _rows(x, "x", "float32")
    where = np.asarray(positions)
    if where.dtype.kind not in "iu":
        raise TypeError(f"positions: expected integers, got {where.dtype}")
    where = _same_shape(where, x.shape[:-1], "positions").reshape(-1).astype(np.int64)
    return _core.rotary(rows, where, cos, sin, num_heads, bool(interleaved)).reshape(x.shape)


def causal_attention(q: Array, k: Array, v: Array, num_heads: int, num_kv_heads: int | None = None, window: int = 0,
                     lengths: Any = None, scale: float | None = None) -> Array:
    """Causal multi-head attention in float32, with grouped-query heads and a sliding window.

    Per head ``softmax(scale * q k^T) v`` where a query sees the keys up to its own position. Query head h uses key and value
    head ``h // (num_heads / num_kv_heads)`` (Ainslie et al., arXiv 2305.13245). The same code as with a
    :class:`zquant.KVCache`, and the same bits.

    Parameters
    ----------
    q : float32, shape (B, T, num_heads * head_dim)
    k, v : float32, shape (B, T, num_kv_heads * head_dim)
    num_heads
        Heads of q; each owns head_dim adjacent columns.
    num_kv_heads
        Heads of k and v, a divisor of num_heads; num_heads by default.
    window
        With window > 0 a query sees only the last ``window`` keys, its own among them (Mistral's sliding window).
    lengths : integers, shape (B,), optional
        Tokens of each sequence that exist; the rest is padding on the right, whose output is zero.
    scale
        1 / sqrt(head_dim) by default; positive.

    Returns
    -------
    float32, shape of q

    Raises
    ------
    TypeError
        An array is not float32.
    ValueError
        Shapes do not match, the columns cannot be shared out to the heads, or there is NaN or Inf (the array and its row,
        counted over B * T, are named).

    >>> import numpy as np
    >>> from zquant import ops
    >>> q = np.zeros((1, 3, 4), np.float32)
    >>> v = np.float32([[[1, 2], [3, 4], [5, 6]]])
    >>> ops.causal_attention(q, v, v, num_heads=2, num_kv_heads=1)[0]
    array([[1., 2., 1., 2.],
           [2., 3., 2., 3.],
           [3., 4., 3., 4.]], dtype=float32)
    >>> ops.causal_attention(q, v, v, num_heads=2, num_kv_heads=1, window=2)[0, 2]
    array([4., 5., 4., 5.], dtype=float32)
    """
    if _array(q, "q", "float32").ndim != 3:
        raise ValueError(f"q: expected 3 dimensions (batch, tokens, features), got {q.ndim}")
    batch, tokens, width = q.shape
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or width == 0 or width % num_heads:
        raise ValueError(f"num_heads: {width} columns of q cannot be shared out to {num_heads} heads")
    if kv_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of num_heads {num_heads}, got {kv_heads}")
    head_dim = width // num_heads
    rows = [_rows(q, "q", "float32")]
    for name, a in (("k", k), ("v", v)):
        a = _same_shape(_array(a, name, "float32"), (batch, tokens, kv_heads * head_dim), name)
        rows.append(_rows(a, name, "float32"))
    keep, offsets = _valid_rows(lengths, batch, tokens)
    if keep is not None:
        rows = [a[keep] for a in rows]
    for a, name in zip(rows, "qkv"):
        _core.check_finite(a, name)
    cache = _core.kv_new(1, batch, kv_heads, head_dim, False)
    out = _core.kv_attend(cache, 0, np.concatenate(rows, 1), offsets, None, num_heads, None, None, False, None, None, 0.0,
                          head_dim**-0.5 if scale is None else scale, window, 0)
    return _with_padding(out, keep).reshape(q.shape)
