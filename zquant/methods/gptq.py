"""GPTQ (Frantar et al., 2022, arXiv 2210.17323) and GPTAQ (Li et al., 2025, arXiv 2504.02692).

    minimise over q:  tr (w - q) H (w - q)^T,   H = mean over tokens of x x^T, + damping * mean(diag H) on its diagonal
    H^-1 = U^T U,     e_i = (w'_i - q_i) / U_ii,     w'_c -= e_i U_ic  for the columns c after i,     w'_0 = w_0

Columns are rounded one after the other; what each loses is made good by those after it. GPTAQ also knows what the inputs
would be without quantization, x + delta x, and moves the targets: w'_c += w'_i P_ic, P = alpha triu(D U^T, 1) U,
D = mean of (delta x) x^T. csrc/algo/gptq.c does it without inverting H; zquant/reference/gptq.py as written here.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Union

import numpy as np

from .. import _core
from ..checks import as_count
from ..ops.quantize import _array, quantize_weight, quantize_weight_blocks
from ..qtensor import QTensor
from ..spec import QuantSpec
from .base import Method, calibrated, not_negative, register, set_flags, weight_spec

__all__ = ["FP4", "GPTAQ", "GPTQ", "NF4", "GridTensor", "SolveInfo", "gptq"]

Array = np.ndarray


def _table(*values: float) -> Array:
    table = np.array(values, np.float32)
    table.flags.writeable = False
    return table


#: The values of float4 (E2M1).
FP4 = _table(-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
#: NormalFloat4 (Dettmers et al., 2023, QLoRA, arXiv 2305.14314): quantiles of the normal distribution.
NF4 = _table(-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
             -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
             0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1)


@dataclass(frozen=True)
class SolveInfo:
    """What a solver did.

    Attributes
    ----------
    loss, rtn_loss
        tr (w - w_hat) H (w - w_hat)^T of the result and of round to nearest, H without damping: the mean over tokens of
        the squared error of the layer's output. ``rtn_loss`` is NaN when it was not asked for. With ``deviation``, both
        are the part of the mean of |w_hat x - w (x + alpha delta x)|^2 that depends on w_hat, and may be negative.
    damping
        What was added to the diagonal of H, relative to its mean.
    rank
        Pivots of H that exceed the damping: columns that the columns after them do not explain. Few of them mean that
        calibration saw too little; it is what the damping leaves of the rank, not the rank itself.
    dead
        Columns whose input was always 0. Their weights become 0.
    rtn_rows
        Rows for which round to nearest was better and was kept.
    fallback
        None; "damping": H was singular and more damping was needed than was asked for; "rtn": no damping helped and the
        result is round to nearest.

    >>> w, gram = np.array([[0.34, 0.34], [0.7, -0.14]], np.float32), np.array([[1, 0.9], [0.9, 1]])
    >>> info = gptq(w, gram, bits=3)[1]
    >>> info.loss <= info.rtn_loss, info.rank, info.dead, info.fallback
    (True, 2, 0, None)
    """

    loss: float
    rtn_loss: float
    damping: float
    rank: int
    dead: int
    rtn_rows: int
    fallback: str | None


@dataclass(frozen=True, eq=False)
class GridTensor:
    """Codes on a grid of any values: w_hat = values[codes] * scales.

    Parameters
    ----------
    codes
        (n, k) uint8.
    scales
        (n, ceil(k / group_size)) float32.
    values
        (count,) float32, ascending.
    group_size
        Inputs per scale.

    >>> values = np.array([-1, 0, 1], np.float32)
    >>> GridTensor(np.array([[0, 2]], np.uint8), np.array([[2.0]], np.float32), values, 2).dequantize()
    array([[-2.,  2.]], dtype=float32)
    """

    codes: Array
    scales: Array
    values: Array
    group_size: int

    def dequantize(self) -> Array:
        """The (n, k) float32 matrix."""
        column = np.arange(self.codes.shape[1]) // self.group_size
        return self.values[self.codes] * self.scales[:, column]


def _grid(grid: str | Sequence[float] | Array) -> tuple[Array, Array]:
    """Ascending values and the borders between them. A weight on a border gets the lower value; FP4's the even one."""
    names = {"fp4": FP4, "nf4": NF4}
    if isinstance(grid, str) and grid.lower() not in names:
        raise ValueError(f"grid: unknown name {grid!r}; known: {', '.join(names)}")
    values = np.ascontiguousarray(names[grid.lower()] if isinstance(grid, str) else grid, np.float32)
    if values.ndim != 1 or not 2 <= values.size <= 256:
        raise ValueError(f"grid: expected 2 to 256 values, got shape {values.shape}")
    if not np.isfinite(values).all() or not (np.diff(values) > 0).all():
        raise ValueError("grid: expected finite, ascending values")
    borders = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    if np.array_equal(values, FP4):
        up = np.abs(np.arange(15) - 7)[1:] % 2 == 0  # the upper neighbour has the even code
        borders = np.where(up, np.nextafter(borders, np.float32(-np.inf)), borders)
    return values, borders


