"""How a layer's extras are stored beside its weight.

    m.input_scale float32 (1), [m.input_zero_point int8 (1)]     a static range, as in compressed-tensors: zero less 128
    m.zquant_branch_scale float32 (k), [m.zquant_branch_shift float32 (k)]
    m.zquant_correction_u, m.zquant_correction_v                 float32 (n, r) and (r, k); or int8, with ..._u_scale (n, 1)
                                                                 and ..._v_scale (r, 1) float32
    m.zquant_outlier_threshold float32 (1), m.zquant_outlier_columns int64 (c), m.zquant_outlier_weights float32 (n, c)

Readers of compressed-tensors know the first line only and leave the others out: what they compute then is another function.
"""
from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import numpy as np

from ..extras import Branch, Extras, Factor, LowRank, Outliers, StaticRange
from ..qtensor import QTensor
from ..spec import QuantSpec

__all__ = ["PREFIX", "pack_extras", "read_extras"]

PREFIX = "zquant_"

# The tensor of that name in the file, of one of the types and of the shape (-1: any); raises what the format raises.
Read = Callable[[str, tuple[str, ...], tuple[int, ...]], np.ndarray]


def pack_extras(module: str, extras: Extras, symmetric: bool) -> dict[str, np.ndarray]:
    """The tensors that store a layer's extras; ``symmetric`` is whether its activations are.

    >>> sorted(pack_extras("fc", Extras(StaticRange(0.5, 3)), symmetric=False))
    ['fc.input_scale', 'fc.input_zero_point']
    """
    found: dict[str, Any] = {}
    if extras.static is not None:
        found["input_scale"] = np.array([extras.static.scale], np.float32)
        if not symmetric:
            found["input_zero_point"] = np.array([extras.static.zero - 128], np.int8)
    if extras.branch is not None:
        found["zquant_branch_scale"], found["zquant_branch_shift"] = extras.branch.scale, extras.branch.shift
    if extras.correction is not None:
        for name in ("u", "v"):
            factor = getattr(extras.correction, name)
            codes = isinstance(factor, QTensor)
            found[f"zquant_correction_{name}"] = factor.codes if codes else factor
            found[f"zquant_correction_{name}_scale"] = factor.scales if codes else None
    if extras.outliers is not None:
        found["zquant_outlier_threshold"] = np.array([extras.outliers.threshold], np.float32)
        found["zquant_outlier_columns"], found["zquant_outlier_weights"] = extras.outliers.columns, extras.outliers.weights
    return {f"{module}.{name}": array for name, array in found.items() if array is not None}


def read_extras(module: str, activations: QuantSpec | None, names: Container[str], read: Read) -> Extras:
    """The extras of a layer, from the tensors among ``names`` (of the whole file) that are its own.

    Raises
    ------
    ValueError
        Values that no layer can have, and whatever ``read`` raises where a tensor is missing or does not fit.
    """
    def stored(name: str) -> bool:
        return f"{module}.{PREFIX}{name}" in names

    def own(name: str, shape: tuple[int, ...], *types: str) -> np.ndarray:
        return read(PREFIX + name, types or ("F32",), shape)

    def factor(name: str) -> Factor:
        if not stored(f"correction_{name}_scale"):
            return own(f"correction_{name}", (-1, -1))
        codes = own(f"correction_{name}", (-1, -1), "I8")
        return QTensor(codes, own(f"correction_{name}_scale", (len(codes), 1)), None, QuantSpec())

    branch = correction = outliers = None
    if stored("branch_scale") or stored("branch_shift"):
        branch = Branch(own("branch_scale", (-1,)), own("branch_shift", (-1,)) if stored("branch_shift") else None)
    if stored("correction_u") or stored("correction_v"):
        correction = LowRank(factor("u"), factor("v"))
    if any(stored(f"outlier_{name}") for name in ("threshold", "columns", "weights")):
        outliers = Outliers(own("outlier_threshold", (1,)).item(), own("outlier_columns", (-1,), "I64"),
                            own("outlier_weights", (-1, -1)))
    return Extras(_read_static(module, activations, names, read), branch, correction, outliers)


def _read_static(module: str, activations: QuantSpec | None, names: Container[str], read: Read) -> StaticRange | None:
    """Other writers store the zero points of symmetric codes too: zeros."""
    if activations is None or activations.granularity != "tensor" or activations.dynamic:
        if f"{module}.input_scale" in names:
            raise ValueError("input_scale is stored, but the configuration has no static activations for the layer")
        return None
    scale = read("input_scale", ("F32", "F16", "BF16"), (1,)).astype(np.float32).item()
    zero = 128
    if not activations.symmetric or f"{module}.input_zero_point" in names:
        zero = int(read("input_zero_point", ("I8",), (1,)).item()) + 128
    return StaticRange(scale, zero)
