"""One training step of a quantized Transformer block in plain NumPy, in the dtype of its inputs (float64 for gradient checks).

Layer-by-layer knowledge distillation (ZeroQuant, arXiv 2206.01861, section 4.3) trains the parameters of one block so that,
with fake-quantized weights and activations, it gives what the float block gives on the same input:

    minimise  mean (block(x; fq(w), fq) - target)^2,      gradients straight through: d fq(v) / d v = 1

``OPERATORS`` lists every operator with its backward; :func:`forward` and :func:`backward` put them together. A block is
described by a :class:`zquant.ops.lkd.BlockShape` and a dict of arrays named as in :data:`zquant.ops.lkd.TENSORS`.
"""
from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from .quantize import dequantize_per_token, dequantize_weight, quantize_per_token, quantize_weight, quantize_weight_blocks

__all__ = ["OPERATORS", "adamw", "backward", "fake_quantize_tokens", "fake_quantize_weight", "forward", "kl", "mse"]

_erf = np.frompyfunc(math.erf, 1, 1)


# ---- operators: forward(inputs..., options...) and grad(dy, inputs..., options...) -> one gradient for each input -----------
def linear(x, w, b):
    """y = x w^T + b"""
    return x @ w.T + b


def linear_grad(dy, x, w, b):
    """dx = dy w, dw = dy^T x, db = sum over rows of dy"""
    return dy @ w, dy.T @ x, dy.sum(0)


def _centred(x, eps):
    d = x - x.mean(-1, keepdims=True)
    inv = 1 / np.sqrt((d * d).mean(-1, keepdims=True) + eps)
    return d * inv, inv


def layer_norm(x, gamma, beta, eps):
    """y = n gamma + beta, n = (x - mean) / sqrt(var + eps)"""
    return _centred(x, eps)[0] * gamma + beta


def layer_norm_grad(dy, x, gamma, beta, eps):
    """dx = (g - mean g - n mean(g n)) / sqrt(var + eps), g = dy gamma"""
    n, inv = _centred(x, eps)
    g = dy * gamma
    dx = inv * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))
    return dx, (dy * n).sum(0), dy.sum(0)


def rms_norm(x, gamma, eps):
    """y = n gamma, n = x / sqrt(mean x^2 + eps)"""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gamma


def rms_norm_grad(dy, x, gamma, eps):
    """dx = (g - n mean(g n)) / sqrt(mean x^2 + eps), g = dy gamma"""
    inv = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    n, g = x * inv, dy * gamma
    return inv * (g - n * (g * n).mean(-1, keepdims=True)), (dy * n).sum(0)


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1) / (1 + e)


def _value_and_slope(x, name):
    """act(x) and its derivative."""
    if name == "relu":
        return np.maximum(x, 0), (x > 0).astype(x.dtype)
    if name == "silu":
        s = _sigmoid(x)
        return x * s, s + x * s * (1 - s)
    if name == "gelu_tanh":
        c = math.sqrt(2 / math.pi)
        s = _sigmoid(2 * c * (x + 0.044715 * x**3))
        return x * s, s + x * s * (1 - s) * 2 * c * (1 + 3 * 0.044715 * x**2)
    phi = 0.5 * (1 + _erf(x / math.sqrt(2)).astype(x.dtype))
    return x * phi, phi + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def activate(x, name):
    """act(x): relu, gelu (erf), gelu_tanh or silu"""
    return _value_and_slope(x, name)[0]


def activate_grad(dy, x, name):
    """dx = dy act'(x)"""
    return (dy * _value_and_slope(x, name)[1],)


def gated(gate, up, name):
    """y = act(gate) up"""
    return _value_and_slope(gate, name)[0] * up


def gated_grad(dy, gate, up, name):
    """d gate = dy up act'(gate), d up = dy act(gate)"""
    value, slope = _value_and_slope(gate, name)
    return dy * up * slope, dy * value


def head_norm(x, gamma, heads, eps):
    """RMSNorm of every head of every row by itself; gamma (head_dim) is that of all heads"""
    return rms_norm(x.reshape(len(x) * heads, -1), gamma, eps).reshape(x.shape)


