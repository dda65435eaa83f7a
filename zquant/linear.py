"""Linear: one linear layer of a model, float or quantized, packed for the kernels when it first runs."""
from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Union

import numpy as np

from . import _core
from .extras import Extras, LowRank, Outliers
from .formats.safetensors import Stored
from .mapped import release
from .qtensor import QTensor
from .spec import QuantSpec

__all__ = ["Linear", "Codes"]

# Token codes as operators hand them on: q uint8 (m, k), scale float32 (m,), zero int32 (m,).
Codes = tuple[np.ndarray, np.ndarray, np.ndarray]
Weight = Union[np.ndarray, QTensor]
HALVES = ("F16", "BF16")

MAX_K = 66_000  # u8 x s8 sums stay inside int32: 255 * 127 * 66,000 < 2^31
ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
QUANT = {None: 0, "symmetric": 1, "asymmetric": 2}
# How linear_forward quantizes float rows besides: to int16 codes per token, with one scale known beforehand, with one scale
# of all rows.
TOKEN_16, STATIC, TENSOR = 3, 4, {"symmetric": 5, "asymmetric": 6}


def _number(table: dict[str | None, int], what: str, key: str | None) -> int:
    if key not in table:
        raise ValueError(f"Linear: unknown {what} {key!r}; known: {list(table)}")
    return table[key]


