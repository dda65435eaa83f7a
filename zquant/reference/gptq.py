"""GPTQ in plain NumPy and float64, as the paper writes it: H^-1 = U^T U, blocks of columns, errors E with w - q = E U."""
from __future__ import annotations

import numpy as np

from .quantize import absmax_scale, range_scale

__all__ = ["gptq", "gptq_order", "inverse_factor", "search_scale", "to_grid"]


def inverse_factor(h):
    """U, upper triangular, with h^-1 = U^T U."""
    return np.linalg.cholesky(np.linalg.inv(h)).T


def gptq_order(diagonal, act_order, group):
    """The columns in the order of quantization: act_order False, True (by falling diagonal) or "group" (GAR)."""
    k = len(diagonal)
    if act_order != "group":
        return np.argsort(-diagonal, kind="stable") if act_order else np.arange(k)
    groups = [np.arange(g, min(g + group, k)) for g in range(0, k, group)]
    whole = [g[np.argsort(-diagonal[g], kind="stable")] for g in groups if len(g) == group]
    tail = [g[np.argsort(-diagonal[g], kind="stable")] for g in groups if len(g) < group]
    return np.concatenate(sorted(whole, key=lambda g: -diagonal[g[0]]) + tail)


def to_grid(x, scale, zero, bits, symmetric, grid=None):
    """Code and value of x on the grid. `grid` is (values, borders): code c where c borders lie below x / scale."""
    if grid is not None:
        code = np.searchsorted(grid[1], (x / scale).astype(np.float32), side="left")
        return code, grid[0][code].astype(np.float64) * scale
    lo, hi = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    code = np.clip(np.rint(x / scale) + zero, lo, hi)
    return code, (code - zero) * scale


def _scale_of_range(lo, hi, bits, symmetric, grid):
    amax, zero = np.maximum(-lo, hi), np.zeros(lo.shape, np.float32)
    if grid is not None:
        scale = absmax_scale(amax, np.abs(grid[0]).max())
    elif symmetric:
        scale = absmax_scale(amax, 2 ** (bits - 1) - 1)
    else:
        scale = range_scale(lo, hi, 2**bits - 1)
        zero = np.clip(np.rint(-lo / np.where(scale > 0, scale, np.inf)), 0, 2**bits - 1).astype(np.float32)
    return np.where(scale > 0, scale, np.float32(1)), zero


def search_scale(x, weight, bits, symmetric, grid=None, search=False):
    """Scale and zero point of every row of x (n, k): from its range with 0; or the shrunk range, of 80, that has the
    least sum of weight * error^2."""
    x = x.astype(np.float32)
    lo, hi = x.min(1, initial=0), x.max(1, initial=0)
    scale, zero = _scale_of_range(lo, hi, bits, symmetric, grid)
    best = np.full(len(x), np.inf)
    for p in np.arange(100, 20, -1).astype(np.float32) / np.float32(100) if search else ():
        s, z = _scale_of_range(lo * p, hi * p, bits, symmetric, grid)
        error = ((to_grid(x, s[:, None], z[:, None], bits, symmetric, grid)[1] - x) ** 2 * weight).sum(1)
        better = error < best
        best, scale, zero = np.where(better, error, best), np.where(better, s, scale), np.where(better, z, zero)
    return scale, zero


def gptq(w, hessian, bits=4, group_size=None, symmetric=True, act_order=True, static_groups=True, damping=0.01, block=128,
         mse=False, grid=None, deviation=None, alpha=0.25, scales=None):
    """(codes, scales, zeros, w - q in order, E, U): see :func:`zquant.gptq`. No fallbacks: H + damping must be regular."""
    n, k = w.shape
    group = min(group_size or k, k)
    h, dead = np.array(hessian, np.float64), np.diag(hessian) == 0
    mean = np.diag(h)[~dead].mean()
    order = gptq_order(np.diag(h), act_order, group)
    h[dead, dead] = mean
    u = inverse_factor(h[np.ix_(order, order)] + damping * mean * np.eye(k))
    w = np.where(dead, 0, w).astype(np.float64)
    p = np.zeros((k, k))
    if deviation is not None:
        d = np.where(dead | dead[:, None], 0, deviation)[np.ix_(order, order)]
        p = alpha * np.triu(d @ u.T, 1) @ u
    weight = np.where(dead, 0, np.diag(h) / mean)
    given, zeros = scales, np.zeros((n, -(-k // group)), np.float32)
    scales = np.ones(zeros.shape, np.float32) if given is None else given
    for g in range(scales.shape[1] if given is None else 0):
        part = slice(g * group, (g + 1) * group)
        scales[:, g], zeros[:, g] = search_scale(w[:, part], weight[part], bits, symmetric, grid, mse)
    codes, e, now = np.zeros((n, k), int), np.zeros((n, k)), w[:, order].copy()
    seen, q = np.zeros((n, k)), np.zeros((n, k))
    for i1 in range(0, k, block):
        i2 = min(i1 + block, k)
        for i in range(i1, i2):
            g = order[i] // group
            if not static_groups and i % group == 0:  # columns behind the block lack what it did so far
                tail = slice(i2, max(i2, i + group))
                ahead = now[:, tail] - e[:, i1:i] @ u[i1:i, tail] + seen[:, i1:i] @ p[i1:i, tail]
                fresh = np.concatenate([now[:, i : min(i + group, i2)], ahead], 1)
                scales[:, g], zeros[:, g] = search_scale(fresh, weight[order[i : i + group]], bits, symmetric, grid, mse)
            seen[:, i] = now[:, i]
            scale = scales[:, g].astype(np.float64)
            codes[:, order[i]], q[:, i] = to_grid(now[:, i], scale, zeros[:, g], bits, symmetric, grid)
            e[:, i] = (now[:, i] - q[:, i]) / u[i, i]
            now[:, i:i2] += np.outer(seen[:, i], p[i, i:i2]) - np.outer(e[:, i], u[i, i:i2])
        now[:, i2:] += seen[:, i1:i2] @ p[i1:i2, i2:] - e[:, i1:i2] @ u[i1:i2, i2:]
    return codes, scales, zeros, w[:, order] - q, e, u
