"""What a quantized layer adds to the product of its codes in float32: a low-rank correction, or the outlier columns."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["LowRank", "Outliers"]

Array = np.ndarray


def _check(what: str, array: Any, dtypes: tuple[Any, ...], shape: tuple[int | None, ...]) -> None:
    """ValueError or TypeError unless the array is of one of the types and of that shape; None in it stands for any size."""
    if not isinstance(array, np.ndarray) or array.dtype not in dtypes:
        kinds = " or ".join(np.dtype(d).name for d in dtypes)
        raise TypeError(f"{what}: expected an array of {kinds}, got {getattr(array, 'dtype', type(array).__name__)}")
    if array.ndim != len(shape) or any(want is not None and got != want for got, want in zip(array.shape, shape)):
        raise ValueError(f"{what}: expected shape {tuple('any' if n is None else n for n in shape)}, got {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{what}: NaN or Inf")


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix (n, k) as a product: (u * scales) v. A layer computes y = act(x W^T + (x v^T) (u * scales)^T + bias).

    Parameters
    ----------
    u
        (n, rank) float32, or int8 codes.
    v
        (rank, k) of the same type.
    scales
        (rank,) float32 with codes: the product of the scale of u's column and that of v's row. None with floats.

    Raises
    ------
    ValueError
        Shapes that do not fit, NaN or Inf.
    TypeError
        Other types.

    >>> LowRank(np.ones((2, 1), np.float32), np.float32([[1, 2, 3]])).dense().tolist()
    [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
    """

    u: Array
    v: Array
    scales: Array | None = None

    def __post_init__(self) -> None:
        kind = (np.int8,) if self.scales is not None else (np.float32,)
        _check("u", self.u, kind, (None, None))
        _check("v", self.v, kind, (self.u.shape[1], None))
        if self.rank == 0:
            raise ValueError("u: expected at least one column")
        if self.scales is not None:
            _check("scales", self.scales, (np.float32,), (self.rank,))

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.u.shape[0], self.v.shape[1]

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.u.nbytes + self.v.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def factors(self) -> tuple[Array, Array]:
        """u * scales and v as new or own float32 arrays: what the kernels take."""
        if self.scales is None:
            return self.u, self.v
        return self.u * self.scales, self.v.astype(np.float32)

    def dense(self) -> Array:
        """The (n, k) float32 matrix."""
        u, v = self.factors()
        return u @ v

    def take(self, rows: Array) -> LowRank:
        """These rows of the matrix, in this order."""
        return LowRank(self.u[rows], self.v, self.scales)

    @staticmethod
    def stack(parts: list[LowRank]) -> LowRank:
        """Matrices of the same inputs on top of one another: u block diagonal, v stacked.

        >>> a = LowRank(np.ones((1, 1), np.float32), np.float32([[1, 2]]))
        >>> LowRank.stack([a, a]).dense().tolist()
        [[1.0, 2.0], [1.0, 2.0]]
        """
        if len({part.scales is None for part in parts}) != 1:
            raise ValueError("low-rank parts: float32 and int8 do not stack")
        u = np.zeros((sum(part.u.shape[0] for part in parts), sum(part.rank for part in parts)), parts[0].u.dtype)
        row = column = 0
        for part in parts:
            u[row:row + part.u.shape[0], column:column + part.rank] = part.u
            row, column = row + part.u.shape[0], column + part.rank
        scales = None if parts[0].scales is None else np.concatenate([part.scales for part in parts if part.scales is not None])
        return LowRank(u, np.concatenate([part.v for part in parts]), scales)

    def __repr__(self) -> str:
        return f"LowRank({self.shape[0]}x{self.shape[1]}, rank {self.rank}, {self.u.dtype})"


@dataclass(frozen=True, eq=False)
class Outliers:
    """Which columns of a layer's input are not quantized: those that reach the threshold in any row of a call.

    Parameters
    ----------
    threshold
        Of abs(x), above 0; ``inf`` for none.
    columns
        (c,) int64, ascending: columns whose weights are kept in float32. Other outlier columns use the quantized weights.
    weights
        (n, c) float32.

    Raises
    ------
    ValueError
        A threshold that is not positive; columns out of order; shapes that do not fit; NaN or Inf.
    TypeError
        Other types.
    """

    threshold: float
    columns: Array
    weights: Array

    def __post_init__(self) -> None:
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)) or not self.threshold > 0:
            raise ValueError(f"threshold: expected a number above 0, got {self.threshold!r}")
        _check("columns", self.columns, (np.int64,), (None,))
        _check("weights", self.weights, (np.float32,), (None, len(self.columns)))
        if len(self.columns) and (self.columns[0] < 0 or (np.diff(self.columns) <= 0).any()):
            raise ValueError("columns: expected ascending indices")

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.columns.nbytes + self.weights.nbytes

    def take(self, rows: Array) -> Outliers:
        """For a layer with these outputs, in this order."""
        return Outliers(self.threshold, self.columns, self.weights[rows])

    @staticmethod
    def stack(parts: list[Outliers]) -> Outliers:
        """For layers of the same inputs on top of one another; ValueError where thresholds or columns differ."""
        first = parts[0]
        if any(part.threshold != first.threshold or not np.array_equal(part.columns, first.columns) for part in parts):
            raise ValueError("outliers: thresholds or columns differ")
        return Outliers(first.threshold, first.columns, np.concatenate([part.weights for part in parts]))

    def __repr__(self) -> str:
        return f"Outliers(threshold {self.threshold:g}, float32 weights of {len(self.columns)} columns)"
