"""LLM.int8() (Dettmers et al., 2022, arXiv 2208.07339): int8 products with the outlier columns of the input left out.

    O = {h : |x_ih| >= threshold for some row i},   Y = X_O W_O^T  (float32)  +  c_x c_w (X_int8 W_int8^T without O)

The columns in O are found in every call, over all of its rows, as in the paper: a row's result therefore depends on which
rows it is computed with. The scales c_x of the rows are those of the rows without O.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import _core
from ..extras import Outliers
from ..ops.quantize import _array, quantize_weight
from ..qtensor import QTensor
from ..spec import QuantSpec
from .base import Repair, calibrated, is_number, register

__all__ = ["LLMInt8", "llm_int8_matmul"]

Array = np.ndarray
SYMMETRIC, ASYMMETRIC = 1, 2


def llm_int8_matmul(x: Array, w: Array, threshold: float = 6.0, bias: Array | None = None, *,
                    symmetric: bool = True) -> Array:
    """x w^T + bias with int8 codes, but for the columns of x that reach the threshold: those are multiplied in float32.

        O = {h : |x_ih| >= threshold for some i},   y = x_O w_O^T + c_x c_w (x_int8 w_int8^T without O) + bias

    LLM.int8() (Dettmers et al., 2022, arXiv 2208.07339, section 3.2).

    Parameters
    ----------
    x : float32, shape (m, k)
        Activations.
    w : float32, shape (n, k)
        (out, in).
    threshold
        Of abs(x), above 0. ``inf``: every column is quantized.
    bias : float32, shape (n,)
        Or None.
    symmetric
        How the rest of each row is quantized: absmax, or with a zero point.

    Returns
    -------
    numpy.ndarray
        (m, n) float32; the same bits at every dispatch level and thread count.

    Raises
    ------
    TypeError
        Arrays of other types.
    ValueError
        Shapes that do not fit, NaN or Inf, a threshold that is not positive.

    >>> import numpy as np
    >>> import zquant as zq
    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.standard_normal((8, 64)).astype(np.float32), rng.standard_normal((16, 64)).astype(np.float32)
    >>> x[:, 5] *= 100
    >>> def error(y):
    ...     return float(np.abs(y - x @ w.T).max())
    >>> error(zq.llm_int8_matmul(x, w)) < 0.3, error(zq.llm_int8_matmul(x, w, threshold=np.inf)) > 3
    (True, True)
    """
    x, w = _array(x, "x", "float32"), _array(w, "w", "float32")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or not w.shape[1]:
        raise ValueError(f"x, w: expected shapes (m, k) and (n, k), got {x.shape} and {w.shape}")
    _check_threshold(threshold)
    codes, scales, _ = quantize_weight(w, 8)
    columns = np.flatnonzero((np.abs(x) >= threshold).any(axis=0))
    handle = _core.linear_pack_s8(codes, scales[:, 0], bias)
    _core.linear_outliers(handle, float(threshold), columns, np.ascontiguousarray(w[:, columns]))
    return _core.linear_forward(handle, x, SYMMETRIC if symmetric else ASYMMETRIC, 0, None, 0)


def _check_threshold(threshold: Any) -> None:
    if not (is_number(threshold) or threshold == math.inf) or not threshold > 0:
        raise ValueError(f"threshold: expected a number above 0, got {threshold!r}")


@register("llm.int8")
@dataclass(frozen=True)
class LLMInt8(Repair):
    """LLM.int8(): every layer decides in every call which columns of its input are outliers.

    Columns that were outliers in calibration keep float32 weights; one that appears only later is multiplied by what its
    codes stand for. ``stats["absmax"]`` is (k,). The scheme has to be 8 bits for weights, per channel, and activations.

    >>> import numpy as np
    >>> from zquant.methods import RTN
    >>> from zquant.spec import QuantSpec
    >>> w = np.float32([[0.1, 0.2, -0.7], [0.3, -0.1, 0.7]])
    >>> q = RTN().quantize(w, QuantSpec(8))
    >>> LLMInt8().repair(w, q, q.spec, {"absmax": np.float32([1, 7, 2])})
    Outliers(threshold 6, float32 weights of 1 columns)
    """

    threshold: float = 6.0
    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})
    fills: ClassVar[str] = "outliers"

    def __post_init__(self) -> None:
        _check_threshold(self.threshold)

    def repair(self, w: Array, tensor: QTensor, spec: QuantSpec, stats: Mapping[str, Array] | None = None) -> Any:
        """The outlier columns of calibration with their weights."""
        if not (spec.bits == 8 and spec.symmetric and spec.granularity in ("channel", "row_block", "tensor")):
            raise ValueError(f"LLM.int8() is for symmetric 8-bit weights with a scale per channel, not {spec}")
        stats = calibrated(self, stats)
        columns = np.flatnonzero(stats["absmax"] >= self.threshold).astype(np.int64)
        return Outliers(float(self.threshold), columns, np.ascontiguousarray(w[:, columns], np.float32))
