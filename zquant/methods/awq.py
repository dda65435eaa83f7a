"""AWQ: activation-aware weight quantization (Lin et al., 2023, arXiv 2306.00978).

    W_hat(s) = Q(W diag(s)) diag(1 / s),    s = x^r  or  x^r / w^(1 - r),    x = mean |X_j|,  w = mean |W_j| / max of its group
    loss(s) = sum over the layers that read X of  tr (W_hat - W) C (W_hat - W)^T,    C = mean of x x^T

Channels that are large in the activations get finer steps. What produces X divides it by s; r is the one in a grid whose loss
is least. Then the range of every group of weights is clipped where that makes the error of the layer's output smaller.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import _core
from ..checks import as_count, as_real
from ..models.foldings import STAGES, fold
from ..ops.quantize import _array
from ..qtensor import QTensor
from ..spec import QuantSpec, Scheme
from ..statistics import Statistics
from .base import Method, Transform, calibrated, check_by_rows, register, weight_spec
from .folded import consumers, matrices, targets
from .rtn import RTN

__all__ = ["AWQClip", "AWQInfo", "AWQScale", "awq", "awq_clip"]

Array = np.ndarray

LEAST = 1e-4  # of a scale before it is normalised, as in the authors' code


@dataclass(frozen=True)
class AWQInfo:
    """What a search found.

    Attributes
    ----------
    ratio
        r of the best scale; None where no scale was better than none.
    duo
        Whether the weights were part of it.
    loss, rtn_loss
        Mean over tokens of the squared error of the layers' outputs, with the scale and without.

    >>> import numpy as np
    >>> import zquant as zq
    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.standard_normal((64, 16)) * np.geomspace(1, 30, 16), rng.standard_normal((8, 16)).astype(np.float32)
    >>> scale, info = zq.awq([w], np.abs(x).mean(0), x.T @ x / 64, bits=3)
    >>> info.loss <= info.rtn_loss
    True
    """

    ratio: float | None
    duo: bool
    loss: float
    rtn_loss: float


def _output_error(w: Array, w_hat: Array, gram: Any) -> float:
    """tr (w_hat - w) C (w_hat - w)^T with C packed: :func:`_loss` multiplies with the same C again and again."""
    error = w_hat - w
    product = _core.linear_forward(gram, error, 0, 0, None, 0)
    return float(np.multiply(product, error, out=product).sum(dtype=np.float64))


def _loss(weights: Sequence[Array], gram: Any, spec: QuantSpec, scale: Array | None) -> float:
    """Squared error of all outputs with inputs divided by ``scale``."""
    total = 0.0
    for w in weights:
        if scale is None:
            total += _output_error(w, RTN().quantize(w, spec).dequantize(), gram)
        else:
            total += _output_error(w, RTN().quantize(w * scale, spec).dequantize() / scale, gram)
    return total


def _weight_size(weights: Sequence[Array], group: int) -> Array:
    """(k,): mean over all rows of |w| relative to the largest of its group."""
    k = weights[0].shape[1]
    column = np.arange(k) // group
    sizes = np.zeros(k)
    for w in weights:
        most = np.maximum.reduceat(np.abs(w), np.arange(0, k, group), axis=1)
        sizes += (np.abs(w) / (most[:, column] + 1e-6)).sum(axis=0, dtype=np.float64)
    return sizes / sum(map(len, weights))


def _candidate(size: Array, weight_size: Array | None, ratio: float) -> Array:
    """s for one r, normalised so that its largest and its least value are reciprocal; 1 where nothing is known."""
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        s = size ** ratio if weight_size is None else size ** ratio / (weight_size ** (1 - ratio) + 1e-4)
    s = np.maximum(np.where(np.isfinite(s), s, 1.0), LEAST)
    s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
    return np.where(size > 0, s, np.float32(1))


def awq(weights: Array | Sequence[Array], mean_abs: Array, gram: Array, bits: int = 4, group_size: int | None = None,
        symmetric: bool = True, *, grid: int = 20, duo: bool | str = "both",
        tie: Any = None) -> tuple[Array, AWQInfo]:
    """The scale of a layer's input channels with which its weights lose least when rounded to nearest.

        minimise over r:  sum over layers of  tr E C E^T,   E = Q(W diag(s)) diag(1 / s) - W,   s = x^r  or  x^r / w^(1 - r)

    Lin et al., 2023, arXiv 2306.00978, section 3.2; x is ``mean_abs``, C is ``gram``, w the mean of abs(W) relative to the
    largest of its group.

    Parameters
    ----------
    weights : float32, shape (n, k), or a list of such
        (out, in), of all layers that read the input.
    mean_abs : shape (k,)
        Mean over tokens of abs(x).
    gram : shape (k, k)
        Mean over tokens of x x^T.
    bits, group_size, symmetric
        The format, as in :func:`zquant.ops.quantize_weight`.
    grid
        Values of r between 0 and 1.
    duo
        False: s = x^r, as in the paper. True: divided by w^(1 - r), as in AutoAWQ. "both": whichever is better.
    tie
        None, or a function (k,) -> (k,) that makes scales equal which have to be.

    Returns
    -------
    scale : (k,) float32
        What x is divided by and columns of the weights are multiplied with; ones where nothing was better.
    AWQInfo

    Raises
    ------
    TypeError
        Arrays of other types.
    ValueError
        Shapes that do not fit, NaN or Inf, a grid below 1.

    >>> import numpy as np
    >>> import zquant as zq
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((256, 64)) * np.where(np.arange(64) % 16 == 3, 20, 1)
    >>> w = rng.standard_normal((32, 64)).astype(np.float32)
    >>> scale, info = zq.awq(w, np.abs(x).mean(0), x.T @ x / 256, bits=3, group_size=32)
    >>> bool(scale[3] > 2 * scale[0]), info.loss < 0.5 * info.rtn_loss
    (True, True)
    """
    parts = [_array(w, "weights", "float32") for w in matrices(weights)]
    size, gram32 = np.asarray(mean_abs, np.float64), np.asarray(gram, np.float32)
    _check_awq(parts, size, gram32, duo)
    grid, spec = as_count("grid", grid, 1), weight_spec(bits, group_size, symmetric)
    k = parts[0].shape[1]
    weight_size = _weight_size(parts, min(spec.group_size or k, k)) if duo else None
    packed = _core.linear_pack_f32(gram32, None)
    best, plain = np.ones(k, np.float32), _loss(parts, packed, spec, None)
    info = AWQInfo(None, False, plain, plain)
    for use in {False: (None,), True: (weight_size,), "both": (None, weight_size)}[duo]:
        for ratio in np.arange(grid) / max(grid - 1, 1):
            s = _candidate(size, use, float(ratio))
            s = s if tie is None else tie(s)
            loss = _loss(parts, packed, spec, s)
            if loss < info.loss:
                best, info = s, AWQInfo(float(ratio), use is not None, loss, plain)
    return best, info


def _check_awq(parts: Sequence[Array], size: Array, gram: Array, duo: object) -> None:
    if not parts or any(w.ndim != 2 or w.shape[1] != parts[0].shape[1] or not w.size for w in parts):
        raise ValueError(f"weights: expected matrices (n, k) with the same k, got {[w.shape for w in parts]}")
    k = parts[0].shape[1]
    if size.shape != (k,) or gram.shape != (k, k):
        raise ValueError(f"mean_abs, gram: expected shapes {(k,)} and {(k, k)}, got {size.shape} and {gram.shape}")
    if not np.isfinite(size).all() or not np.isfinite(gram).all() or (size < 0).any():
        raise ValueError("mean_abs, gram: NaN, Inf or negative")
    _check_duo("duo", duo)


def _group_errors(error: Array, gram: Array, group: int) -> Array:
    """(n, groups): e C_gg e^T for the part e of each row that lies in group g."""
    k = error.shape[1]
    found = [np.einsum("ij,ij->i", error[:, a:a + group] @ gram[a:a + group, a:a + group], error[:, a:a + group])
             for a in range(0, k, group)]
    return np.stack(found, axis=1)


def awq_clip(w: Array, gram: Array, bits: int = 4, group_size: int | None = None, symmetric: bool = True, *, grid: int = 20,
             most: float = 0.5) -> Array:
    """The weights clipped, group by group, to the range in which the output's error is least when they are rounded to nearest.

        minimise over t, for each group g of a row:  e C_gg e^T,   e = Q(clip(w_g, -t, t)) - w_g

    The second half of AWQ (Lin et al., 2023, arXiv 2306.00978), as in the authors' code.

    Parameters
    ----------
    w : float32, shape (n, k)
        (out, in).
    gram : shape (k, k)
        Mean over tokens of x x^T. Only its diagonal blocks of ``group_size`` count.
    bits, group_size, symmetric
        The format.
    grid, most
        Ranges 1, 1 - 1 / grid, ... of max abs(w), down to 1 - most.

    Returns
    -------
    numpy.ndarray
        (n, k) float32. A group's error is never larger than without.

    Raises
    ------
    TypeError
        An array of another type.
    ValueError
        Shapes that do not fit, NaN or Inf, a grid below 1, ``most`` outside 0..1.

    >>> import numpy as np
    >>> w = np.float32([[0.1, 0.2, -0.3, 1.0]])
    >>> bool(awq_clip(w, np.diag([9, 9, 9, 0.1]), bits=3).max() < 0.8)
    True
    """
    w, gram32 = _array(w, "w", "float32"), np.asarray(gram, np.float32)
    if w.ndim != 2 or not w.size or gram32.shape != (w.shape[1], w.shape[1]):
        raise ValueError(f"w, gram: expected shapes (n, k) and (k, k), got {w.shape} and {gram32.shape}")
    if not np.isfinite(gram32).all():
        raise ValueError("gram: NaN or Inf")
    grid, most = _checked_ranges(grid, most)
    k, spec = w.shape[1], weight_spec(bits, group_size, symmetric)
    group = min(spec.group_size or k, k)
    column = np.arange(k) // group
    largest = np.maximum.reduceat(np.abs(w), np.arange(0, k, group), axis=1)
    bound, least = largest.copy(), np.full(largest.shape, np.inf)
    for step in range(int(grid * most) + 1):
        limit = largest * np.float32(1 - step / grid)
        clipped = np.clip(w, -limit[:, column], limit[:, column])
        error = _group_errors(RTN().quantize(clipped, spec).dequantize() - w, gram32, group)
        better = error < least
        bound[better], least[better] = limit[better], error[better]
    return np.clip(w, -bound[:, column], bound[:, column])


def _check_duo(name: str, duo: object) -> None:
    if not isinstance(duo, (bool, np.bool_, str)) or duo not in (True, False, "both"):
        raise ValueError(f"{name}: expected True, False or 'both', got {duo!r}")


def _checked_ranges(grid: Any, most: Any) -> tuple[int, float]:
    """The options of :func:`awq_clip`; ValueError where they are none."""
    return as_count("grid", grid, 1), as_real("most", most, 0, 1, "a number from 0 to 1")


@register("awq-scale")
@dataclass(frozen=True)
class AWQScale(Transform):
    """AWQ's scales, folded into what produces each layer's input; the options are those of :func:`awq`.

    Layers whose input nothing can scale (behind a GELU; encoders that normalise after the residual) stay as they are. The
    criterion is the squared error of the layers themselves, also for query, key and value, where the authors take that of the
    whole attention.

    >>> import zquant as zq
    >>> zq.Recipe.of([AWQScale(duo=False), "gptq"]).name
    'awq-scale+gptq'
    """

    grid: int = 20
    duo: bool | str = "both"
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "mean_abs"})

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", as_count("AWQScale: grid", self.grid, 1))
        _check_duo("AWQScale: duo", self.duo)

    def transform(self, model: Any, statistics: Statistics | None, scheme: Scheme) -> tuple[Any, Scheme]:
        """The folded model; see :meth:`Transform.transform`."""
        statistics = calibrated(self, statistics)
        for folding in targets(model, scheme, STAGES, branch=False):
            weights, spec, _ = consumers(model, scheme, folding)
            if spec.granularity not in ("channel", "group"):
                continue
            stats = statistics[folding.consumers[0]]
            scale, info = awq(weights, stats["mean_abs"], stats["gram"], spec.bits, spec.group_size, spec.symmetric,
                              grid=self.grid, duo=self.duo, tie=folding.tied)
            model = model if info.ratio is None else fold(model, folding, scale)
        return model, scheme


@register("awq-clip")
@dataclass(frozen=True)
class AWQClip(Method):
    """Round to nearest within ranges from :func:`awq_clip`: the second half of AWQ. The authors leave query and key layers
    unclipped; here every layer is.

    >>> import numpy as np
    >>> from zquant.spec import QuantSpec
    >>> w = np.full((1, 16), 0.3, np.float32)
    >>> w[0, 5] = 1  # a large weight whose input is nearly always 0
    >>> gram = np.diag(np.where(np.arange(16) == 5, 1e-3, 1.0))
    >>> tensor = AWQClip().quantize(w, QuantSpec(3), {"gram": gram})
    >>> bool(abs(tensor.dequantize()[0, 0] - 0.3) < 0.02)  # at the cost of that one; round to nearest has 0.33
    True
    """

    grid: int = 20
    most: float = 0.5
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        for name, value in zip(("grid", "most"), _checked_ranges(self.grid, self.most)):
            object.__setattr__(self, name, value)

    def quantize(self, w: Array, spec: QuantSpec, stats: Mapping[str, Array] | None = None) -> QTensor:
        """Quantize w (n, k) float32 to ``spec``, one scale per channel or group.

        Raises
        ------
        ValueError
            No ``stats["gram"]``; another granularity; what :func:`awq_clip` refuses.
        """
        check_by_rows(self, spec)
        stats = calibrated(self, stats)
        return RTN().quantize(awq_clip(w, stats["gram"], spec.bits, spec.group_size, spec.symmetric, grid=self.grid,
                                       most=self.most), spec)
