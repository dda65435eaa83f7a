"""SmoothQuant (Xiao et al., 2022, arXiv 2211.10438).

    x W^T = (x / s) (W diag(s))^T,     s_j = max|x_j|^alpha / max|W_:j|^(1 - alpha)

over the calibration's tokens, and over all layers that read x. Channels of activations that are far larger than the others
spoil the scale they share with them; s moves their size into the weights, which have scales of their own. The norm before
the layers takes 1 / s over, so that nothing is computed at run time.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..models.foldings import fold
from ..spec import QuantSpec, Scheme
from ..statistics import Statistics
from .base import Transform, calibrated, is_number, register, set_flags
from .folded import checked_stages, consumers, matrices, output_error, targets

__all__ = ["ALPHAS", "LEAST", "SmoothQuant", "search_alpha", "smoothquant_scales"]

#: What the search tries.
ALPHAS = tuple(i / 20 for i in range(21))
#: Scales are at least this, as in the authors' code.
LEAST = 1e-5


def _column_maxima(weights: np.ndarray | Sequence[np.ndarray], k: int) -> np.ndarray:
    parts = matrices(weights)
    if not parts:
        raise ValueError("weights: expected a matrix or a list of matrices, got none")
    for w in parts:
        if np.ndim(w) != 2 or np.shape(w)[1] != k:
            raise ValueError(f"weights: expected (n, {k}) as absmax has {k} channels, got shape {np.shape(w)}")
    return np.max([np.abs(w).max(axis=0, initial=0) for w in parts], axis=0).astype(np.float64)


def _channels(absmax: Any) -> np.ndarray:
    values = np.asarray(absmax, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("absmax: expected finite magnitudes of shape (k,), none below 0")
    return values


def smoothquant_scales(absmax: Any, weights: np.ndarray | Sequence[np.ndarray], alpha: float = 0.5) -> np.ndarray:
    """The scales that SmoothQuant divides a layer's input channels by.

        s_j = max|x_j|^alpha / max|W_:j|^(1 - alpha)

    Xiao et al., 2022, arXiv 2211.10438, equation 4; in float64.

    Parameters
    ----------
    absmax : shape (k,)
        Largest magnitude of each channel of the input over the calibration data.
    weights : shape (n, k), or a list of such
        (out, in), of all layers that read this input.
    alpha
        How much of the activations' size goes to the weights: 0 to 1.

    Returns
    -------
    numpy.ndarray
        (k,) float64, at least 1e-5. Channels that are never active, or that no weight reads, have 1.

    Raises
    ------
    ValueError
        An alpha outside 0..1, NaN, Inf, shapes that do not fit.

    >>> smoothquant_scales([8.0, 1.0, 0.0], np.float32([[0.5, -1, 3], [0.25, 0.5, 1]]))
    array([4., 1., 1.])
    """
    if isinstance(alpha, (bool, str)) or not 0 <= alpha <= 1:
        raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha!r}")
    most = _channels(absmax)
    heaviest = _column_maxima(weights, len(most))
    if not np.isfinite(heaviest).all():
        raise ValueError("weights: NaN or Inf")
    used = (most > 0) & (heaviest > 0)
    scale = np.ones(len(most))
    scale[used] = np.maximum(most[used] ** alpha / heaviest[used] ** (1 - alpha), LEAST)
    return scale


def search_alpha(absmax: Any, samples: np.ndarray, weights: np.ndarray | Sequence[np.ndarray], spec: QuantSpec,
                 activations: QuantSpec | None) -> tuple[float | None, np.ndarray]:
    """The alpha of ALPHAS with which the layers' outputs lose least, and its scales; (None, ones) where none helps.

        minimise over alpha:  |Q(x / s) Q(W diag(s))^T - x W^T|^2

    Both sides are rounded as they will be, on rows of the input: a Gram matrix tells what rounded weights do, but not how
    large the steps of per-token activations are, which depend on the largest channel of each token.

    Parameters
    ----------
    absmax
        As for :func:`smoothquant_scales`.
    samples
        (m, k) float32 rows of the input.
    weights
        (n, k), or those of all layers that read it.
    spec, activations
        Formats of the weights and of the inputs.

    Raises
    ------
    ValueError
        NaN, Inf, shapes that do not fit.

    >>> rng = np.random.default_rng(0)
    >>> x, w = rng.standard_normal((64, 16)).astype(np.float32), rng.standard_normal((8, 16)).astype(np.float32)
    >>> x[:, 3] *= 50
    >>> alpha, scale = search_alpha(np.abs(x).max(0), x, w, QuantSpec(8), QuantSpec(8, granularity="token", dynamic=True))
    >>> alpha is not None and bool(scale[3] > 3 * np.delete(scale, 3).max())
    True
    """
    most = _channels(absmax)
    if np.shape(samples)[1:] != most.shape:
        raise ValueError(f"samples: expected shape (m, {len(most)}) as absmax has, got {np.shape(samples)}")
    loss, scales = output_error(samples, weights, spec, activations), np.ones(len(most))
    best, chosen = loss(scales, float(most.max(initial=0))), None
    for alpha in ALPHAS:
        scale = smoothquant_scales(most, weights, alpha)
        error = loss(scale, float((most / scale).max(initial=0)))
        if error < best:
            best, chosen, scales = error, alpha, scale
    return chosen, scales


@register
@dataclass(frozen=True)
class SmoothQuant(Transform):
    """SmoothQuant.

    Parameters
    ----------
    alpha
        0 to 1; "search" tries 0, 0.05, ... 1 for each input on sampled rows and keeps what loses least, with no smoothing
        as the one that is tried first.
    branch
        Where the residual connection reads the same rows (BERT's post-norm blocks), divide them in front of the layers at
        run time, as wherever nothing absorbs a scale; False leaves such inputs as they are.
    stages
        Which inputs: the paper's are those of query, key and value ("qkv") and of the feed-forward layer's first matrices
        ("mlp"). Its last matrix ("down") is worth it where all tokens share one scale: behind a gate there are outliers.

    >>> SmoothQuant(alpha=0.8)
    SmoothQuant(alpha=0.8, branch=True, stages=('qkv', 'mlp'))
    """

    alpha: float | str = 0.5
    branch: bool = True
    stages: tuple[str, ...] = ("qkv", "mlp")

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", checked_stages("SmoothQuant", self.stages))
        set_flags(self, "branch")
        given = not isinstance(self.alpha, str) and is_number(self.alpha) and 0 <= self.alpha <= 1
        if not given and self.alpha != "search":
            raise ValueError(f"SmoothQuant: alpha must be a number from 0 to 1 or 'search', got {self.alpha!r}")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"absmax", "samples"} if self.alpha == "search" else {"absmax"})

    def transform(self, model: Any, statistics: Statistics | None, scheme: Scheme) -> tuple[Any, Scheme]:
        """See :meth:`Transform.transform`; the scheme stays as it is."""
        statistics = calibrated(self, statistics)
        for folding in targets(model, scheme, self.stages, self.branch):
            stats = statistics[folding.consumers[0]]
            if isinstance(self.alpha, str):
                scale = search_alpha(stats["absmax"], stats["samples"], *consumers(model, scheme, folding))[1]
            else:
                weights = [model.linears[name].weight for name in folding.consumers]
                scale = smoothquant_scales(stats["absmax"], weights, self.alpha)
            model = fold(model, folding, folding.tied(scale), branch=self.branch)
        return model, scheme
