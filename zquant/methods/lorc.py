"""LoRC: low-rank compensation of the quantization error (Yao et al., 2023, ZeroQuant-V2, arXiv 2303.08302, section 5).

    E = W - W_hat = U S V,   u = U_m S_m^1/2,   v = S_m^1/2 V_m,   y = x W_hat^T + (x v^T) u^T

u v is the matrix of rank m nearest to E (Eckart and Young): |E - u v|^2 is the sum of the squares of the other singular values.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checks import as_count
from ..extras import LowRank
from ..ops.quantize import _array, quantize_weight
from ..qtensor import QTensor
from ..spec import QuantSpec
from .base import Repair, register, set_flags

__all__ = ["LoRC", "lorc"]

Array = np.ndarray

#: Up to so many rows or columns the singular vectors come from all eigenvectors of E E^T, beyond from iterations.
EXACT = 1024
ITERATIONS, OVERSAMPLING, TOLERANCE = 60, 16, 1e-7


def _orthonormal(a: Array) -> Array:
    return np.linalg.qr(a)[0]


def _left_vectors(e: Array, rank: int) -> Array:
    """(n, rank): the left singular vectors of e (n, k) float64, n <= k, of its largest singular values; at least nearly.

    Iterations on a subspace (Halko et al., 2011) end when what they capture of |e|^2 stops growing.
    """
    if len(e) <= EXACT:
        return np.linalg.eigh(e @ e.T)[1][:, ::-1][:, :rank]
    basis = _orthonormal(np.random.default_rng(0).standard_normal((len(e), rank + OVERSAMPLING)))
    captured, total = 0.0, float(np.vdot(e, e))
    for _ in range(ITERATIONS):
        inner = basis.T @ e
        values, vectors = np.linalg.eigh(inner @ inner.T)
        before, captured = captured, float(values[-rank:].sum())
        if captured - before <= TOLERANCE * total:
            break
        basis = _orthonormal(e @ inner.T)
    return (basis @ vectors)[:, ::-1][:, :rank]


def _factors(error: Array, rank: int) -> tuple[Array, Array]:
    """u (n, rank) and v (rank, k) float64 of the error (n, k); columns of zeros behind its own rank."""
    flat = error.shape[0] > error.shape[1]
    e = np.ascontiguousarray(error.T if flat else error, np.float64)
    left = _left_vectors(e, rank)
    right = left.T @ e  # rows are sigma times the right singular vectors
    root = np.sqrt(np.sqrt(np.einsum("ij,ij->i", right, right)))
    inverse = np.divide(1.0, root, out=np.zeros_like(root), where=root > 0)
    u, v = left * root, right * inverse[:, None]
    return (v.T, u.T) if flat else (u, v)


def _coded(factor: Array) -> QTensor:
    """A factor as 8-bit codes, one scale for each row."""
    codes, scales, _ = quantize_weight(factor)
    return QTensor(codes, scales, None, QuantSpec())


def lorc(w: Array, w_hat: Array, rank: int = 8, int8: bool = False) -> LowRank:
    """The low-rank part of a quantization error.

        W - W_hat = U S V,   u = U_m S_m^1/2,   v = S_m^1/2 V_m

    LoRC (Yao et al., 2023, ZeroQuant-V2, arXiv 2303.08302, section 5).

    Parameters
    ----------
    w : float32, shape (n, k)
        The weights.
    w_hat : float32, shape (n, k)
        What their codes stand for: :meth:`QTensor.dequantize`.
    rank
        m; at most min(n, k) is used. The paper finds that little is gained beyond 4 to 8.
    int8
        Factors as int8 codes, one scale for each row of u and of v, in place of float32.

    Returns
    -------
    LowRank
        u (n, m), v (m, k).

    Raises
    ------
    TypeError
        Arrays of other types.
    ValueError
        Shapes that differ, NaN or Inf, rank below 1.

    >>> import numpy as np
    >>> import zquant as zq
    >>> w = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    >>> q = zq.RTN().quantize(w, zq.QuantSpec(3))
    >>> error = w - q.dequantize()
    >>> part = zq.lorc(w, q.dequantize(), rank=8)
    >>> part
    LowRank(32x64, rank 8, float32)
    >>> rest = np.linalg.svd(error, compute_uv=False)[8:]
    >>> bool(np.isclose(np.linalg.norm(error - part.dense()), np.linalg.norm(rest), rtol=1e-5))
    True
    """
    w, w_hat = _array(w, "w", "float32"), _array(w_hat, "w_hat", "float32")
    if w.ndim != 2 or w.shape != w_hat.shape or not w.size:
        raise ValueError(f"w, w_hat: expected two matrices of one shape, got {w.shape} and {w_hat.shape}")
    rank = as_count("rank", rank, 1)
    for name, array in (("w", w), ("w_hat", w_hat)):
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: NaN or Inf")
    u, v = _factors(w.astype(np.float64) - w_hat, min(rank, *w.shape))
    left, right = u.astype(np.float32), v.astype(np.float32)
    return LowRank(_coded(left), _coded(right)) if int8 else LowRank(left, right)


@register
@dataclass(frozen=True)
class LoRC(Repair):
    """LoRC; the options are those of :func:`lorc`. Needs no data.

    >>> import numpy as np
    >>> from zquant.methods import RTN
    >>> from zquant.spec import QuantSpec
    >>> w = np.float32([[0.1, 0.2, -0.7], [0.3, -0.1, 0.7]])
    >>> q = RTN().quantize(w, QuantSpec(4))
    >>> LoRC(rank=2).repair(w, q, q.spec)
    LowRank(2x3, rank 2, float32)
    """

    rank: int = 8
    int8: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", as_count("rank", self.rank, 1))
        set_flags(self, "int8")

    def repair(self, w: Array, tensor: QTensor, spec: QuantSpec, stats: Mapping[str, Array] | None = None) -> Any:
        """The low-rank part of w - tensor."""
        return lorc(w, tensor.dequantize(), self.rank, self.int8)
