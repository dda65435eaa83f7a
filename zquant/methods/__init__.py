"""Quantization methods, one file per paper; each registers a frozen dataclass."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

if TYPE_CHECKING:
    from ..qtensor import QTensor
    from ..spec import QuantSpec

__all__ = ["GPTAQ", "GPTQ", "METHODS", "Method", "RTN", "get_method", "register"]

METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Method:
    """What turns a weight matrix into codes. Options are the fields of the dataclass.

    Attributes
    ----------
    needs
        Names of the statistics that ``quantize`` wants from calibration, see :class:`zquant.InputStatistics`; empty when
        it needs no data.
    by_rows
        Whether each row's codes depend on that row alone (with scales per channel or group): a large matrix is then
        quantized some rows at a time.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    by_rows: ClassVar[bool] = False

    def quantize(self, w: np.ndarray, spec: QuantSpec, stats: Mapping[str, np.ndarray] | None = None) -> QTensor:
        """Quantize w (n, k) float32 to ``spec``; ``stats`` holds what ``needs`` names. w is not changed."""
        raise TypeError(f"{type(self).__name__} does not define quantize")

    def to_dict(self) -> dict[str, Any]:
        """The method's name and options, ready for JSON."""
        return {"method": type(self).__name__.lower()} | {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Method:
        """The inverse of :meth:`to_dict`.

        >>> Method.from_dict({"method": "rtn"})
        RTN()
        """
        options = dict(data)
        cls = _method_class(options.pop("method", None))
        if unknown := sorted(set(options) - {f.name for f in fields(cls)}):
            raise ValueError(f"method {cls.__name__}: unknown options {unknown}")
        return cls(**options)


M = TypeVar("M", bound=type[Method])


def register(cls: M) -> M:
    """Class decorator: make a method known by its class name in lower case."""
    METHODS[cls.__name__.lower()] = cls
    return cls


def _method_class(name: object) -> type[Method]:
    if not isinstance(name, str) or name.lower() not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}")
    return METHODS[name.lower()]


def get_method(method: str | Method) -> Method:
    """A method by name, with its default options; a Method is returned as it is.

    >>> get_method("rtn")
    RTN()
    >>> get_method("round")
    Traceback (most recent call last):
    ...
    ValueError: unknown method 'round'; known: gptaq, gptq, rtn
    """
    return method if isinstance(method, Method) else _method_class(method)()


from .gptq import GPTAQ, GPTQ  # noqa: E402  (needs register)
from .rtn import RTN  # noqa: E402