class Linear:
    """y = act(x W^T + bias) + residual.

    Parameters
    ----------
    name
        The layer's name in the checkpoint; errors carry it.
    weight
        (n, k) float32, possibly memory-mapped, or a QTensor; or float16 or bfloat16 as :class:`Stored`, which stays as it
        is: ``weight`` is then a new float32 array each time.
    bias
        (n,) float32 or None.
    activations
        How rows of x are quantized on the way in: 8 bits, per token, or per tensor with a scale that is taken from all
        rows of a call (dynamic; a row's result then depends on the others) or known beforehand (``extras.static``). None
        leaves them as they are: float weights multiply in float32, integer weights with int16 codes of x (see the notes).
        Float weights multiply what the codes stand for, in float32: it shows what quantized activations alone do.
    extras
        What the layer does beside the product; see :class:`zquant.extras.Extras`.

    Raises
    ------
    ValueError
        Shapes or formats that cannot run, naming the layer.

    Notes
    -----
    The product of integer weights is integer arithmetic: weights symmetric, k at most 66,000, one scale per row, or
    groups whose size is a multiple of 8 (or at least k). Without ``activations`` (w4a16, w8a16) each row of x becomes
    int16 codes with scale max|x| / 32767: an error of about 1e-5 of the outputs, and the weights stay as small as they are
    stored. Weights that do not fit (asymmetric ones, other group sizes) are dequantized to
    float32 when packed, if ``activations`` is None. Other tools write 8-bit codes of -128, which the integer kernels do
    not take either: such a layer multiplies the same values in float32. Packing happens once, at the first call, under
    a lock; the packed form is not pickled.

    >>> layer = Linear("fc", np.ones((2, 3), np.float32))
    >>> layer
    Linear('fc', 2x3, float32)
    """

    def __init__(self, name: str, weight: Weight | Stored, bias: np.ndarray | None = None,
                 activations: QuantSpec | None = None, *, extras: Extras | None = None) -> None:
        self.name = name
        self._weight = weight
        self.bias = bias
        self.activations = activations
        self.extras = Extras() if extras is None else extras
        self._handle: Any = None
        self._integer = False  # known once packed
        self._quant_in = 0  # what linear_forward does with float rows; known once packed
        self._lock = threading.Lock()
        self._check()

    def _check(self) -> None:
        weight = self._weight
        if len(weight.shape) != 2:
            raise ValueError(f"{self.name}: weight must be 2-D, got shape {weight.shape}")
        if not isinstance(weight, QTensor) and weight.dtype not in (HALVES if isinstance(weight, Stored) else (np.float32,)):
            raise ValueError(f"{self.name}: weight must be float32 or a QTensor, got {weight.dtype}")
        if self.bias is not None and self.bias.shape != (self.out_features,):
            raise ValueError(f"{self.name}: bias must have shape ({self.out_features},), got {self.bias.shape}")
        try:
            self.extras.check(*self.shape)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        if self.activations is not None:
            self._check_activations(weight, self.activations)
        if self.extras.outliers is not None:
            self._check_outliers()
        if self.extras.static is not None and not self._static:
            raise ValueError(f"{self.name}: a static range needs activations per tensor that are not dynamic")

    @property
    def _static(self) -> bool:
        act = self.activations
        return act is not None and act.granularity == "tensor" and not act.dynamic

    def _check_activations(self, weight: Weight | Stored, act: QuantSpec) -> None:
        if act.granularity not in ("token", "tensor") or act.bits != 8:
            raise ValueError(f"{self.name}: activations must be 8 bits per token or per tensor, not {act}")
        if self._static and self.extras.static is None:
            raise ValueError(f"{self.name}: static activations need their range: extras.static")
        if self._static and act.symmetric and self.extras.static.zero != 128:  # type: ignore[union-attr]
            raise ValueError(f"{self.name}: symmetric activations have zero point 128, not "
                             f"{self.extras.static.zero}")  # type: ignore[union-attr]
        reason = self._why_float(weight) if isinstance(weight, QTensor) else None
        if reason:
            raise ValueError(f"{self.name}: {reason}")

    def _check_outliers(self) -> None:
        weight, act = self._weight, self.activations
        rows = isinstance(weight, QTensor) and weight.spec.bits == 8 and weight.spec.granularity != "group"
        if not rows or act is None or act.granularity != "token":
            raise ValueError(f"{self.name}: outliers need 8-bit weights with a scale per channel and activations per token")
        if self.extras.correction is not None:
            raise ValueError(f"{self.name}: outliers and a correction exclude each other")

    def _why_float(self, weight: QTensor) -> str | None:
        """Why the integer kernels cannot take weights of this format, or None where they can."""
        spec = weight.spec
        if not spec.symmetric:
            return "asymmetric weights run in float32 only: they need activations=None"
        if self.in_features > MAX_K:
            return f"{self.in_features} input features; int32 sums are exact up to {MAX_K}"
        if spec.group_size and spec.group_size % 8 and spec.group_size < self.in_features:
            return (f"group size {spec.group_size} is neither a multiple of 8 nor at least the {self.in_features} input "
                    "features")
        return None

    @property
    def weight(self) -> Weight:
        """(n, k) float32, or the QTensor."""
        return self._weight.float32() if isinstance(self._weight, Stored) else self._weight

    @property
    def out_features(self) -> int:
        return self._weight.shape[0]

    @property
    def in_features(self) -> int:
        return self._weight.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self._weight.shape[0], self._weight.shape[1]

    @property
    def spec(self) -> QuantSpec | None:
        """Format of the weights; None is float32."""
        return self._weight.spec if isinstance(self._weight, QTensor) else None

    @property
    def quant(self) -> str | None:
        """Which token codes the layer takes in place of float32 rows: "symmetric", "asymmetric" or None (rows only)."""
        if self.activations is None or self.activations.granularity != "token" or not self.extras.take_codes:
            return None
        return _symmetry(self.activations)

    @property
    def nbytes(self) -> int:
        """Stored bytes of weight (codes packed), bias and extras."""
        return self._weight.nbytes + (0 if self.bias is None else self.bias.nbytes) + self.extras.nbytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of the form that runs; packs if that has not happened yet."""
        return _core.linear_bytes(self._packed())

    def dense(self) -> np.ndarray:
        """The weight as (n, k) float32: itself, or dequantized."""
        weight = self.weight
        return weight.dequantize() if isinstance(weight, QTensor) else weight

    def with_weight(self, weight: Weight, activations: QuantSpec | None = None, *, extras: Extras | None = None) -> Linear:
        """The same layer with another weight of the same shape; ``extras`` None keeps the branch and drops the rest, which
        belongs to a weight."""
        if tuple(weight.shape) != self.shape:
            raise ValueError(f"{self.name}: weight must have shape {self.shape}, got {tuple(weight.shape)}")
        extras = Extras(branch=self.extras.branch) if extras is None else extras
        return Linear(self.name, weight, self.bias, activations, extras=extras)

    def release(self) -> None:
        """Give the mapped pages of float weights back; they come again when read."""
        if not isinstance(self._weight, QTensor):
            release(self._weight.array if isinstance(self._weight, Stored) else self._weight)

    def take(self, rows: np.ndarray) -> Linear:
        """The layer with these of its outputs, in this order.

        >>> Linear("fc", np.float32([[1], [2], [3]])).take(np.array([2, 0])).weight.tolist()
        [[3.0], [1.0]]
        """
        weight, bias = self.weight, None if self.bias is None else self.bias[rows]
        if not isinstance(weight, QTensor):
            return Linear(self.name, weight[rows], bias, self.activations, extras=self.extras.take(rows))
        zeros = None if weight.zeros is None else weight.zeros[rows]
        return Linear(self.name, QTensor(weight.codes[rows], weight.scales[rows], zeros, _alike(weight.spec)), bias,
                      self.activations, extras=self.extras.take(rows))

    def _pack(self) -> Any:
        weight: Any = self.weight
        self._integer = (isinstance(weight, QTensor) and self._why_float(weight) is None
                         and not (weight.spec.bits == 8 and (weight.codes == -128).any()))
        self._quant_in = self._mode() if self._integer else 0
        handle = self._pack_weight(weight)
        self._pack_extras(handle)
        return handle

    def _mode(self) -> int:
        """What linear_forward does with float rows before integer weights."""
        act = self.activations
        if act is None:
            return TOKEN_16
        if act.granularity == "token":
            return QUANT[_symmetry(act)]
        return TENSOR[_symmetry(act)] if act.dynamic else STATIC

    def _pack_weight(self, weight: Any) -> Any:
        if not self._integer:
            handle = _core.linear_pack_f32(self.dense(), self.bias)
            self.release()
            return handle
        if weight.spec.granularity == "group":
            bits = 4 if weight.spec.bits <= 4 else 8
            group = min(weight.spec.group_size, self.in_features)
            return _core.linear_pack_group(weight.codes, weight.scales, group, bits, self.bias)
        return _core.linear_pack_s8(weight.codes, weight.scales[:, 0], self.bias)

    def _pack_extras(self, handle: Any) -> None:
        static, branch, correction, outliers = (value for _, value in self.extras.given(every=True))
        scale, zero = (None, 0) if static is None else (static.scale, static.zero)
        factor, shift = (None, None) if branch is None else (branch.reciprocal, branch.shift)
        if self._integer or self.activations is None:
            _core.linear_input(handle, scale, zero, factor, shift)
        if correction is not None:
            _core.linear_correct(handle, *correction.factors())
        if outliers is not None:
            _core.linear_outliers(handle, outliers.threshold, outliers.columns, outliers.weights)

    def _packed(self) -> Any:
        if self._handle is None:
            with self._lock:
                if self._handle is None:
                    try:
                        self._handle = self._pack()
                    except ValueError as error:
                        raise ValueError(f"{self.name}: {error}") from None
        return self._handle

    def __call__(self, x: np.ndarray | Codes, activation: str | None = None, residual: np.ndarray | None = None,
                 quantize: str | None = None) -> np.ndarray | Codes:
        """Run the layer.

        Parameters
        ----------
        x
            (m, k) float32, or token codes (q, scale, zero) from another operator.
        activation
            None, "relu", "gelu" (erf), "gelu_tanh" or "silu".
        residual
            (m, n) float32 added after the activation, or None.
        quantize
            None returns float32; "symmetric" or "asymmetric" returns token codes of the result.

        Returns
        -------
        numpy.ndarray or tuple
            (m, n) float32, or token codes.

        Raises
        ------
        ValueError
            Shapes that do not fit; NaN or Inf in x.
        """
        handle = self._packed()
        if isinstance(x, tuple):
            if self.extras.branch is not None:
                raise TypeError(f"{self.name}: a layer with a branch takes float32 rows, not codes")
            x = x if self._integer else _core.dequantize_rows(*x)
        elif not self._integer and self.activations is not None:
            x = self._rounded(x)
        return _core.linear_forward(handle, x, self._quant_in, _number(ACTIVATIONS, "activation", activation), residual,
                                    _number(QUANT, "quantize", quantize))

    def _rounded(self, x: np.ndarray) -> np.ndarray:
        """The values that the layer's codes of x stand for, behind the branch: what weights that the integer kernels do not
        take are multiplied with."""
        act: Any = self.activations
        x = x if self.extras.branch is None else self.extras.branch(x)
        if act.granularity == "token":
            return _core.dequantize_rows(*_core.quantize_tokens(x, QUANT[_symmetry(act)], False))
        if act.dynamic:  # the range of all rows as one row of two
            lo, hi = _core.minmax_rows(x)
            ends = np.array([[lo.min(initial=0), hi.max(initial=0)]], np.float32)
            _, scale, zero = _core.quantize_tokens(ends, QUANT[_symmetry(act)], False)
        else:
            static: Any = self.extras.static
            scale, zero = np.array([static.scale], np.float32), np.array([static.zero], np.int32)
        return _core.dequantize_static(_core.quantize_static(x, scale, zero, 0, 255, False), scale, zero)

    @staticmethod
    def fuse(layers: Sequence[Linear]) -> Linear:
        """One layer that computes what several layers of one input do, outputs side by side.

        All float, or all quantized alike (bits, groups and activations), with the same branch, static range and outlier
        columns, and all or none with a correction; else a ValueError.

        >>> a, b = (Linear(n, np.ones((2, 3), np.float32)) for n in "ab")
        >>> Linear.fuse([a, b])
        Linear('a+b', 4x3, float32)
        """
        name, first = "+".join(layer.name for layer in layers), layers[0]
        alike = {(layer.in_features, layer.activations, layer.spec and _alike(layer.spec)) for layer in layers}
        if len(alike) != 1:
            raise ValueError(f"{name}: layers differ in inputs or format and cannot be fused")
        extras = _fuse_extras(name, [layer.extras for layer in layers])
        bias = None
        if any(layer.bias is not None for layer in layers):
            bias = np.concatenate([np.zeros(layer.out_features, np.float32) if layer.bias is None else layer.bias
                                   for layer in layers])
        if first.spec is None:
            return Linear(name, np.concatenate([layer.weight for layer in layers]), bias, first.activations, extras=extras)
        parts: list[QTensor] = [layer.weight for layer in layers]  # type: ignore[misc]
        zeros = None if parts[0].zeros is None else np.concatenate([p.zeros for p in parts])
        fused = QTensor(np.concatenate([p.codes for p in parts]), np.concatenate([p.scales for p in parts]), zeros,
                        _alike(parts[0].spec))
        return Linear(name, fused, bias, first.activations, extras=extras)

    def __repr__(self) -> str:
        kind = "float32" if self.spec is None else str(self.spec)
        inputs = "" if self.activations is None else f", {_symmetry(self.activations)} input"
        if self.activations is not None and self.activations.granularity == "tensor":
            inputs += f" per tensor, {'dynamic' if self.activations.dynamic else 'static'}"
        inputs += "".join(f", {name}" for name, _ in self.extras.given() if name != "static")
        return f"Linear({self.name!r}, {self.out_features}x{self.in_features}, {kind}{inputs})"

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "weight": self._weight, "bias": self.bias, "activations": self.activations,
                "extras": self.extras}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _symmetry(spec: QuantSpec) -> str:
    return "symmetric" if spec.symmetric else "asymmetric"


def _fuse_extras(name: str, parts: Sequence[Extras]) -> Extras:
    first = parts[0]
    outliers = [part.outliers for part in parts if part.outliers is not None]
    corrections = [part.correction for part in parts if part.correction is not None]
    if (any((part.static, part.branch) != (first.static, first.branch) for part in parts)
            or any(0 < len(some) < len(parts) for some in (outliers, corrections))):
        raise ValueError(f"{name}: layers differ in their extras and cannot be fused")
    try:
        return Extras(first.static, first.branch, LowRank.stack(corrections) if corrections else None,
                      Outliers.stack(outliers) if outliers else None)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _alike(spec: QuantSpec) -> QuantSpec:
    """The format as the kernels see it: every grouping by whole rows is one scale per row."""
    if spec.granularity not in ("row_block", "tensor"):
        return spec
    return QuantSpec(spec.bits)
