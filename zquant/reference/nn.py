"""Transformer operators in plain NumPy, float64: what :mod:`zquant.ops.nn` computes, to float32 rounding.

``exp_f32`` and ``gelu_f32`` repeat the float32 algorithm of csrc/ref/math.h instead, operation by operation.
"""
from __future__ import annotations

import numpy as np

from .gemm import activate

__all__ = ["attention", "attention_int8", "causal_attention", "exp_f32", "gated", "gelu", "gelu_f32", "layer_norm", "relu",
           "rms_norm", "rotary", "silu", "softmax", "softmax_codes"]


def layer_norm(x, weight, bias, eps=1e-12, residual=None):
    """(h - mean h) / sqrt(var h + eps) * weight + bias over the last axis, h = x + residual."""
    h = np.asarray(x, np.float64) + (0 if residual is None else residual)
    d = h - h.mean(-1, keepdims=True)
    return d / np.sqrt((d * d).mean(-1, keepdims=True) + eps) * weight + bias


def rms_norm(x, weight, eps=1e-6, residual=None):
    """h / sqrt(mean h^2 + eps) * weight over the last axis, h = x + residual."""
    h = np.asarray(x, np.float64) + (0 if residual is None else residual)
    return h / np.sqrt((h * h).mean(-1, keepdims=True) + eps) * weight


def gelu(x, approximate="none"):
    """x Phi(x), or its tanh approximation."""
    return activate(np.asarray(x, np.float64), "gelu" if approximate == "none" else "gelu_tanh")


def silu(x):
    """x / (1 + exp(-x))"""
    x = np.asarray(x, np.float64)
    e = np.exp(-np.abs(x))
    return x * np.where(x < 0, e, 1) / (1 + e)


def relu(x):
    """max(x, 0)"""
    return activate(np.asarray(x, np.float64), "relu")


def gated(gate, up, activation="silu"):
    """activation(gate) * up"""
    g = np.asarray(gate, np.float64)
    return (silu(g) if activation == "silu" else activate(g, activation)) * up


def softmax(x):
    """exp(x - max) / sum over the last axis; zeros where every element is -Inf."""
    x = np.asarray(x, np.float64)
    top = x.max(-1, keepdims=True)
    e = np.exp(x - np.where(np.isfinite(top), top, 0))
    return e / np.maximum(e.sum(-1, keepdims=True), np.finfo(np.float64).tiny)


def softmax_codes(x, levels):
    """levels exp(x - max) over the last axis: the codes of softmax before they are rounded, with the scale 1 / (levels sum)."""
    x = np.asarray(x, np.float64)
    top = x.max(-1, keepdims=True)
    return levels * np.exp(x - np.where(np.isfinite(top), top, 0))


