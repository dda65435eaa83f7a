"""Outlier Suppression+ (Wei et al., 2023, arXiv 2304.09145).

    x' = (x - z) / s,     z_j = (max x_j + min x_j) / 2,     s_j = max(1, max|x_j - z_j| / t)

z centres each channel, s brings those that reach beyond t down to t, and t is what loses least of the layer's outputs when
both sides are rounded. The norm in front takes both over, gain / s and (bias - z) / s; the layers behind become

    b' = b + W z     with the weights as they were, then     W' = W diag(s).

An RMSNorm has no bias to shift: z is 0 then. Differs from the authors' code in three points: the loss is that of the linear
layers, also for query, key and value (theirs compares what attention makes of them); calibration sees the float model, not
quantized predecessors; and t is tried in equal ratios, not in equal differences, which needs fewer and is finer near 1.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..checks import as_count
from ..models.foldings import fold
from ..spec import TOKEN_ASYMMETRIC, QuantSpec, Scheme
from ..statistics import Statistics
from .base import Transform, calibrated, register, set_flags
from .folded import Loss, checked_stages, consumers, output_error, targets

__all__ = ["OutlierSuppression", "outlier_suppression", "thresholds"]


def thresholds(largest: float, steps: int = 40) -> np.ndarray:
    """What the search tries: from ``largest``, which changes nothing, down to 1 in ``steps`` equal ratios.

    >>> thresholds(8.0, steps=3).round(6).tolist(), thresholds(0.7).tolist()
    ([8.0, 4.0, 2.0, 1.0], [])
    """
    return np.geomspace(largest, 1, steps + 1) if largest >= 1 else np.empty(0)


def _scale(half: np.ndarray, threshold: float) -> np.ndarray:
    """Channels of half-range ``half`` reach no further than the threshold; none is made larger."""
    return np.maximum(1.0, half / threshold)


def _search(half: np.ndarray, loss: Loss, steps: int) -> np.ndarray:
    best, chosen = np.inf, np.ones(len(half))
    for t in thresholds(float(half.max(initial=0)), steps).tolist():
        scale = _scale(half, t)
        error = loss(scale, t)
        if error < best:
            best, chosen = error, scale
    return chosen


def outlier_suppression(minmax: Any, threshold: float | None = None, *, samples: np.ndarray | None = None,
                        weights: np.ndarray | Sequence[np.ndarray] | None = None, spec: QuantSpec = QuantSpec(),
                        activations: QuantSpec | None = TOKEN_ASYMMETRIC, shift: bool = True,
                        steps: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """The shift and the scale of a layer's input channels.

        x' = (x - z) / s,   z_j = (max x_j + min x_j) / 2,   s_j = max(1, max|x_j - z_j| / t)

    Outlier Suppression+ (Wei et al., 2023, arXiv 2304.09145).

    Parameters
    ----------
    minmax : shape (2, k)
        Least and greatest value of each channel over the calibration data.
    threshold
        t; None searches the one with the least error, which needs samples and weights.
    samples : float32, shape (m, k)
        Rows of the input.
    weights : float32, shape (n, k), or a list of such
        (out, in), of all layers that read it.
    spec, activations
        Formats of the weights and of the inputs: int8 per channel, and uint8 per token, by default.
    shift
        False leaves z at 0.
    steps
        How finely the search goes, see :func:`thresholds`.

    Returns
    -------
    shift, scale : numpy.ndarray
        (k,) float64 each; scale is at least 1.

    Raises
    ------
    ValueError
        A threshold that is not positive; shapes that do not fit; NaN or Inf; steps below 1; neither threshold nor
        samples and weights.

    >>> outlier_suppression([[-1.0, 2.0, -9.0], [3.0, 4.0, 9.0]], 3.0)
    (array([1., 3., 0.]), array([1., 1., 3.]))
    """
    ends = np.asarray(minmax, np.float64)
    if ends.ndim != 2 or len(ends) != 2 or not np.isfinite(ends).all() or (ends[0] > ends[1]).any():
        raise ValueError("minmax: expected finite values of shape (2, k), none of the first above the second")
    z = (ends[0] + ends[1]) / 2 if shift else np.zeros(ends.shape[1])
    half = np.abs(ends - z).max(axis=0)
    if threshold is not None:
        if not 0 < threshold < np.inf:
            raise ValueError(f"threshold: expected a positive number, got {threshold!r}")
        return z, _scale(half, threshold)
    if samples is None or weights is None:
        raise ValueError("outlier_suppression: give a threshold, or samples and weights to search it with")
    if np.shape(samples)[1:] != half.shape:
        raise ValueError(f"samples: expected shape (m, {len(half)}) as minmax has, got {np.shape(samples)}")
    loss = output_error(samples, weights, spec, activations, z if shift else None)
    return z, _search(half, loss, as_count("steps", steps, 1))


@register("outlier_suppression")
@dataclass(frozen=True)
class OutlierSuppression(Transform):
    """Outlier Suppression+.

    Parameters
    ----------
    shift
        Centre the channels, where there are biases to do it with.
    branch
        Where the residual connection reads the same rows (BERT's post-norm blocks), shift and divide them in front of the
        layers at run time, as wherever nothing absorbs them; False leaves such inputs as they are.
    stages
        Which inputs: those of query, key and value ("qkv"), of the feed-forward layer's first matrices ("mlp") and of its
        last ("down"), and what reads the values ("attention"). None: "qkv" and "mlp", and behind a gate "down" too, as the
        paper has it for Llama.
    steps
        How finely the thresholds are searched, see :func:`thresholds`.

    >>> OutlierSuppression(shift=False)
    OutlierSuppression(shift=False, branch=True, stages=None, steps=40)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"minmax", "samples"})
    shift: bool = True
    branch: bool = True
    stages: tuple[str, ...] | None = None
    steps: int = 40

    def __post_init__(self) -> None:
        if self.stages is not None:
            object.__setattr__(self, "stages", checked_stages("OutlierSuppression", self.stages))
        set_flags(self, "shift", "branch")
        object.__setattr__(self, "steps", as_count("OutlierSuppression: steps", self.steps, 1))

    def transform(self, model: Any, statistics: Statistics | None, scheme: Scheme) -> tuple[Any, Scheme]:
        """See :meth:`Transform.transform`; the scheme stays as it is."""
        statistics = calibrated(self, statistics)
        gated = getattr(model.dims, "gated", False)
        stages = ("qkv", "mlp", "down")[:3 if gated else 2] if self.stages is None else self.stages
        for folding in targets(model, scheme, stages, self.branch):
            stats, shift = statistics[folding.consumers[0]], self.shift and folding.shift and folding.heads == 1
            weights, spec, activations = consumers(model, scheme, folding)
            z, scale = outlier_suppression(stats["minmax"], samples=stats["samples"], weights=weights, spec=spec,
                                           activations=activations, shift=shift, steps=self.steps)
            model = fold(model, folding, folding.tied(scale), z if shift else None, branch=self.branch)
        return model, scheme
