"""QTensor: a quantized weight matrix."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _core
from .spec import TOKEN_ASYMMETRIC, QuantSpec

__all__ = ["QTensor"]


def _frozen(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _check_range(name: str, array: np.ndarray, low: int, high: int, bits: int) -> None:
    if array.size and not (low <= (least := int(array.min())) and (most := int(array.max())) <= high):
        raise ValueError(f"QTensor: {name} of {bits} bits must be {low} to {high}, got {least if least < low else most}")


@dataclass(frozen=True, repr=False, eq=False)
class QTensor:
    """Integer codes, their scales, and the format that they are in: w_hat = (codes - zeros) * scales.

    Parameters
    ----------
    codes
        (n, k): int8 when ``spec.symmetric``, else uint8. One row per output channel. Memory-mapped arrays stay mapped.
    scales
        (n, g) float32: g = ceil(k / group_size) for groups along the input, else 1 (tensors without inputs: 0).
    zeros
        (n, g) int32 zero points; None when symmetric.
    spec
        The format.

    Raises
    ------
    TypeError
        Something else than NumPy arrays and a QuantSpec.
    ValueError
        Arrays whose dtype, shape or values do not fit the format: codes or zero points beyond ``spec.bits`` bits, scales that
        are not finite and positive.

    >>> q = QTensor(np.array([[1, -7], [2, 0]], np.int8), np.array([[0.5], [0.25]], np.float32), None, QuantSpec(4))
    >>> q
    QTensor(2x2, int4, per channel, 10 B, was 16)
    >>> q.dequantize().tolist()
    [[0.5, -3.5], [0.5, 0.0]]
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    spec: QuantSpec

    def __post_init__(self) -> None:
        self._check_types()
        codes, spec = self.codes, self.spec
        want = np.dtype(np.int8 if spec.symmetric else np.uint8)
        if codes.ndim != 2 or codes.dtype != want:
            raise ValueError(f"QTensor: codes must be ({want}, 2-D), got {codes.dtype} of shape {codes.shape}")
        if (self.zeros is None) != spec.symmetric:
            raise ValueError("QTensor: zero points come with asymmetric codes, and only with them")
        groups = (codes.shape[0], self.groups)
        for name, dtype in (("scales", np.float32), ("zeros", np.int32)):
            array = getattr(self, name)
            if array is None:
                continue
            if array.dtype != dtype or array.shape != groups:
                raise ValueError(f"QTensor: {name} must be {np.dtype(dtype)} of shape {groups}, "
                                 f"got {array.dtype} of shape {array.shape}")
        self._check_values()
        self._freeze()

    def _check_types(self) -> None:
        if not isinstance(self.spec, QuantSpec):
            raise TypeError(f"QTensor: spec must be a QuantSpec, got {self.spec!r}")
        for name in ("codes", "scales", "zeros"):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) and (name != "zeros" or array is not None):
                raise TypeError(f"QTensor: {name} must be a NumPy array, got {type(array).__name__}")

    def _check_values(self) -> None:
        """Codes of 8 bits are not read: every byte is one, and mapped ones are to stay on disk."""
        levels, bits = 1 << self.spec.bits, self.spec.bits
        least = -(levels >> 1) if self.spec.symmetric else 0
        if bits < 8:
            _check_range("codes", self.codes, least, least + levels - 1, bits)
        if self.zeros is not None:
            _check_range("zeros", self.zeros, 0, levels - 1, bits)
        fine = np.isfinite(self.scales) & (self.scales > 0)
        if not fine.all():
            row = int(np.argmin(fine.all(axis=1)))
            raise ValueError(f"QTensor: scales must be finite and positive, got {self.scales[row][~fine[row]][0]} in row {row}")

    def _freeze(self) -> None:
        for name in ("codes", "scales", "zeros"):
            if (array := getattr(self, name)) is not None:
                object.__setattr__(self, name, _frozen(array))

    @classmethod
    def _made(cls, codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, spec: QuantSpec) -> QTensor:
        """Of arrays that a quantizer has made, which would take a tenth of its time to check again."""
        tensor = object.__new__(cls)
        tensor.__dict__.update(codes=codes, scales=scales, zeros=zeros, spec=spec)
        tensor._freeze()
        return tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k): output channels, input features."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def groups(self) -> int:
        """Scales per row."""
        if self.spec.granularity in ("tensor", "row_block"):
            return 1
        k = self.codes.shape[1]
        return math.ceil(k / (self.spec.group_size or max(k, 1)))

    @property
    def nbytes(self) -> int:
        """Bytes when stored: codes packed to ``spec.bits`` bits by rows, distinct scales (float32), zero points (uint8)."""
        n, k = self.shape
        count = {"tensor": 1, "row_block": self.spec.blocks or 1}.get(self.spec.granularity, n * self.groups)
        return n * math.ceil(k * self.spec.bits / 8) + 4 * count + (0 if self.zeros is None else count)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        return 8 * self.nbytes / max(1, self.codes.size)

    def dequantize(self) -> np.ndarray:
        """The (n, k) float32 matrix (codes - zeros) * scales, one float32 rounding per element."""
        from .ops.quantize import dequantize_weight

        return dequantize_weight(self.codes, self.scales, self.zeros, group_size=self.spec.group_size)

    def rows(self, index: np.ndarray) -> np.ndarray:
        """Some rows, dequantized: index.shape + (k,) float32. What an embedding look-up needs.

        >>> q = QTensor(np.array([[1, 2], [3, 4]], np.int8), np.array([[1], [2]], np.float32), None, QuantSpec(8))
        >>> q.rows(np.array([1, 1, 0])).tolist()
        [[6.0, 8.0], [6.0, 8.0], [1.0, 2.0]]
        """
        codes, scales = self.row_parts()
        codes, scales = codes.take(index.ravel(), axis=0), scales.take(index.ravel())
        return _core.dequantize_rows(codes, scales, None).reshape(*index.shape, -1)

    def row_parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes (n, k) and scales, one for each row. ValueError where rows have more than that."""
        if self.groups != 1 or self.zeros is not None:
            raise ValueError(f"QTensor.rows needs one symmetric scale per row, not {self.spec}")
        return self.codes, self.scales

    def matmul(self, x: np.ndarray, bias: np.ndarray | None = None, activation: str | None = None,
               activations: QuantSpec | None = TOKEN_ASYMMETRIC) -> np.ndarray:
        """act(x w_hat^T + bias) with integer arithmetic: rows of x are quantized on the way in.

        Parameters
        ----------
        x
            (..., k) float32.
        bias
            (n,) float32 or None.
        activation
            None, "relu", "gelu", "gelu_tanh" or "silu".
        activations
            Format of the rows of x: uint8 per token with a zero point by default; ``QuantSpec(8, granularity="token",
            dynamic=True)`` is symmetric int8; None keeps x at int16 precision (symmetric weights) or multiplies float32 x
            with the dequantized weights (asymmetric ones, and groups that the integer kernels do not take).

        Returns
        -------
        numpy.ndarray
            (..., n) float32.
        """
        from .linear import Linear

        cached = self.__dict__.get("_linear")
        if cached is None or cached.activations != activations or bias is not None:
            cached = Linear("QTensor", self, bias, activations)
            if bias is None:
                self.__dict__["_linear"] = cached  # packed weights, kept for the next call
        x = np.asarray(x)
        if x.ndim == 0 or x.shape[-1] != self.shape[1]:
            raise ValueError(f"QTensor.matmul: x must have {self.shape[1]} columns, got shape {x.shape}")
        y: Any = cached(x.reshape(-1, self.shape[1]), activation=activation)
        return y.reshape(*x.shape[:-1], self.shape[0])

    def __repr__(self) -> str:
        unit, name = (1 << 20, "MiB") if self.codes.size >= 1 << 18 else (1, "B")
        size = (lambda b: f"{b / unit:.2f}") if unit > 1 else str
        return (f"QTensor({self.shape[0]}x{self.shape[1]}, {self.spec}, {size(self.nbytes)} {name}, "
                f"was {size(4 * self.codes.size)})")

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("codes", "scales", "zeros", "spec")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()