def _order(diagonal: Array, act_order: bool | str, group: int) -> Array:
    """The columns in the order in which they are quantized."""
    k = len(diagonal)
    if not act_order:
        return np.arange(k, dtype=np.int64)
    if act_order != "group":
        return np.argsort(-diagonal, kind="stable").astype(np.int64)
    number, most = np.arange(k) // group, np.maximum.reduceat(diagonal, np.arange(0, k, group))
    last = number == k // group  # a short group stays last
    return np.lexsort((-diagonal, number, -most[number], last)).astype(np.int64)


def _check(symmetric: object, act_order: object, static_groups: object, mse: object, compare: object) -> None:
    named = {"symmetric": symmetric, "static_groups": static_groups, "mse": mse, "compare": compare}
    for name, value in named.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    if not isinstance(act_order, (bool, np.bool_)) and act_order != "group":
        raise ValueError(f"act_order: expected True, False or 'group', got {act_order!r}")


def _square(a: Any, name: str, k: int) -> Array:
    a = _array(a, name, "float32", "float64")
    if a.shape != (k, k):
        raise ValueError(f"{name}: expected shape {(k, k)}, got {a.shape}")
    return a


def _row_losses(w: Array, w_hat: Array, hessian: Array, deviation: Array | None, alpha: float) -> Array:
    """Of |w_hat x - w (x + alpha delta x)|^2, the part that depends on w_hat: d H d^T + 2 alpha w D d^T, d = w - w_hat."""
    d = w.astype(np.float64) - w_hat
    target = d @ hessian
    if deviation is not None:
        target += 2 * alpha * (w.astype(np.float64) @ deviation)
    return np.einsum("ij,ij->i", target, d)


def _round(w: Array, spec: QuantSpec, grid: tuple[Array, Array] | None, group: int,
           given: Array | None) -> tuple[Array, Array, Array]:
    """Round to nearest, with the given scales if there are any: codes, scales, zeros."""
    column = np.arange(w.shape[1]) // group
    if grid is None and given is not None:
        top = 2 ** (spec.bits - 1) - 1
        with np.errstate(over="ignore"):  # beyond float32 is beyond the last code
            codes = np.rint(w / given[:, column]).clip(-top, top).astype(np.int8)
        return codes, given.copy(), np.zeros(given.shape, np.int32)
    if grid is None:
        codes, scales, zeros = quantize_weight(w, spec.bits, group, spec.symmetric)
        return codes, scales, np.zeros(scales.shape, np.int32) if zeros is None else zeros
    scales = _absmax_scales(w, grid[0], group) if given is None else given.copy()
    with np.errstate(over="ignore"):
        scaled = w / scales[:, column]
    return np.searchsorted(grid[1], scaled, side="left").astype(np.uint8), scales, np.zeros(scales.shape, np.int32)