def head_norm_grad(dy, x, gamma, heads, eps):
    """As rms_norm_grad; gamma's adds up over rows and heads"""
    rows = len(x) * heads
    dx, dgamma = rms_norm_grad(dy.reshape(rows, -1), x.reshape(rows, -1), gamma, eps)
    return dx.reshape(x.shape), dgamma


def rotate(x, heads, cos, sin, interleaved):
    """(a cos - b sin, b cos + a sin) for features i and i + half of every head of row t, or 2 i and 2 i + 1 where they are
    interleaved; cos and sin (rows, half)"""
    y = x.reshape(len(x), heads, -1).copy()
    half = cos.shape[1]
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    a, b = y[..., first].copy(), y[..., second].copy()
    c, s = cos[:, None], sin[:, None]
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y.reshape(x.shape)


def rotate_grad(dy, x, heads, cos, sin, interleaved):
    """The rotation backwards."""
    return (rotate(dy, heads, cos, -sin, interleaved),)


def _sequences(offsets):
    return [(a, b) for a, b in zip(offsets[:-1], offsets[1:]) if b > a]


def _scores(q, k, heads, kv_heads, scale, causal, window):
    """softmax weights (heads, T, T), and q, k per head, k repeated for the query heads that share it."""
    q, k = (x.reshape(len(x), n, -1).transpose(1, 0, 2) for x, n in ((q, heads), (k, kv_heads)))
    k = np.repeat(k, heads // kv_heads, axis=0)
    behind = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    visible = ((behind >= 0) | (not causal)) & ((behind < window) | (not window))
    s = np.where(visible, q @ k.transpose(0, 2, 1) * scale, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True), q, k


def attend(q, k, v, heads, kv_heads, scale, causal, window, offsets):
    """softmax(scale q k^T) v per head and sequence; sequence i is rows offsets[i] .. offsets[i + 1] - 1"""
    out = np.empty_like(q)
    for a, b in _sequences(offsets):
        p, _, _ = _scores(q[a:b], k[a:b], heads, kv_heads, scale, causal, window)
        values = np.repeat(v[a:b].reshape(b - a, kv_heads, -1).transpose(1, 0, 2), heads // kv_heads, axis=0)
        out[a:b] = (p @ values).transpose(1, 0, 2).reshape(b - a, -1)
    return out


def attend_grad(do, q, k, v, heads, kv_heads, scale, causal, window, offsets):
    """dv = p^T do, dp = do v^T, ds = p (dp - sum p dp), dq = scale ds k, dk = scale ds^T q; k and v add up over their heads"""
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    share = heads // kv_heads

    def joined(x, rows):
        x = x.reshape(kv_heads, share, rows, -1).sum(1)
        return x.transpose(1, 0, 2).reshape(rows, -1)

    for a, b in _sequences(offsets):
        p, qs, ks = _scores(q[a:b], k[a:b], heads, kv_heads, scale, causal, window)
        vs = np.repeat(v[a:b].reshape(b - a, kv_heads, -1).transpose(1, 0, 2), share, axis=0)
        d = do[a:b].reshape(b - a, heads, -1).transpose(1, 0, 2)
        dp = d @ vs.transpose(0, 2, 1)
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
        dq[a:b] = (ds @ ks).transpose(1, 0, 2).reshape(b - a, -1)
        dk[a:b] = joined(ds.transpose(0, 2, 1) @ qs, b - a)
        dv[a:b] = joined(p.transpose(0, 2, 1) @ d, b - a)
    return dq, dk, dv


def mse(y, target):
    """mean (y - target)^2"""
    return ((y - target) ** 2).mean()


def mse_grad(y, target):
    """2 (y - target) / count"""
    return 2 * (y - target) / y.size


def kl(y, target):
    """Mean over rows of sum p (log p - log r), p and r the softmax of target and y over the features."""
    a, b = (x - x.max(-1, keepdims=True) for x in (target, y))
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    return (np.exp(a) * (a - b)).sum(-1).mean()


def kl_grad(y, target):
    """(r - p) / rows"""
    p, r = (np.exp(x - x.max(-1, keepdims=True)) for x in (target, y))
    return (r / r.sum(-1, keepdims=True) - p / p.sum(-1, keepdims=True)) / len(y)


#: Every operator of a block and its backward.
OPERATORS = {
    "linear": (linear, linear_grad), "layer_norm": (layer_norm, layer_norm_grad), "rms_norm": (rms_norm, rms_norm_grad),
    "head_norm": (head_norm, head_norm_grad), "activate": (activate, activate_grad), "gated": (gated, gated_grad),
    "rotate": (rotate, rotate_grad), "attend": (attend, attend_grad),
}


# ---- fake quantization: codes and back ------------------------------------------------------------------------------
def fake_quantize_weight(w, spec, parts=()):
    """The weight as its codes say; ``spec`` is a :class:`zquant.ops.lkd.LinearSpec`, ``parts`` the rows of q, k and v."""
    if not spec.bits:
        return w
    if isinstance(spec.row_block, tuple):
        pieces = np.split(w, np.cumsum(parts)[:-1])
        return np.concatenate([fake_quantize_weight(piece, replace(spec, row_block=rows))
                               for piece, rows in zip(pieces, spec.row_block)])
    w32 = w.astype(np.float32)
    if spec.row_block > 1:
        codes, scales = quantize_weight_blocks(w32, len(w) // spec.row_block, spec.bits)
        return (codes * scales.reshape(-1, 1)).astype(w.dtype)
    codes, scales, _ = quantize_weight(w32, spec.bits, spec.group_size)
    return dequantize_weight(codes, scales, None, spec.group_size).astype(w.dtype)


def fake_quantize_tokens(x, mode):
    """The rows as their 8-bit codes say; mode None, "symmetric" or "asymmetric"."""
    if mode is None:
        return x
    return dequantize_per_token(*quantize_per_token(x.astype(np.float32), mode == "symmetric")).astype(x.dtype)


# ---- the block ------------------------------------------------------------------------------------------------------
class _Block:
    """The parameters of a block, weights fake-quantized, missing biases as zeros."""

    def __init__(self, tensors, shape, specs):
        self.shape, self.specs, self.tensors = shape, specs, tensors
        self.w = {name: fake_quantize_weight(tensors[name], specs[name], shape.qkv_rows)
                  for name in ("qkv", "o", "gate", "up", "down") if name in tensors}

    def bias(self, name):
        b = self.tensors.get(name + "_bias")
        return np.zeros(len(self.w[name]), self.w[name].dtype) if b is None else b

    def linear(self, name, x):
        return linear(x, self.w[name], self.bias(name))

    def quantized(self, name, x):
        return fake_quantize_tokens(x, self.specs[name].activations)

    def norm(self, name, x):
        if self.shape.norm == "rms":
            return rms_norm(x, self.tensors[name], self.shape.eps)
        return layer_norm(x, self.tensors[name], self.tensors[name + "_bias"], self.shape.eps)


def _heads(s):
    return s.heads, s.kv_heads, s.scale, s.causal, s.window


def _turns(tables, offsets, dtype):
    """cos and sin of every row."""
    at = np.concatenate([np.arange(n) for n in np.diff(offsets)]).astype(int)
    return [t[at].astype(dtype) for t in tables]


def _attention_inputs(b, q, k, tables, offsets):
    """q and k as attention reads them: each head through its norm, then turned."""
    s = b.shape
    if s.qk_norm:
        q = head_norm(q, b.tensors["q_norm"], s.heads, s.eps)
        k = head_norm(k, b.tensors["k_norm"], s.kv_heads, s.eps)
    if tables is not None:
        cos, sin = _turns(tables, offsets, q.dtype)
        q, k = rotate(q, s.heads, cos, sin, s.interleaved), rotate(k, s.kv_heads, cos, sin, s.interleaved)
    return q, k


def forward(tensors, shape, specs, x, offsets, tables=None):
    """The block's output, and what :func:`backward` needs.

    Parameters
    ----------
    tensors, shape, specs : parameters by name, a ``BlockShape``, a ``LinearSpec`` for each linear layer
    x : (T, width), packed sequences, cut at ``offsets``
    tables : cos and sin (positions, half) of the rotary embedding, or None
    """
    b = _Block(tensors, shape, specs)
    s = {"x": x}
    post = shape.order == "post"
    s["in1"] = b.quantized("qkv", x if post else b.norm("norm1", x))
    s["q_heads"], s["k_heads"], s["v"] = np.split(b.linear("qkv", s["in1"]), np.cumsum(shape.qkv_rows)[:2], axis=1)
    s["q"], s["k"] = _attention_inputs(b, s["q_heads"], s["k_heads"], tables, offsets)
    s["in2"] = b.quantized("o", attend(s["q"], s["k"], s["v"], *_heads(shape), offsets))
    s["sum1"] = x + b.linear("o", s["in2"])
    h = b.norm("norm1", s["sum1"]) if post else s["sum1"]
    s["in3"] = b.quantized("up", h if post else b.norm("norm2", x if shape.order == "parallel" else h))
    s["up"] = b.linear("up", s["in3"])
    s["gate"] = b.linear("gate", s["in3"]) if shape.gated else None
    wide = gated(s["gate"], s["up"], shape.activation) if shape.gated else activate(s["up"], shape.activation)
    s["in4"] = b.quantized("down", wide)
    s["sum2"] = h + b.linear("down", s["in4"])
    return (b.norm("norm2", s["sum2"]) if post else s["sum2"]), s


def backward(tensors, shape, specs, saved, offsets, dy, tables=None):
    """Gradients by tensor name, and of x under "x"."""
    b, s, g = _Block(tensors, shape, specs), saved, {}
    post = shape.order == "post"

    def linear_back(name, x, d):
        dx, g[name], db = linear_grad(d, x, b.w[name], b.bias(name))
        if name + "_bias" in tensors:
            g[name + "_bias"] = db
        return dx

    def norm_back(name, x, d):
        if shape.norm == "rms":
            dx, g[name] = rms_norm_grad(d, x, tensors[name], shape.eps)
        else:
            dx, g[name], g[name + "_bias"] = layer_norm_grad(d, x, tensors[name], tensors[name + "_bias"], shape.eps)
        return dx

    d = norm_back("norm2", s["sum2"], dy) if post else dy
    wide = linear_back("down", s["in4"], d)
    if shape.gated:
        dgate, dup = gated_grad(wide, s["gate"], s["up"], shape.activation)
        inner = linear_back("gate", s["in3"], dgate) + linear_back("up", s["in3"], dup)
    else:
        inner = linear_back("up", s["in3"], *activate_grad(wide, s["up"], shape.activation))
    if post:
        d = before = norm_back("norm1", s["sum1"], d + inner)
    else:
        inner = norm_back("norm2", s["x"] if shape.order == "parallel" else s["sum1"], inner)
        before = d + inner
        d = d if shape.order == "parallel" else before
    q, k, v = attend_grad(linear_back("o", s["in2"], d), s["q"], s["k"], s["v"], *_heads(shape), offsets)
    if tables is not None:
        cos, sin = _turns(tables, offsets, dy.dtype)
        (q,) = rotate_grad(q, None, shape.heads, cos, sin, shape.interleaved)
        (k,) = rotate_grad(k, None, shape.kv_heads, cos, sin, shape.interleaved)
    if shape.qk_norm:
        q, g["q_norm"] = head_norm_grad(q, s["q_heads"], tensors["q_norm"], shape.heads, shape.eps)
        k, g["k_norm"] = head_norm_grad(k, s["k_heads"], tensors["k_norm"], shape.kv_heads, shape.eps)
    inner = linear_back("qkv", s["in1"], np.concatenate([q, k, v], axis=1))
    g["x"] = before + (inner if post else norm_back("norm1", s["x"], inner))
    return g


def adamw(w, g, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, decay=0.0):
    """Decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101); ``step`` counts from 1. Returns w, m, v.

    m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
    w = (1 - lr decay) w - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    """
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    return w * (1 - lr * decay) - lr * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps), m, v
