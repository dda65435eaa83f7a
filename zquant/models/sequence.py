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
    """Stands for an input or a result while a sequence is recorded."""

    index: int


class Calls:
    """Records calls whose arguments are constants, inputs or earlier results.

    Attributes
    ----------
    part : str or None
        Name of what the calls added from now on belong to: a ValueError of theirs begins with it.

    >>> calls = Calls()
    >>> x = calls.input()
    >>> low, high = calls.add(divmod, x, 10, item=0), calls.add(divmod, x, 10, item=1)
    >>> _ = calls.add(max, low, high)
    >>> run = calls.bind()
    >>> run(47), run(81)
    (7, 8)
    """

    def __init__(self) -> None:
        self.part: str | None = None
        self._inputs = 0
        self._calls: list[tuple[Callable, tuple[Any, ...], int, str | None]] = []

    def input(self) -> Register:
        """The next argument of the finished function. All inputs come before the first call."""
        if self._calls:
            raise ValueError("input: expected all inputs before the first call")
        self._inputs += 1
        return Register(self._inputs - 1)

    def add(self, function: Callable, *args: Any, item: int = -1) -> Register:
        """function(*args), or that tuple's element ``item``; a :class:`Register` among args stands for its value."""
        self._calls.append((function, args, item, self.part))
        return Register(self._inputs + len(self._calls) - 1)

    def bind(self) -> Callable[..., Any]:
        """The recorded calls as one function of the inputs, which returns what the last call gives.

        Raises
        ------
        ValueError
            No input, no call, or more than the extension takes: 32 values that are needed at one time, 24 arguments.
        """
        return partial(_core.run_sequence, _core.sequence(self._inputs, self._placed()))

    def _placed(self) -> list[tuple[Callable, tuple, tuple[int, ...], int, int, str | None]]:
        """The calls as the extension takes them. A result goes where a value lay that nobody reads any more, if there is one:
        a sequence has few places, however long it is."""
        last_reader = {arg: call for call, (_, args, *_) in enumerate(self._calls) for arg in args if isinstance(arg, Register)}
        places = {Register(i): i for i in range(self._inputs)}
        free: list[int] = []
        placed = []
        for call, (function, args, item, part) in enumerate(self._calls):
            read = {arg for arg in args if isinstance(arg, Register)}
            where = tuple(places[arg] if isinstance(arg, Register) else -1 for arg in args)
            free += [places.pop(arg) for arg in read if last_reader[arg] == call]
            out = free.pop() if free else len(places)
            result = Register(self._inputs + call)
            if result in last_reader:
                places[result] = out
            else:
                free.append(out)
            placed.append((function, tuple(None if isinstance(arg, Register) else arg for arg in args), where, out, item, part))
        return placed
