"""Round to nearest.

    s = max|w| / qmax,   q = clamp(rint(w / s), -qmax, qmax),   qmax = 2^(b-1) - 1         symmetric
    s = (hi - lo) / (2^b - 1),   z = rint(-lo / s),   q = clamp(rint(w / s) + z, 0, 2^b - 1)   asymmetric

over each row, each group of inputs, or each block of rows: what ZeroQuant (Yao et al., 2022, section 4.1) does to weights.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..ops.quantize import quantize_weight, quantize_weight_blocks
from ..qtensor import QTensor
from ..spec import QuantSpec
from .base import Method, register

__all__ = ["RTN"]


@register
@dataclass(frozen=True)
class RTN(Method):
    """Round to nearest; needs no data.

    >>> import numpy as np
    >>> from zquant.spec import QuantSpec
    >>> RTN().quantize(np.array([[0.1, -0.7, 0.26]], np.float32), QuantSpec(4)).codes.tolist()
    [[1, -7, 3]]
    """

    by_rows: ClassVar[bool] = True

    def quantize(self, w: np.ndarray, spec: QuantSpec, stats: Mapping[str, np.ndarray] | None = None) -> QTensor:
        """Quantize w (n, k) float32 to ``spec``.

        Raises
        ------
        ValueError
            NaN or Inf in w (the row is named); rows that ``spec.blocks`` does not divide.
        """
        if spec.granularity in ("row_block", "tensor"):
            codes, scales = quantize_weight_blocks(w, spec.blocks or 1, bits=spec.bits)
            zeros = None
        else:
            codes, scales, zeros = quantize_weight(w, bits=spec.bits, group_size=spec.group_size, symmetric=spec.symmetric)
        return QTensor._made(codes, scales, zeros, spec)
