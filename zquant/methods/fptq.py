"""FPTQ (Li et al., 2023, arXiv 2308.15987): 4-bit weights in groups and 8-bit activations, each input in its own manner.

With v the largest magnitude in a layer's input over the calibration data:

    v <= v0         one scale, known beforehand
    v0 < v <= v1    logarithmic equalization, then one scale, known beforehand:  s_k = m_k / log2(2 + m_k),  m_k = max|x_k|
    v1 < v          one scale per token, found at run time

Equalization brings the channel maxima to log2(2 + m_k); a norm in front takes 1 / s over. An input that no norm feeds alone
is not equalized: it gets scales per token.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..models.foldings import fold, foldings
from ..spec import TOKEN_ASYMMETRIC, QuantSpec, Scheme
from ..statistics import Statistics
from .base import Transform, calibrated, is_number, register
from .smoothquant import _channels

__all__ = ["FPTQ", "STATIC", "FPTQPolicy", "fptq"]

STATIC = QuantSpec(8, granularity="tensor")


class FPTQPolicy(NamedTuple):
    """What FPTQ does with one input: ``mode`` is "static", "equalize" or "token"; ``scale`` (k,) float64 is 1 unless
    equalized.

    >>> import numpy as np
    >>> FPTQPolicy("static", np.ones(4)).mode
    'static'
    """

    mode: str
    scale: np.ndarray


def fptq(absmax: Any, v0: float = 15, v1: float = 150) -> FPTQPolicy:
    """How FPTQ quantizes an input, by the largest magnitude of each of its channels.

        v = max m_k,   v <= v0: static;   v0 < v <= v1: equalize by s_k = m_k / log2(2 + m_k);   v1 < v: per token

    Li et al., 2023, arXiv 2308.15987.

    Parameters
    ----------
    absmax : shape (k,)
        m, over the calibration data.
    v0, v1
        Up to v0 one scale will do, up to v1 with equalization; beyond, scales are per token.

    Returns
    -------
    FPTQPolicy
        The mode, and what the input is divided by.

    Raises
    ------
    ValueError
        NaN, Inf or negative magnitudes; not 0 <= v0 <= v1.

    >>> fptq([2.0, 14.0, 0.0, 30.0])
    FPTQPolicy(mode='equalize', scale=array([1. , 3.5, 1. , 6. ]))
    >>> fptq([2.0, 14.0]).mode, fptq([2.0, 1400.0]).mode
    ('static', 'token')
    """
    most = _channels(absmax)
    _check_limits(v0, v1)
    scale, largest = np.ones(len(most)), most.max(initial=0)
    if largest <= v0:
        return FPTQPolicy("static", scale)
    if largest > v1:
        return FPTQPolicy("token", scale)
    active = most > 0
    scale[active] = most[active] / np.log2(2 + most[active])
    return FPTQPolicy("equalize", scale)


def _check_limits(v0: float, v1: float) -> None:
    if not all(is_number(v) or v == math.inf for v in (v0, v1)) or not 0 <= v0 <= v1:
        raise ValueError(f"FPTQ: expected 0 <= v0 <= v1, got v0={v0!r} and v1={v1!r}")


@register
@dataclass(frozen=True)
class FPTQ(Transform):
    """FPTQ: equalizes what norms feed and decides for each layer how its input is quantized. The scheme's own activation
    overrides go before its decisions; the weights are the scheme's.

    Parameters
    ----------
    v0, v1
        See :func:`fptq`.

    >>> FPTQ()
    FPTQ(v0=15, v1=150)
    """

    needs: ClassVar[frozenset[str]] = frozenset({"absmax"})
    v0: float = 15
    v1: float = 150

    def __post_init__(self) -> None:
        _check_limits(self.v0, self.v1)

    def transform(self, model: Any, statistics: Statistics | None, scheme: Scheme) -> tuple[Any, Scheme]:
        """See :meth:`Transform.transform`; the scheme comes back with an override for the input of each layer.

        Raises
        ------
        ValueError
            A scheme that leaves activations as they are.
        """
        statistics = calibrated(self, statistics)
        if scheme.activations is None:
            raise ValueError(f"FPTQ decides how activations are quantized; scheme {scheme.name} leaves them float")
        token = scheme.activations if scheme.activations.granularity == "token" else TOKEN_ASYMMETRIC
        fed = {name: folding for folding in foldings(model) if folding.kind == "norm" for name in folding.consumers}
        overrides: list[tuple[str, QuantSpec | None]] = []
        for group in statistics.groups:
            if all(scheme.weights_for(name) is None for name in group.layers):
                continue
            mode, scale = fptq(group["absmax"], self.v0, self.v1)
            folding = fed.get(group.layers[0])
            if mode == "equalize" and folding is not None:
                model = fold(model, folding, scale)
            static = mode == "static" or (mode == "equalize" and folding is not None)
            overrides += [(name, STATIC if static else token) for name in group.layers]
        return model, scheme.replace(activation_overrides=(*overrides, *scheme.activation_overrides))
