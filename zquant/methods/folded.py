"""What the transforms by folding share: which layers they are about, and the error of layers whose both sides are rounded."""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..models.foldings import STAGES, Folding, foldings
from ..ops.quantize import (
    dequantize_linear,
    dequantize_per_token,
    dynamic_quantize_linear,
    quantize_linear,
    quantize_per_token,
)
from ..spec import QuantSpec, Scheme
from .rtn import RTN

__all__ = ["Loss", "checked_stages", "consumers", "matrices", "output_error", "rounded_inputs", "targets"]

#: Error of a layer's outputs: of a scale (k,), and the largest magnitude in the scaled input.
Loss = Callable[[np.ndarray, float], float]


def checked_stages(what: str, stages: Any) -> tuple[str, ...]:
    """Names of stages inside a block, as a tuple; ValueError where they are something else."""
    known = STAGES[:-1]
    found = tuple(stages) if isinstance(stages, Iterable) and not isinstance(stages, str) else (stages,)
    if isinstance(stages, str) or not all(stage in known for stage in found):
        raise ValueError(f"{what}: stages must be some of {', '.join(known)}; got {stages!r}")
    return found


def targets(model: Any, scheme: Scheme, stages: Collection[str], branch: bool) -> Iterator[Folding]:
    """The model's foldings of these stages with a layer that will be quantized; inexact ones if ``branch``."""
    for folding in foldings(model):
        quantized = any(scheme.weights_for(name) is not None for name in folding.consumers)
        if folding.stage in stages and quantized and (branch or folding.exact):
            yield folding


def consumers(model: Any, scheme: Scheme, folding: Folding) -> tuple[list[np.ndarray], QuantSpec, QuantSpec | None]:
    """Weights of a folding's layers that will be quantized, and their formats of weights and activations: those of the
    first, where overrides make them differ."""
    names = [name for name in folding.consumers if scheme.weights_for(name) is not None]
    spec = scheme.weights_for(names[0])
    assert spec is not None
    return [model.linears[name].weight for name in names], spec, scheme.activations_for(names[0])


def matrices(weights: np.ndarray | Sequence[np.ndarray]) -> list[np.ndarray]:
    """One matrix, or several, as a list."""
    return [weights] if isinstance(weights, np.ndarray) else list(weights)


def rounded_inputs(x: np.ndarray, activations: QuantSpec | None, limit: float) -> np.ndarray:
    """x (m, k) float32 after rounding as ``activations`` says; None returns it as it is.

    One scale for all of x, where it is symmetric, is for values up to ``limit``: a range known from more data than x.
    """
    if activations is None:
        return x
    if activations.granularity == "token":
        return dequantize_per_token(*quantize_per_token(x, activations.symmetric))
    if not activations.symmetric:
        return dequantize_linear(*dynamic_quantize_linear(x))
    limit = float(limit)
    scale = np.float32(limit / activations.qmax) or np.float32(1)
    return dequantize_linear(quantize_linear(np.clip(x, -limit, limit), scale), scale)


def output_error(x: np.ndarray, weights: np.ndarray | Sequence[np.ndarray], spec: QuantSpec, activations: QuantSpec | None,
                 shift: np.ndarray | None = None) -> Loss:
    """How far layers are from float on rows x (m, k), once they read (x - z) / s and inputs and weights are rounded:

        mean over rows of  sum over layers of  |Q((x - z) / s) Q(W diag(s))^T - (x - z) W^T|^2

    z is ``shift`` (k,), or 0; s is what the loss is a function of. The bias b + W z cancels. Weights round to nearest.
    ValueError where shapes do not fit, or x is not finite.
    """
    x, parts = np.ascontiguousarray(x, np.float32), [np.asarray(w, np.float32) for w in matrices(weights)]
    if x.ndim != 2 or not parts or any(w.ndim != 2 or w.shape[1] != x.shape[1] for w in parts):
        raise ValueError("samples, weights: expected shapes (m, k) and (n, k) with the same k, got "
                         f"{x.shape} and {[w.shape for w in parts]}")
    if not np.isfinite(x).all():
        raise ValueError("samples: NaN or Inf")
    stacked, method = np.concatenate(parts), RTN()
    moved = x if shift is None else (x - shift).astype(np.float32)
    wanted = moved @ stacked.T

    def loss(scale: np.ndarray, limit: float) -> float:
        inputs = rounded_inputs((moved / scale).astype(np.float32), activations, limit)
        rounded = method.quantize((stacked * scale).astype(np.float32), spec).dequantize()
        return float(np.square(inputs @ rounded.T - wanted, dtype=np.float64).sum() / max(1, len(x)))

    return loss
