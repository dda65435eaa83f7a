"""Layer-by-layer knowledge distillation as a step of a recipe: LKD (ZeroQuant, Yao et al., 2022, arXiv 2206.01861, section 4.3)
and ZQ-Global (ZeroQuant-V2, Yao et al., 2023, arXiv 2303.08302). zquant/distill.py does the training.

    LKD          min |L_k(h) - L^_k(h)|^2        h: the float model's hidden states before block k
    ZQ-Global    min |L_k(h) - L^_k(h^)|^2       h^: those of the quantized blocks before it
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ..checks import as_count
from ..qtensor import QTensor
from ..spec import QuantSpec
from .base import Method, get_method, is_number, register
from .rtn import RTN

__all__ = ["BlockMethod", "LKD", "TrainOptions", "ZQGlobal", "as_factors", "check_descent", "starting_solver"]


@dataclass(frozen=True)
class TrainOptions:
    """How a block is trained; see :func:`zquant.lkd`."""

    lr: float = 3e-4
    steps: int = 100
    batch_size: int | None = None
    search: tuple[float, ...] = ()
    kl: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "search", as_factors(self.search))
        object.__setattr__(self, "steps", check_descent(self.lr, self.steps, self.search))
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", as_count("batch_size", self.batch_size, 1))
        if not is_number(self.kl) or self.kl < 0:
            raise ValueError(f"kl: expected a number that is not negative, got {self.kl!r}")


def as_factors(search: Any) -> tuple[float, ...]:
    """``search`` as a tuple; ValueError where it is no sequence."""
    if isinstance(search, str) or not isinstance(search, Iterable):
        raise ValueError(f"search: expected a sequence of factors of lr, got {search!r}")
    return tuple(search)


def check_descent(lr: float, steps: int, search: tuple[float, ...]) -> int:
    """The number of steps; ValueError on options that no gradient descent can have."""
    for name, value in (("lr", lr), *(("search", factor) for factor in search)):
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name}: expected positive numbers, got {value!r}")
    return as_count("steps", steps, 0)


def starting_solver(start: str) -> Method:
    """The solver that ``start`` names, with its default options; ValueError on anything but a name."""
    if not isinstance(start, str):
        raise ValueError(f"start: expected the name of a solver, got {start!r}")
    return get_method(start)


@dataclass(frozen=True)
class BlockMethod(Method):
    """A solver that works on whole blocks of a model, not on one layer after another. What lies outside the blocks rounds to
    nearest.

    Attributes
    ----------
    inputs : whose hidden states a block reads: "teacher", the float model's; "student", the quantized blocks' before it
    """

    inputs: ClassVar[str] = "teacher"
    lr: float = 3e-4
    steps: int = 100
    batch_size: int | None = None
    start: str = "rtn"
    search: tuple[float, ...] = ()
    kl: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "search", as_factors(self.search))
        options = self.options  # making them checks them
        object.__setattr__(self, "steps", options.steps)
        object.__setattr__(self, "batch_size", options.batch_size)
        if isinstance(starting_solver(self.start), BlockMethod):
            raise ValueError(f"start: {self.start!r} trains blocks itself; name a solver of single layers")

    @property
    def options(self) -> TrainOptions:
        """Those of the training."""
        return TrainOptions(self.lr, self.steps, self.batch_size, self.search, self.kl)

    def quantize(self, w: np.ndarray, spec: QuantSpec, stats: Mapping[str, np.ndarray] | None = None) -> QTensor:
        """A matrix outside the blocks: round to nearest."""
        return RTN().quantize(w, spec, stats)


@register
@dataclass(frozen=True)
class LKD(BlockMethod):
    """Train each block, quantized, on the float model's hidden states before and after it.

    Attributes
    ----------
    lr : of AdamW; it falls to 0 along half a cosine
    steps : for each block; 0 gives what ``start`` gives
    batch_size : sequences of a step; None for as many as hold about 2048 tokens
    start : the solver whose codes training begins with: "rtn"; or another ("gptq"), whose scales then stay
    search : factors of ``lr`` that are tried besides 1 on each block; see :func:`zquant.lkd`
    kl : weight of the Kullback-Leibler divergence in the loss, beside the squared error

    >>> LKD(lr=1e-4).inputs
    'teacher'
    """


@register("zq-global")
@dataclass(frozen=True)
class ZQGlobal(BlockMethod):
    """As :class:`LKD`, one block after the other: each reads the hidden states of the quantized blocks before it and learns
    what the float model makes of its own, and so makes up for their errors as well.

    >>> ZQGlobal(start="gptq").inputs
    'student'
    """

    inputs: ClassVar[str] = "student"
