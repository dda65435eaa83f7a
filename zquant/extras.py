"""What a linear layer may carry beside its weight: a known range of its input, a branch, a correction, outliers."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Union

import numpy as np

from .checks import as_count
from .qtensor import QTensor, _frozen
from .spec import QuantSpec

__all__ = ["Branch", "Extras", "LowRank", "Outliers", "StaticRange", "static_range"]

Factor = Union[np.ndarray, QTensor]
TINY = float(np.finfo(np.float32).tiny)


def _float32(what: str, array: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only view of a finite float32 array of that shape; -1 matches any length."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != len(shape) or any(
            want not in (-1, got) for want, got in zip(shape, array.shape)):
        got = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{what} must be float32 of shape {shape}, got {got}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds NaN or Inf")
    return _frozen(array)


class _Arrays:
    """Frozen dataclasses of arrays: equal when every field is, bit for bit; not hashable."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(mine, getattr(other, name)) for name, mine in vars(self).items())

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(map(_bytes, vars(self).values()))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, QTensor) and isinstance(b, QTensor):
        return a.spec == b.spec and all(_same(getattr(a, n), getattr(b, n)) for n in ("codes", "scales", "zeros"))
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return type(a) is type(b) and a == b


def _bytes(value: Any) -> int:
    return 0 if value is None else 4 if isinstance(value, (int, float)) else value.nbytes


@dataclass(frozen=True)
class StaticRange:
    """Scale and zero point of a layer's input, known before it runs: q = clamp(rint(x / scale) + zero, 0, 255).

    Parameters
    ----------
    scale
        Positive and normal in float32; rounded to float32 here.
    zero
        The code of 0.0 as an unsigned byte; 128 where the codes are symmetric (they are int8 plus 128 then, and saturate
        at -128 and 127).

    >>> StaticRange(0.1, 128)
    StaticRange(scale=0.10000000149011612, zero=128)
    """

    scale: float
    zero: int

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):
            scale = float(np.float32(self.scale))
        if not TINY <= scale < np.inf:
            raise ValueError(f"StaticRange: scale must be a positive normal float32, got {self.scale!r}")
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero", as_count("StaticRange: zero", self.zero, 0, 255))

    @property
    def nbytes(self) -> int:
        """Stored bytes: the scale and the zero point."""
        return 5


def static_range(spec: QuantSpec, minmax: np.ndarray) -> StaticRange:
    """The range that covers everything calibration has seen: what a solver pass makes of the statistic "minmax".

    Parameters
    ----------
    spec
        Format of the activations: granularity "tensor", not dynamic.
    minmax
        (2, k) float32, smallest and largest value of each input feature: ``statistics[name]["minmax"]``, which calibration
        takes behind the layer's :class:`Branch`, if it has one.

    Notes
    -----
    With lo = min(0, min x) and hi = max(0, max x): symmetric scale = max(-lo, hi) / 127, zero = 128; asymmetric
    scale = (hi - lo) / 255, zero = rint(-lo / scale). The division is in float64; the scale is rounded to float32 before
    the zero point is taken, so that both belong together. An input of zeros (or below the smallest normal scale) gets
    scale 1.

    >>> spec = QuantSpec(8, granularity="tensor", symmetric=False)
    >>> static_range(spec, np.float32([[-1, 0], [2, 4.1]]))
    StaticRange(scale=0.019999999552965164, zero=50)
    """
    if spec.granularity != "tensor" or spec.dynamic or spec.bits != 8:
        raise ValueError(f"static_range: the format must be 8 bits with one scale known beforehand, not {spec}")
    if minmax.ndim != 2 or minmax.shape[0] != 2 or not np.isfinite(minmax).all():
        raise ValueError(f"static_range: minmax must be finite and of shape (2, k), got shape {minmax.shape}")
    lo, hi = min(0.0, float(minmax[0].min(initial=0))), max(0.0, float(minmax[1].max(initial=0)))
    scale = float(np.float32(max(-lo, hi) / 127 if spec.symmetric else (hi - lo) / 255))
    if scale < TINY:
        scale = 1.0
    return StaticRange(scale, 128 if spec.symmetric else int(np.clip(np.rint(-lo / scale), 0, 255)))