def _absmax_scales(w: Array, values: Array, group: int) -> Array:
    """The largest weight of a group is the grid's largest value."""
    starts = np.arange(0, w.shape[1], group)
    most = np.maximum.reduceat(np.abs(w), starts, axis=1) if w.size else np.zeros((len(w), len(starts)), np.float32)
    scales = most / np.abs(values).max()
    return np.where(scales >= np.finfo(np.float32).tiny, scales, np.float32(1))


def gptq(w: Array, hessian: Array, bits: int = 4, group_size: int | None = None, symmetric: bool = True, *,
         act_order: bool | str = True, static_groups: bool = True, damping: float = 0.01, block: int = 128, mse: bool = False,
         grid: str | Sequence[float] | Array | None = None, deviation: Array | None = None, alpha: float = 0.25,
         compare: bool = True, scales: Array | None = None) -> tuple[Union[QTensor, GridTensor], SolveInfo]:
    """GPTQ: quantize a layer's weights so that its outputs change least on the calibration data.

        minimise tr (w - q) H (w - q)^T:    e_i = (w'_i - q_i) / U_ii,   w'_c -= e_i U_ic  for c > i,   H^-1 = U^T U

    Frantar et al., 2022, arXiv 2210.17323, algorithm 1; with ``deviation`` GPTAQ, Li et al., 2025, arXiv 2504.02692. Layers
    with the same input (query, key and value) have the same H; their rows may be stacked and solved at once.

    Parameters
    ----------
    w : float32, shape (n, k)
        (out, in).
    hessian : float32 or float64, shape (k, k)
        The Gram matrix of the layer's inputs: sum of x x^T over the tokens, divided by their number. Only the losses
        depend on its scale.
    bits, group_size, symmetric
        The format, as in :func:`zquant.ops.quantize_weight`.
    act_order
        Which columns come first: True, those with the largest diagonal element of H; False, as they are; "group", whole
        groups by their largest element, and columns by theirs inside a group (GAR, arXiv 2505.14638).
    static_groups
        True: all scales are found before the first column is rounded. False: a group's when it is reached, from its
        weights as they are then; not with act_order=True, which tears groups apart.
    damping
        Added to the diagonal of H, relative to its mean. It grows tenfold for as long as H is not positive definite.
    block
        Columns between two products with everything before them. The codes do not depend on it.
    mse
        Search each scale for the least squared error, weighted by the diagonal of H, among 80 shrunk ranges.
    grid
        Instead of integers: "fp4", "nf4" or 2 to 256 ascending values (``bits`` and ``symmetric`` are not used then).
    deviation : float32 or float64, shape (k, k)
        GPTAQ: sum of (x_float - x) x^T over the tokens, divided by their number, where x_float is what the float model
        feeds this layer and x what the quantized one does.
    alpha
        What the deviation counts. 0.25 in the authors' code, 1 in their paper.
    compare
        Round to nearest as well, and keep that for the rows where it is better: no row is then worse than by round to
        nearest of w with the dead columns at 0. About half of the time after the factorisation.
    scales : float32, shape (n, ceil(k / group_size))
        Scales to keep, positive normal numbers, such as rows share; round to nearest is then with them too. Not with
        symmetric=False, static_groups=False or mse=True.

    Returns
    -------
    QTensor, or GridTensor for a ``grid``
    SolveInfo

    Raises
    ------
    TypeError
        Arrays of other types.
    ValueError
        Shapes that do not fit; NaN or Inf; scales that are not positive; an H that is not symmetric or has a negative
        diagonal element.

    The codes are the same for any number of threads, any block and any dispatch level, given the same OpenBLAS kernels.

    >>> import numpy as np
    >>> import zquant as zq
    >>> rng = np.random.default_rng(0)
    >>> x = (rng.standard_normal((200, 4)) @ rng.standard_normal((4, 32)) + 0.3 * rng.standard_normal((200, 32)))
    >>> w = rng.standard_normal((8, 32)).astype(np.float32)
    >>> q, info = zq.gptq(w, x.T @ x / 200, bits=4, group_size=16)
    >>> q
    QTensor(8x32, int4, groups of 16, 192 B, was 1024)
    >>> info.loss < 0.6 * info.rtn_loss
    True
    """
    _check(symmetric, act_order, static_groups, mse, compare)
    w = _array(w, "w", "float32")
    if w.ndim != 2:
        raise ValueError(f"w: expected 2 dimensions, got {w.ndim}")
    k = w.shape[1]
    spec = weight_spec(bits, group_size, symmetric)
    group = max(1, min(spec.group_size or k, k))
    if not static_groups and act_order and act_order != "group" and group < k:
        raise ValueError("static_groups=False needs act_order=False or 'group': act_order=True tears groups apart")
    hessian = _square(hessian, "hessian", k)
    if deviation is not None:
        deviation = _square(deviation, "deviation", k)
    table = None if grid is None else _grid(grid)
    given = None if scales is None else _array(scales, "scales", "float32")
    if w.size == 0:
        empty = _tensor(*_round(w, spec, table, group, given), spec, table, group)
        return empty, SolveInfo(0.0, 0.0, float(damping), 0, 0, 0, None)
    order = _order(np.diagonal(hessian), act_order, group)
    values, borders = table if table is not None else (None, None)
    solved = _core.gptq(w, hessian, deviation, order, spec.bits, spec.symmetric, values, borders, group,
                        not static_groups, bool(mse), bool(compare) and deviation is None, block, damping, alpha, given)
    if solved is None:
        return _fallen_back(w, hessian, deviation, alpha, _round(w, spec, table, group, given), spec, table, group)
    (codes, scales, zeros, loss, rtn_loss, is_rtn), used, rank, dead = solved
    if deviation is not None:
        live = np.where(np.diagonal(hessian) > 0, w, np.float32(0))
        loss = _row_losses(live, _tensor(codes, scales, zeros, spec, table, group).dequantize(), hessian, deviation, alpha)
        if compare:
            rounded = _round(live, spec, table, group, given)
            rtn_loss = _row_losses(live, _tensor(*rounded, spec, table, group).dequantize(), hessian, deviation, alpha)
            is_rtn = rtn_loss < loss
            loss = np.minimum(loss, rtn_loss)
            for array, other in zip((codes, scales, zeros), rounded):
                array[is_rtn] = other[is_rtn]
    info = SolveInfo(float(loss.sum()), float(rtn_loss.sum()), used, rank, dead, int(is_rtn.sum()),
                     "damping" if used > damping else None)
    return _tensor(codes, scales, zeros, spec, table, group), info


