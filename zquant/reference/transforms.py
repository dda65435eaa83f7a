"""Scales of SmoothQuant, Outlier Suppression+ and FPTQ, channel by channel, as in the papers."""
from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["fptq", "outlier_suppression", "smoothquant"]


def smoothquant(absmax: Sequence[float], column_maxima: Sequence[float], alpha: float) -> list[float]:
    """s_j = max|x_j|^alpha / max|W_:j|^(1 - alpha), at least 1e-5; 1 where either maximum is 0."""
    return [max(1e-5, a**alpha / w**(1 - alpha)) if a and w else 1.0 for a, w in zip(absmax, column_maxima)]


def outlier_suppression(low: Sequence[float], high: Sequence[float], threshold: float) -> tuple[list[float], list[float]]:
    """z_j = (max x_j + min x_j) / 2 and s_j = max(1, max|x_j - z_j| / t)."""
    shift = [(a + b) / 2 for a, b in zip(low, high)]
    return shift, [max(1.0, max(abs(a - z), abs(b - z)) / threshold) for a, b, z in zip(low, high, shift)]


def fptq(absmax: Sequence[float], v0: float, v1: float) -> tuple[str, list[float]]:
    """By the largest v: up to v0 one scale; up to v1 too, after s_k = m_k / log2(2 + m_k); beyond, scales per token."""
    v = max(absmax)
    if v0 < v <= v1:
        return "equalize", [m / math.log2(2 + m) if m else 1.0 for m in absmax]
    return ("static" if v <= v0 else "token"), [1.0] * len(absmax)
