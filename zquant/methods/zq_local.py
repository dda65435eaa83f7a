"""ZQ-Local (ZeroQuant-V2, Yao et al., 2023, arXiv 2303.08302): a layer's weights trained straight through their quantizer.

    loss(W) = mean over tokens of |x Q(W)^T - x W_0^T|^2 = tr D C D^T,     D = Q(W) - W_0,   C = mean of x x^T
    gradient = 2 D C                                                        with d Q(W) / d W = 1

C holds all that the loss says of the data, so that every step is one on all tokens. Adam (Kingma and Ba, arXiv 1412.6980) does
the steps. Rows do not depend on each other where they have scales of their own: the best of every row is kept.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from .. import _core
from ..ops.quantize import _array
from ..qtensor import QTensor
from ..spec import QuantSpec
from .base import Method, register, weight_spec
from .lkd import BlockMethod, as_factors, check_descent, starting_solver
from .rtn import RTN

__all__ = ["LocalInfo", "ZQLocal", "zq_local"]

Array = np.ndarray

BETA1, BETA2, EPS = 0.9, 0.999, 1e-20  # gradients may be as small as inputs are; EPS is for those that are 0


@dataclass(frozen=True, eq=False)
class LocalInfo:
    """What training did.

    Attributes
    ----------
    losses : mean over tokens of the layer's squared error after 0, 1, ... steps, at the first learning rate
    start_loss, loss : of the weights it began with, and of the result; ``loss`` is never more

    >>> import numpy as np
    >>> import zquant as zq
    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.standard_normal((4, 8), np.float32), rng.standard_normal((32, 8), np.float32)
    >>> info = zq.zq_local(w, x, bits=3, steps=20)[1]
    >>> info.loss <= info.start_loss
    True
    """

    losses: Array = field(repr=False)
    start_loss: float
    loss: float


def zq_local(w: Array, x: Array, bits: int = 4, group_size: int | None = None, symmetric: bool = True, *, lr: float = 0.002,
             steps: int = 100, search: tuple[float, ...] = (), start: QTensor | None = None) -> tuple[QTensor, LocalInfo]:
    """Quantize a layer's weights so that its outputs change least on some inputs, by gradient descent: ZQ-Local
    (ZeroQuant-V2, arXiv 2303.08302). It lowers the mean over tokens of |x Q(W)^T - x W_0^T|^2, straight through Q.

    Parameters
    ----------
    w : float32, shape (n, k)
        (out, in).
    x : float32, shape (tokens, k)
        What the layer reads.
    bits, group_size, symmetric
        The format, as in :func:`zquant.ops.quantize_weight`.
    lr
        Of Adam, in steps of a row's codes: the mean of its scales at the start. It falls to 0 along half a cosine.
    steps
        0 gives round to nearest, or ``start``.
    search
        Factors of ``lr`` that are tried besides 1. Every row keeps the best of all.
    start
        Codes to begin with, of the same format; their scales stay.

    Returns
    -------
    (QTensor, LocalInfo)

    Raises
    ------
    ValueError
        NaN or Inf, shapes that do not fit, unknown formats or options, a ``start`` of another shape or format.
    TypeError
        Arrays that are not float32; a ``start`` that is no QTensor.

    >>> rng = np.random.default_rng(0)
    >>> w, x = rng.standard_normal((8, 32), np.float32), rng.standard_normal((100, 32), np.float32)
    >>> tensor, info = zq_local(w, x, bits=3, lr=0.01)
    >>> tensor.shape, info.loss < info.start_loss
    ((8, 32), True)
    """
    w, x = _array(w, "w", "float32"), _array(x, "x", "float32")
    if w.ndim != 2 or x.ndim != 2 or x.shape[1:] != w.shape[1:] or not len(x):
        raise ValueError(f"x: expected shape (tokens, k) and w (n, k), got {x.shape} and {w.shape}")
    if start is not None and not isinstance(start, QTensor):
        raise TypeError(f"start: expected a QTensor, got {type(start).__name__}")
    spec = weight_spec(bits, group_size, symmetric)
    steps = check_descent(lr, steps, tuple(search))
    return _solve(w, x.T @ x / np.float32(len(x)), spec, lr, steps, tuple(search), start)


def _solve(w: Array, gram: Array, spec: QuantSpec, lr: float, steps: int, search: tuple[float, ...],
           start: QTensor | None) -> tuple[QTensor, LocalInfo]:
    if not np.isfinite(gram).all():
        raise ValueError("inputs: NaN or Inf")
    if start is not None and (start.shape != w.shape or start.spec != spec):
        raise ValueError(f"start: expected {w.shape} in {spec}, got {start.shape} in {start.spec}")
    descent = _Descent(w, gram, spec, start)
    losses = [descent.run(factor * lr, steps) for factor in dict.fromkeys((1.0, *search))]
    first = losses[0][0]
    return descent.best, LocalInfo(np.array(losses[0]), first, float(descent.least.sum()))


class _Descent:
    """Weights on their way, and the best of every row."""

    def __init__(self, w: Array, gram: Array, spec: QuantSpec, start: QTensor | None) -> None:
        self.w0, self.spec = w, spec
        self.gram = _core.linear_pack_f32(np.ascontiguousarray(gram, np.float32), None)
        self.quantize: Callable[[Array], QTensor] = self._round if start is None else _with_scales(start)
        self.first = w if start is None else inside_cells(w, start)
        self.best = self._round(w) if start is None else start
        self.unit = self.best.scales.mean(1, keepdims=True)
        self.least, _ = self._losses(self.best)

    def _round(self, w: Array) -> QTensor:
        return RTN().quantize(w, self.spec)

    def _losses(self, tensor: QTensor) -> tuple[Array, Array]:
        """Of every row, and half of the gradient."""
        error = tensor.dequantize() - self.w0
        half = _core.linear_forward(self.gram, error, 0, 0, None, 0)
        losses = np.einsum("ij,ij->i", half, error, dtype=np.float64)
        return (losses if self.spec.granularity in ("channel", "group") else losses.sum(keepdims=True)), half

    def run(self, lr: float, steps: int) -> list[float]:
        """The loss after each step."""
        w, first, second, losses = self.first.copy(), np.zeros_like(self.w0), np.zeros_like(self.w0), []
        for step in range(steps + 1):
            tensor = self.quantize(w)
            found, gradient = self._losses(tensor)
            losses.append(float(found.sum()))
            self._keep(tensor, found)
            if step < steps:
                now = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
                _adam(w, gradient, first, second, step + 1, np.float32(now) * self.unit)
        return losses

    def _keep(self, tensor: QTensor, losses: Array) -> None:
        """The rows that are better than any before; all or none where they share scales."""
        better = losses < self.least
        if better.all():
            self.best, self.least = tensor, losses
        elif better.any():
            def pick(new: Any, old: Any) -> Any:
                return None if new is None else np.where(better[:, None], new, old)

            old = self.best
            self.best = QTensor._made(pick(tensor.codes, old.codes), pick(tensor.scales, old.scales),
                                      pick(tensor.zeros, old.zeros), self.spec)
            self.least = np.where(better, losses, self.least)


def inside_cells(w: Array, tensor: QTensor) -> Array:
    """The weights nearest to w (n, k) float32 that round to the codes of ``tensor``: where its training starts. Those whose
    codes are not the nearest lie next to a border, and a small step takes them across."""
    centre = tensor.dequantize()
    size = min(tensor.spec.group_size or w.shape[1], w.shape[1])
    reach = np.float32(0.49) * np.repeat(tensor.scales, size, axis=1)[:, :w.shape[1]]
    return np.clip(w, centre - reach, centre + reach)


def _with_scales(start: QTensor) -> Callable[[Array], QTensor]:
    """Rounding to the codes that the scales of ``start`` allow."""
    spec, k = start.spec, start.shape[1]
    column = np.arange(k) // min(spec.group_size or k, k) if start.groups > 1 else np.zeros(k, np.int64)
    scales = start.scales[:, column]
    zeros = 0 if start.zeros is None else start.zeros[:, column]
    most = 2 ** (spec.bits - 1) - 1
    low, high, dtype = (-most, most, np.int8) if spec.symmetric else (0, 2 ** spec.bits - 1, np.uint8)

    def quantize(w: Array) -> QTensor:
        codes = np.clip(np.rint(w / scales) + zeros, low, high).astype(dtype)
        return QTensor._made(codes, start.scales, start.zeros, spec)

    return quantize


def _adam(w: Array, gradient: Array, first: Array, second: Array, step: int, lr: Array) -> None:
    """One step in place; it is the same for any scale of the gradient, which is overwritten."""
    first *= np.float32(BETA1)
    first += np.multiply(gradient, np.float32(1 - BETA1), out=(move := np.empty_like(w)))
    second *= np.float32(BETA2)
    np.square(gradient, out=gradient)
    second += np.multiply(gradient, np.float32(1 - BETA2), out=gradient)
    root = np.sqrt(np.divide(second, np.float32(1 - BETA2 ** step), out=gradient), out=gradient)
    root += np.float32(EPS)
    np.divide(first, root, out=move)
    w -= np.multiply(move, lr / np.float32(1 - BETA1 ** step), out=move)


@register("zq-local")
@dataclass(frozen=True)
class ZQLocal(Method):
    """Trains the weights of each layer on the Gram matrix of its inputs; see :func:`zq_local`.

    Attributes
    ----------
    lr, steps, search : as in :func:`zq_local`
    start : the solver whose codes training begins with: "rtn"; or another ("gptq"), whose scales then stay

    >>> ZQLocal(start="gptq").needs
    frozenset({'gram'})
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    lr: float = 0.002
    steps: int = 100
    search: tuple[float, ...] = ()
    start: str = "rtn"

    def __post_init__(self) -> None:
        object.__setattr__(self, "search", as_factors(self.search))
        object.__setattr__(self, "steps", check_descent(self.lr, self.steps, self.search))
        first = starting_solver(self.start)
        if isinstance(first, (BlockMethod, ZQLocal)) or not first.needs <= self.needs:
            raise ValueError(f"start: expected a solver of single layers that needs no more than gram, got {self.start!r}")

    def quantize(self, w: Array, spec: QuantSpec, stats: Mapping[str, Array] | None = None) -> QTensor:
        """Quantize w (n, k) float32 to ``spec``; ``stats["gram"]`` is (k, k)."""
        if stats is None:
            raise ValueError("zq-local needs the Gram matrix of the layer's inputs")
        gram = np.asarray(stats["gram"])
        start = None if self.start == "rtn" else starting_solver(self.start).quantize(w, spec, stats)
        return _solve(w, gram, spec, self.lr, self.steps, self.search, start)[0]
