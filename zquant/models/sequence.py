"""A fixed sequence of kernel calls, run by the extension without the interpreter in between (csrc/python/bind_sequence.c)."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .. import _core

__all__ = ["Calls", "Register"]


@dataclass(frozen=True)
class Register:
    """Where an input or a result lies while a sequence runs."""

    index: int


class Calls:
    """Records calls whose arguments are constants, inputs or earlier results.

    >>> calls = Calls()
    >>> x = calls.input()
    >>> low, high = calls.add(divmod, x, 10, item=0), calls.add(divmod, x, 10, item=1)
    >>> _ = calls.add(max, low, high)
    >>> run = calls.bind()
    >>> run(47), run(81)
    (7, 8)
    """

    def __init__(self) -> None:
        self._inputs = self._registers = 0
        self._calls: list[tuple[Callable, tuple, tuple[int, ...], int, int]] = []

    def input(self) -> Register:
        """The next argument of the finished function. All inputs come before the first call."""
        if self._calls:
            raise ValueError("input: expected all inputs before the first call")
        self._inputs += 1
        return self._next()

    def add(self, function: Callable, *args: Any, item: int = -1) -> Register:
        """function(*args), or that tuple's element ``item``; a :class:`Register` among args stands for its value."""
        out = self._next()
        where = tuple(arg.index if isinstance(arg, Register) else -1 for arg in args)
        constants = tuple(None if isinstance(arg, Register) else arg for arg in args)
        self._calls.append((function, constants, where, out.index, item))
        return out

    def bind(self) -> Callable[..., Any]:
        """The recorded calls as one function of the inputs, which returns what the last call gives.

        Raises
        ------
        ValueError
            No input, no call, or more of them than the extension takes (32 registers, 24 arguments).
        """
        return partial(_core.run_sequence, _core.sequence(self._inputs, self._calls))

    def _next(self) -> Register:
        self._registers += 1
        return Register(self._registers - 1)
