"""Steps of a recipe, and the registry of their names: transforms of a model, solvers of a layer, repairs of a layer."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from ..spec import QuantSpec

if TYPE_CHECKING:
    from ..qtensor import QTensor
    from ..spec import Scheme
    from ..statistics import Statistics

__all__ = ["METHODS", "STEPS", "Method", "Repair", "Step", "Transform", "get_method", "register"]

#: Every step by its registered name.
STEPS: dict[str, type[Step]] = {}
#: Those of them that are solvers.
METHODS: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Step:
    """One step of a :class:`Recipe`: a Transform, a Method or a Repair. Options are the fields of the dataclass.

    Attributes
    ----------
    registered
        The name under which :func:`register` put the class: its own in lower case, unless another was given.
    needs
        Names of the statistics that ``quantize`` wants from calibration, see :class:`zquant.InputStatistics`; empty when
        it needs no data.
    """

    registered: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        cls.registered = cls.__name__.lower()

    def to_dict(self) -> dict[str, Any]:
        """The step's name and options, ready for JSON."""
        return {"method": self.registered} | {f.name: getattr(self, f.name) for f in fields(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Step:
        """The inverse of :meth:`to_dict`.

        >>> Step.from_dict({"method": "rtn"})
        RTN()
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"method: expected its name and options as a mapping, got {data!r}")
        options = dict(data)
        cls = step_class(options.pop("method", None))
        if unknown := sorted(set(options) - {f.name for f in fields(cls)}):
            raise ValueError(f"method {cls.__name__}: unknown options {unknown}")
        return cls(**options)


@dataclass(frozen=True)
class Method(Step):
    """A solver: what turns a weight matrix into codes.

    Attributes
    ----------
    by_rows
        Whether each row's codes depend on that row alone (with scales per channel or group): a large matrix is then
        quantized some rows at a time.

    >>> import numpy as np
    >>> from zquant.qtensor import QTensor
    >>> class Halves(Method):
    ...     def quantize(self, w, spec, stats=None):
    ...         return QTensor(np.rint(2 * w).astype(np.int8), np.full((len(w), 1), 0.5, np.float32), None, spec)
    >>> Halves().quantize(np.float32([[0.6, 2.0]]), QuantSpec(4)).codes.tolist()
    [[1, 4]]
    """

    by_rows: ClassVar[bool] = False

    def quantize(self, w: np.ndarray, spec: QuantSpec, stats: Mapping[str, np.ndarray] | None = None) -> QTensor:
        """Quantize w (n, k) float32 to ``spec``; ``stats`` holds what ``needs`` names. w is not changed."""
        raise TypeError(f"{type(self).__name__} does not define quantize")


@dataclass(frozen=True)
class Transform(Step):
    """What makes a float model easier to quantize and leaves what it computes as it is.

    >>> import zquant as zq
    >>> isinstance(zq.SmoothQuant(alpha=0.75), Transform)
    True
    """

    def transform(self, model: Any, statistics: Statistics | None, scheme: Scheme) -> tuple[Any, Scheme]:
        """A model that computes what ``model`` does (within 1e-5), and the scheme for it.

        Parameters
        ----------
        model
            A float Model or CausalLM (of a SentenceEncoder, the Model inside). It is not changed.
        statistics
            Of ``model``, with what ``needs`` names; None where that is empty.
        scheme
            How it will be quantized. It comes back as it is, unless the method decides about activations itself.
        """
        raise TypeError(f"{type(self).__name__} does not define transform")


@dataclass(frozen=True)
class Repair(Step):
    """What is added to a layer after it has been quantized.

    Attributes
    ----------
    fills
        The field of :class:`zquant.extras.Extras` that it fills.

    >>> import zquant as zq
    >>> isinstance(zq.LoRC(rank=4), Repair), zq.LoRC.fills
    (True, 'correction')
    """

    fills: ClassVar[str] = "correction"

    def repair(self, w: np.ndarray, tensor: QTensor, spec: QuantSpec, stats: Mapping[str, np.ndarray] | None = None) -> Any:
        """What makes up for ``tensor`` in place of w (n, k) float32, or None; ``stats`` holds what ``needs`` names."""
        raise TypeError(f"{type(self).__name__} does not define repair")


def is_number(value: object) -> bool:
    """Whether it is a finite number, of Python's or NumPy's."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float is near
        return False


def not_negative(name: str, value: Any) -> float:
    """``value`` as a float; ValueError where it is negative, not finite or no number.

    >>> not_negative("damping", 1)
    1.0
    """
    if not is_number(value) or value < 0:
        raise ValueError(f"{name}: expected a finite number of 0 or more, got {value!r}")
    return float(value)


def as_flag(name: str, value: Any) -> bool:
    """``value`` as a bool; ValueError where it is something else.

    >>> as_flag("mse", np.True_)
    True
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def set_flags(step: Step, *names: str) -> None:
    """Check options of a step that are True or False, named with its class; for ``__post_init__``."""
    for name in names:
        object.__setattr__(step, name, as_flag(f"{type(step).__name__}: {name}", getattr(step, name)))


S = TypeVar("S", bound=type[Step])
G = TypeVar("G", bound=Mapping[str, Any])


def calibrated(step: Step, found: G | None) -> G:
    """``found``, statistics of all layers or of one, where they hold what the step needs; ValueError otherwise."""
    names = () if found is None else getattr(found, "needs", found)
    if found is None or not step.needs <= set(names):
        raise ValueError(f"{type(step).__name__} needs calibration: statistics of the layers' inputs with "
                         f"{' and '.join(sorted(step.needs))}, see zquant.InputStatistics")
    return found


def check_by_rows(method: Method, spec: QuantSpec) -> None:
    """ValueError where rows of a matrix share scales."""
    if spec.granularity not in ("channel", "group"):
        raise ValueError(f"{type(method).__name__} quantizes per channel or in groups, not {spec}")


def weight_spec(bits: int, group_size: int | None, symmetric: bool) -> QuantSpec:
    """The format with a scale per row, or per group of a row.

    >>> print(weight_spec(4, 64, True), weight_spec(4, None, False), sep="; ")
    int4, groups of 64; uint4, per channel
    """
    granularity = "channel" if group_size is None else "group"
    return QuantSpec(bits, granularity=granularity, group_size=group_size, symmetric=bool(symmetric))


def register(name: Any) -> Any:
    """Class decorator: make a step known by its class name in lower case, or by a name given: ``@register("llm.int8")``."""
    if isinstance(name, str):
        return _registering(name.lower())
    return _registering(name.__name__.lower())(name)


def _registering(name: str) -> Callable[[S], S]:
    def put(cls: S) -> S:
        cls.registered = name
        STEPS[name] = cls
        if issubclass(cls, Method):
            METHODS[name] = cls
        return cls

    return put


def step_class(name: object) -> type[Step]:
    """The registered class of that name."""
    if not isinstance(name, str) or name.lower() not in STEPS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(sorted(STEPS))}")
    return STEPS[name.lower()]


def get_method(method: str | Method) -> Method:
    """A solver by name, with its default options; a Method is returned as it is.

    >>> get_method("rtn")
    RTN()
    >>> get_method("round")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: unknown method 'round'; known: ...
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str) or method.lower() not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(sorted(METHODS))}")
    return METHODS[method.lower()]()
