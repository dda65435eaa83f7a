"""Checks of options: whole numbers and real ones, Python's or NumPy's, never booleans."""
from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["as_count", "as_real"]


def as_count(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` as an int of ``least`` to ``most``; ValueError otherwise.

    >>> import numpy as np
    >>> as_count("steps", np.int64(3), 1)
    3
    >>> as_count("bits", 9, 2, 8)
    Traceback (most recent call last):
    ...
    ValueError: bits: expected an integer of 2 to 8, got 9
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        raise ValueError(f"{name}: expected an integer of {least} {'or more' if most is None else f'to {most}'}, got {value!r}")
    return int(value)


def as_real(name: str, value: Any, low: float, high: float, wanted: str) -> float:
    """``value`` as a float from ``low`` to ``high``, bounds included; ValueError, which says what was ``wanted``, otherwise.

    >>> as_real("top_p", 2, 0, 1, "a number from 0 to 1")
    Traceback (most recent call last):
    ...
    ValueError: top_p: expected a number from 0 to 1, got 2
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)) or not low <= value <= high:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return float(value)