def _tensor(codes: Array, scales: Array, zeros: Array, spec: QuantSpec, table: tuple[Array, Array] | None,
            group: int) -> Union[QTensor, GridTensor]:
    if table is not None:
        return GridTensor(codes, scales, table[0], group)
    return QTensor(codes, scales, None if spec.symmetric else zeros, spec)


def _fallen_back(w: Array, hessian: Array, deviation: Array | None, alpha: float, rounded: tuple[Array, Array, Array],
                 spec: QuantSpec, table: tuple[Array, Array] | None,
                 group: int) -> tuple[Union[QTensor, GridTensor], SolveInfo]:
    """Round to nearest: H is so far from positive definite that nothing can be solved."""
    tensor = _tensor(*rounded, spec, table, group)
    loss = float(_row_losses(w, tensor.dequantize(), hessian, deviation, alpha).sum())
    dead = int((np.diagonal(hessian) == 0).sum())
    return tensor, SolveInfo(loss, loss, float("inf"), 0, dead, len(w), "rtn")


@register
@dataclass(frozen=True)
class GPTQ(Method):
    """GPTQ; the options are those of :func:`gptq`.

    ``stats["gram"]`` is (k, k), float32 or float64: the mean over tokens of x x^T, without a factor 2.

    >>> import numpy as np
    >>> from zquant.spec import QuantSpec
    >>> gram = np.array([[1, 0.9], [0.9, 1]])
    >>> GPTQ().quantize(np.array([[0.34, 0.34], [0.7, -0.14]], np.float32), QuantSpec(3), {"gram": gram}).codes.tolist()
    [[3, 3], [3, -1]]
    """

    act_order: bool | str = True
    static_groups: bool = True
    damping: float = 0.01
    block: int = 128
    mse: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        name, change = type(self).__name__, object.__setattr__
        if not (isinstance(self.act_order, str) and self.act_order == "group"):
            if not isinstance(self.act_order, (bool, np.bool_)):
                raise ValueError(f"{name}: act_order: expected True, False or 'group', got {self.act_order!r}")
            change(self, "act_order", bool(self.act_order))
        set_flags(self, "static_groups", "mse")
        change(self, "damping", not_negative(f"{name}: damping", self.damping))
        change(self, "block", as_count(f"{name}: block", self.block, 1))

    def quantize(self, w: Array, spec: QuantSpec, stats: Mapping[str, Array] | None = None) -> QTensor:
        """Quantize w (n, k) float32 to ``spec``. Rows that share a scale have that of round to nearest.

        Raises
        ------
        ValueError
            No ``stats["gram"]``; ``mse`` or dynamic groups where rows share scales; what :func:`gptq` refuses.
        """
        return self.solve(w, spec, stats)[0]

    def solve(self, w: Array, spec: QuantSpec, stats: Mapping[str, Array] | None = None) -> tuple[QTensor, SolveInfo]:
        """As :meth:`quantize`, with what the solver has to say."""
        stats = calibrated(self, stats)
        shared = None
        if spec.granularity in ("row_block", "tensor"):
            if self.mse or not self.static_groups:
                raise ValueError(f"{type(self).__name__} quantizes to {spec} with the scales of round to nearest: "
                                 "not with mse=True or static_groups=False, which find others for each row")
            shared = quantize_weight_blocks(_array(w, "w", "float32"), spec.blocks or 1, bits=spec.bits)[1]
        tensor, info = gptq(w, stats["gram"], spec.bits, spec.group_size, spec.symmetric, act_order=self.act_order,
                            static_groups=self.static_groups, damping=self.damping, block=self.block, mse=self.mse,
                            scales=shared, **self._further(stats))
        assert isinstance(tensor, QTensor)
        return tensor if shared is None else replace(tensor, spec=spec), info

    def _further(self, stats: Mapping[str, Array]) -> dict[str, Any]:
        """What is given to :func:`gptq` besides."""
        return {}


@register
@dataclass(frozen=True)
class GPTAQ(GPTQ):
    """GPTAQ: GPTQ whose targets are what the float model's inputs would give, x_float rather than x.

    ``stats["deviation"]`` is (k, k): the mean over tokens of (x_float - x) x^T. It is 0 for inputs that nothing quantized
    comes before; :func:`zquant.quantize` takes it in its sequential mode, and holds the float model's hidden states too.

    >>> import numpy as np
    >>> from zquant.spec import QuantSpec
    >>> w, gram = np.array([[0.34, 0.34], [0.7, -0.14]], np.float32), np.array([[1, 0.9], [0.9, 1]])
    >>> stats = {"gram": gram, "deviation": 0.5 * gram}  # the float model's inputs are half as large again
    >>> GPTAQ(alpha=1.0).quantize(w, QuantSpec(3), stats).codes.tolist()
    [[3, 3], [3, 1]]
    """

    alpha: float = 0.25
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "deviation"})

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "alpha", not_negative("GPTAQ: alpha", self.alpha))

    def _further(self, stats: Mapping[str, Array]) -> dict[str, Any]:
        return {"deviation": stats["deviation"], "alpha": self.alpha}