def attention(q, k, v, num_heads, key_mask=None, lengths=None, scale=None):
    """softmax(scale q k^T) v per sequence and head, the whole score matrix at once."""
    batch, tokens, width = q.shape
    visible = np.ones((batch, tokens), bool) if key_mask is None else np.asarray(key_mask, bool)
    exists = np.ones((batch, tokens), bool) if lengths is None else np.arange(tokens) < np.asarray(lengths)[:, None]
    split = [np.asarray(a, np.float64).reshape(batch, tokens, num_heads, -1).transpose(0, 2, 1, 3) for a in (q, k, v)]
    scale = (width // num_heads) ** -0.5 if scale is None else scale
    scores = split[0] @ split[1].transpose(0, 1, 3, 2) * scale
    scores = np.where((visible & exists)[:, None, None, :], scores, -np.inf)
    out = (softmax(scores) @ split[2]).transpose(0, 2, 1, 3).reshape(q.shape)
    return np.where(exists[:, :, None], out, 0)


_CODE = (np.float32(255) * np.array([1, 0.6932829022407532, 0.24221095442771912, 0.05500893294811249], np.float32))


def _codes(x, axis):
    """Symmetric codes rint(x / scale) in +-127 with one scale along the axis, max|x| / 127; as float32, and the scale."""
    top = np.abs(x).max(axis, keepdims=True, initial=0).astype(np.float32)
    tiny = top < np.float32(127) * np.finfo(np.float32).tiny
    inv = np.where(tiny, np.float32(0), np.float32(127) / np.where(tiny, np.float32(1), top))
    return np.rint(x * inv), np.where(tiny, np.float32(1), top / np.float32(127))


def exp2_codes(t):
    """rint(255 * 2^t), t <= 0, by 2^n 2^r with r = t - n in [-1/2, 1/2] and a polynomial of degree 3 for 255 * 2^r."""
    t = np.maximum(np.asarray(t, np.float32), np.float32(-20))
    n = np.rint(t)
    r = t - n
    p = np.full_like(r, _CODE[3])
    for c in _CODE[2::-1]:
        p = _fma(p, r, c)
    return np.rint(np.ldexp(np.float64(p), n.astype(np.int32))).astype(np.float32)


def _head_int8(q, k, v, factor, tile):
    """One head of one sequence, (tokens, d) each: the running softmax over tiles of keys, all in float32."""
    q8, sq = _codes(q, 1)
    f = sq * np.float32(np.float32(factor) * np.float32(1.44269504))
    m, total = np.full((len(q), 1), -np.inf, np.float32), np.zeros((len(q), 1), np.float32)
    o = np.zeros(q.shape, np.float32)
    for at in range(0, len(k), tile):
        k8, sk = _codes(k[at:at + tile], 1)
        v8, sv = _codes(v[at:at + tile], 0)
        s = (q8 @ k8.T) * sk.T  # sums of integers below 2^24 are exact in float32
        top = np.maximum(m, s.max(1, keepdims=True))
        if at:
            c = np.where(top > m, exp2_f32((m - top) * f), np.float32(1))
            total, o = total * c, o * c
        p, m = exp2_codes((s - top) * f), top
        total = total + p.sum(1, keepdims=True, dtype=np.float32)
        o = _fma((p.astype(np.float64) @ v8).astype(np.float32), sv, o)
    return o * (np.float32(1) / total) if len(k) else o


def attention_int8(q, k, v, num_heads, key_mask=None, lengths=None, scale=None, tile=256):
    """What ``ops.attention(int8=True)`` computes, bit for bit: codes of q and k per token and head, of v per feature and tile
    of keys, of exp(s - max) with the step 1/255; the row is divided by the sum of its rounded codes."""
    batch, tokens, width = q.shape
    d = width // num_heads
    visible = np.ones((batch, tokens), bool) if key_mask is None else np.asarray(key_mask, bool)
    exists = np.full(batch, tokens) if lengths is None else np.asarray(lengths)
    out = np.zeros(q.shape, np.float32)
    for b, n in enumerate(exists):
        keys = np.flatnonzero(visible[b, :n])
        for h in range(num_heads):
            own = slice(h * d, h * d + d)
            out[b, :n, own] = _head_int8(q[b, :n, own], k[b, keys, own], v[b, keys, own],
                                         d ** -0.5 if scale is None else scale, tile)
    return out


def rotary(x, positions, cos, sin, num_heads, interleaved=False):
    """(a cos - b sin, b cos + a sin) for the pairs (a, b) of the first 2 * cos.shape[1] elements of every head."""
    x = np.asarray(x, np.float64)
    heads = x.reshape(*x.shape[:-1], num_heads, -1)
    c, s = (np.asarray(t, np.float64)[positions][..., None, :] for t in (cos, sin))
    half = c.shape[-1]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b, y = heads[..., first], heads[..., second], heads.copy()
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y.reshape(x.shape)


def causal_attention(q, k, v, num_heads, num_kv_heads=None, window=0, lengths=None, scale=None, past=0):
    """softmax(scale q k^T) v where query i, at position past + i, sees keys past + i - window + 1 .. past + i; with window
    0 all keys up to its position. Query head h uses key head h // (num_heads / num_kv_heads)."""
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    batch, tokens, width = q.shape
    split = [np.asarray(a, np.float64).reshape(batch, a.shape[1], n, -1).transpose(0, 2, 1, 3)
             for a, n in ((q, num_heads), (k, kv_heads), (v, kv_heads))]
    keys, values = (np.repeat(a, num_heads // kv_heads, axis=1) for a in split[1:])
    scale = (width // num_heads) ** -0.5 if scale is None else scale
    distance = past + np.arange(tokens)[:, None] - np.arange(k.shape[1])
    visible = (distance >= 0) & ((distance < window) | (window == 0))
    scores = np.where(visible, split[0] @ keys.transpose(0, 1, 3, 2) * scale, -np.inf)
    out = (softmax(scores) @ values).transpose(0, 2, 1, 3).reshape(batch, tokens, -1)
    exists = np.ones((batch, tokens), bool) if lengths is None else np.arange(tokens) < np.asarray(lengths)[:, None]
    return np.where(exists[:, :, None], out, 0)


# ---- the float32 algorithms ------------------------------------------------------------------------------------


def _fma(a, b, c):
    """a * b + c rounded once to float32, up to double rounding: float64 holds the product exactly."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


_EXP = np.array([1.0, 0.9999997019767761, 0.4999914765357971, 0.1666763871908188, 0.04189816117286682, 0.008290272206068039],
                np.float32)


def exp_f32(x):
    """exp by 2^n exp(r), r = x - n ln 2 in [-0.347, 0.347], and a polynomial of degree 5 for exp(r); x <= 88.

    Relative error below 5e-7; 0 below -86.99, where 2^n would be subnormal.
    """
    x = np.maximum(np.asarray(x, np.float32), np.float32(-87.5))
    n = np.rint(_fma(x, np.float32(1.44269504), 0))
    r = _fma(n, -np.float32(0.693147182), x)
    p = np.full_like(r, _EXP[5])
    for c in _EXP[4::-1]:
        p = _fma(p, r, c)
    return np.where(n <= -126, np.float32(0), np.ldexp(p, n.astype(np.int32))).astype(np.float32)


_EXP2 = np.array([1, 0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957,
                  0.001326472731307149], np.float32)


def exp2_f32(t):
    """2^t for t <= 0 by 2^n 2^r, r = t - n in [-1/2, 1/2], and a polynomial of degree 5 for 2^r; 0 below -125.5."""
    t = np.maximum(np.asarray(t, np.float32), np.float32(-126))
    n = np.rint(t)
    r = t - n
    p = np.full_like(r, _EXP2[5])
    for c in _EXP2[4::-1]:
        p = _fma(p, r, c)
    return np.where(n <= -126, np.float32(0), np.ldexp(p, n.astype(np.int32))).astype(np.float32)


_GELU = {
    "none": (6.0625, [0.9170160293579102, -0.09157174825668335, -0.03157050162553787, -0.0012232360895723104,
                      0.001977581065148115, -0.00019541736401151866]),
    "tanh": (5.625, [0.9169453382492065, -0.09097495675086975, -0.0331278070807457, 0.0005411621532402933,
                     0.0012696190970018506, -0.0001286360202357173]),
}


def gelu_f32(x, approximate="none"):
    """max(x, 0) - a Q(a), a = min(|x|, end), with Q(a) = 1 - Phi(a) as the eighth power of a polynomial that is 0 at end."""
    end, coefficients = _GELU[approximate]
    x, coefficients = np.asarray(x, np.float32), np.float32(coefficients)
    a = np.minimum(np.abs(x), np.float32(end))
    r = np.full_like(a, coefficients[5])
    for c in coefficients[4::-1]:
        r = _fma(r, a, c)
    r4 = (r * r) * (r * r)
    return _fma(-(a * r4), r4, np.maximum(x, 0))