@dataclass(frozen=True, eq=False)
class Branch(_Arrays):
    """The layer reads (x - shift) / scale in place of x: for inputs whose producer cannot take the scale over.

    The division is a product with the float32 reciprocal of the scale, which is rounded once, when the branch is made:
    (x - shift) * reciprocal, two more roundings per element (one without a shift). The layer's weights and bias must have
    been changed so that its outputs stay the same (columns times scale, bias plus W shift): the branch does not do that.

    Parameters
    ----------
    scale
        (k,) float32, positive and normal, and so are the reciprocals.
    shift
        (k,) float32 or None.
    """

    scale: np.ndarray
    shift: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _float32("Branch: scale", self.scale, (-1,)))
        if not ((self.scale >= TINY) & (self.scale <= 1 / TINY)).all():
            raise ValueError("Branch: scale must be positive, and normal in float32 as its reciprocal")
        if self.shift is not None:
            object.__setattr__(self, "shift", _float32("Branch: shift", self.shift, self.scale.shape))

    @property
    def reciprocal(self) -> np.ndarray:
        """(k,) float32: 1 / scale, what the kernel multiplies with."""
        return np.float32(1) / self.scale

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """What the layer sees of x (..., k) float32; the same bits as inside the layer.

        >>> Branch(np.float32([2, 4]), np.float32([1, 0]))(np.float32([[3, 8]])).tolist()
        [[1.0, 2.0]]
        """
        return (x if self.shift is None else x - self.shift) * self.reciprocal


@dataclass(frozen=True, eq=False)
class LowRank(_Arrays):
    """A low-rank correction of a quantized layer (LoRC): y = act(x W^T + (x v^T) u^T + bias) + residual.

    x is what the layer multiplies its codes with: behind its :class:`Branch` if it has one, and where it is quantized to 8
    bits, what the codes stand for.

    Parameters
    ----------
    u
        (n, r) float32, or a QTensor: symmetric 8-bit codes with one scale per row.
    v
        (r, k), in either form as well.

    >>> correction = LowRank(np.ones((3, 1), np.float32), np.full((1, 4), 0.5, np.float32))
    >>> correction.rank, correction.shape
    (1, (3, 4))
    """

    u: Factor
    v: Factor

    def __post_init__(self) -> None:
        for name in ("u", "v"):
            factor = getattr(self, name)
            if not isinstance(factor, QTensor):
                object.__setattr__(self, name, _float32(f"LowRank: {name}", factor, (-1, -1)))
            elif factor.spec != QuantSpec():
                raise ValueError(f"LowRank: codes of {name} must be {QuantSpec()}, not {factor.spec}")
        if self.u.shape[1] != self.v.shape[0]:
            raise ValueError(f"LowRank: u has rank {self.u.shape[1]} and v rank {self.v.shape[0]}")
        if self.rank < 1:
            raise ValueError("LowRank: rank must be at least 1, got factors of rank 0")

    @property
    def rank(self) -> int:
        return self.u.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.u.shape[0], self.v.shape[1]

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """u and v as float32 arrays."""
        u, v = (f.dequantize() if isinstance(f, QTensor) else f for f in (self.u, self.v))
        return u, v

    def dense(self) -> np.ndarray:
        """u v, (n, k) float32.

        >>> LowRank(np.ones((2, 1), np.float32), np.float32([[1, 2, 3]])).dense().tolist()
        [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]
        """
        u, v = self.factors()
        return u @ v

    @staticmethod
    def stack(parts: Sequence[LowRank]) -> LowRank:
        """Of layers that read the same x, outputs side by side: u block diagonal, v stacked.

        >>> a = LowRank(np.ones((1, 1), np.float32), np.float32([[1, 2]]))
        >>> LowRank.stack([a, a]).dense().tolist()
        [[1.0, 2.0], [1.0, 2.0]]
        """
        if len({(type(part.u), type(part.v)) for part in parts}) != 1:
            raise ValueError("corrections with factors in float32 and in codes do not stack")
        u = _stacked([part.u for part in parts], _block_diagonal)
        return LowRank(u, _stacked([part.v for part in parts], np.concatenate))

    def __repr__(self) -> str:
        kind = "int8" if isinstance(self.u, QTensor) else "float32"
        return f"LowRank({self.shape[0]}x{self.shape[1]}, rank {self.rank}, {kind})"


def _block_diagonal(blocks: Sequence[np.ndarray]) -> np.ndarray:
    rows, columns = np.cumsum([(0, 0), *(block.shape for block in blocks)], axis=0).T
    out = np.zeros((rows[-1], columns[-1]), blocks[0].dtype)
    for i, block in enumerate(blocks):
        out[rows[i]:rows[i + 1], columns[i]:columns[i + 1]] = block
    return out


def _stacked(factors: Sequence[Any], join: Callable[[Sequence[np.ndarray]], np.ndarray]) -> Factor:
    """Factors joined, floats or codes; scales belong to rows and are always one below the other."""
    if not isinstance(factors[0], QTensor):
        return join(factors)
    return QTensor(join([f.codes for f in factors]), np.concatenate([f.scales for f in factors]), None, factors[0].spec)


@dataclass(frozen=True, eq=False)
class Outliers(_Arrays):
    """Input features that are multiplied in float32 (LLM.int8()): those given, and those that x shows at run time.

    Parameters
    ----------
    threshold
        A feature with |x| at or above it anywhere in the call is an outlier; Inf leaves it to ``columns``.
    columns
        (c,) int64, ascending: features known to be outliers. c may be 0.
    weights
        (n, c) float32: their columns of the float weight.

    >>> Outliers(6.0, np.array([2, 7]), np.zeros((3, 2), np.float32))
    Outliers(threshold 6, float32 weights of 2 columns)
    """

    threshold: float
    columns: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", float(np.float32(self.threshold)))
        if not self.threshold > 0:
            raise ValueError(f"Outliers: threshold must be positive, got {self.threshold!r}")
        columns = np.asarray(self.columns)
        if columns.dtype != np.int64 or columns.ndim != 1 or (np.diff(columns) <= 0).any() or (columns < 0).any():
            raise ValueError(f"Outliers: columns must be ascending int64 of shape (c,), got {columns.dtype} {columns.shape}")
        object.__setattr__(self, "columns", _frozen(columns))
        object.__setattr__(self, "weights", _float32("Outliers: weights", self.weights, (-1, len(columns))))

    @staticmethod
    def stack(parts: Sequence[Outliers]) -> Outliers:
        """Of layers that read the same x, outputs side by side; ValueError where thresholds or columns differ."""
        first = parts[0]
        if any(part.threshold != first.threshold or not np.array_equal(part.columns, first.columns) for part in parts):
            raise ValueError("layers differ in their outliers' threshold or columns")
        return Outliers(first.threshold, first.columns, np.concatenate([part.weights for part in parts]))

    def __repr__(self) -> str:
        return f"Outliers(threshold {self.threshold:g}, float32 weights of {len(self.columns)} columns)"


@dataclass(frozen=True)
class Extras:
    """What a :class:`zquant.linear.Linear` does beside the product of its (quantized) weight; all fields may be None.

    Parameters
    ----------
    static
        Range of the input where the layer's activations are per tensor and not dynamic.
    branch
        What x goes through on its way in.
    correction
        A low-rank matrix that is added to the weight's product.
    outliers
        Input features that stay float32.

    >>> low_rank = LowRank(np.ones((3, 1), np.float32), np.ones((1, 4), np.float32))
    >>> Extras(correction=low_rank).correction.shape
    (3, 4)
    """

    static: StaticRange | None = None
    branch: Branch | None = None
    correction: LowRank | None = None
    outliers: Outliers | None = None

    def __post_init__(self) -> None:
        for (name, value), kind in zip(self.given(every=True), (StaticRange, Branch, LowRank, Outliers)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"Extras: {name} must be a {kind.__name__} or None, got {type(value).__name__}")

    __hash__ = None  # type: ignore[assignment]

    def given(self, every: bool = False) -> Iterator[tuple[str, Any]]:
        """Names and values of the fields that are not None (or of all)."""
        return ((f.name, getattr(self, f.name)) for f in fields(self) if every or getattr(self, f.name) is not None)

    def __bool__(self) -> bool:
        return any(True for _ in self.given())

    @property
    def take_codes(self) -> bool:
        """Whether the layer reads token codes in place of float32 rows, if it is quantized per token."""
        return self.static is None and self.branch is None and self.outliers is None

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return sum(value.nbytes for _, value in self.given())

    def check(self, out_features: int, in_features: int) -> None:
        """ValueError where a field does not fit a layer of that shape."""
        if self.branch is not None and self.branch.scale.shape != (in_features,):
            raise ValueError(f"Branch: scale must have shape ({in_features},), got {self.branch.scale.shape}")
        if self.correction is not None:
            got = self.correction.u.shape[0], self.correction.v.shape[1]
            if got != (out_features, in_features):
                raise ValueError(f"LowRank: u v must have shape {(out_features, in_features)}, got {got}")
        if self.outliers is not None:
            if self.outliers.weights.shape[0] != out_features:
                raise ValueError(f"Outliers: weights must have {out_features} rows, got {self.outliers.weights.shape[0]}")
            if len(self.outliers.columns) and self.outliers.columns[-1] >= in_features:
                raise ValueError(f"Outliers: columns go up to {self.outliers.columns[-1]}; the layer has {in_features} inputs")

    def take(self, rows: np.ndarray) -> Extras:
        """The extras of a layer with these of its outputs, in this order."""
        correction, outliers = self.correction, self.outliers
        if correction is not None:
            correction = LowRank(_rows(correction.u, rows), correction.v)
        if outliers is not None:
            outliers = Outliers(outliers.threshold, outliers.columns, outliers.weights[rows])
        return Extras(self.static, self.branch, correction, outliers)


def _rows(factor: Factor, rows: np.ndarray) -> Factor:
    if isinstance(factor, QTensor):
        return QTensor(factor.codes[rows], factor.scales[rows], None, factor.spec)
    return factor[rows]
