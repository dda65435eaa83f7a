"""Recipes: transforms of the model, one solver, repairs of the layers, in this order; and presets by the papers' names."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..spec import Scheme
from .base import STEPS, Method, Repair, Step, Transform

__all__ = ["PRESETS", "Preset", "Recipe", "preset"]


@dataclass(frozen=True)
class Recipe:
    """What :func:`zquant.quantize` does: transforms, then one solver, then repairs. Made by :meth:`of`.

    Attributes
    ----------
    name : what it was called, or the steps' names joined with +
    steps : the steps; round to nearest is put where no solver was named

    >>> Recipe.of(["smoothquant", "lorc"]).name
    'smoothquant+lorc'
    """

    name: str
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        steps = tuple(self.steps)
        for step in steps:
            if not isinstance(step, (Transform, Method, Repair)):
                raise TypeError(f"recipe {self.name}: expected Transform, Method or Repair, got {step!r}")
        if not any(isinstance(step, Method) for step in steps):
            first = next((i for i, step in enumerate(steps) if isinstance(step, Repair)), len(steps))
            steps = (*steps[:first], STEPS["rtn"](), *steps[first:])
        object.__setattr__(self, "steps", steps)
        _check_order(self.name, steps)

    @property
    def transforms(self) -> tuple[Transform, ...]:
        """What happens to the float model first."""
        return tuple(step for step in self.steps if isinstance(step, Transform))

    @property
    def method(self) -> Method:
        """The solver."""
        return next(step for step in self.steps if isinstance(step, Method))

    @property
    def repairs(self) -> tuple[Repair, ...]:
        """What is added to the quantized layers."""
        return tuple(step for step in self.steps if isinstance(step, Repair))

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that any of the steps wants."""
        return frozenset().union(*(step.needs for step in self.steps))

    @staticmethod
    def of(recipe: Any) -> Recipe:
        """A recipe from a name ("gptq"), names joined with + ("smoothquant+gptq+lorc"), a preset's name ("zeroquant"), a
        step, a list of names and steps, or a recipe.

        Raises
        ------
        ValueError
            Unknown names; steps out of order, two solvers, the same step twice.
        TypeError
            Something else.

        >>> Recipe.of("gptq").method
        GPTQ(act_order=True, static_groups=True, damping=0.01, block=128, mse=False)
        >>> Recipe.of("zeroquant")
        Recipe('zeroquant', RTN())
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Preset):
            return recipe.recipe
        if isinstance(recipe, Step):
            return Recipe(recipe.registered, (recipe,))
        if isinstance(recipe, str):
            key = recipe.strip().lower()
            return PRESETS[key].recipe if key in PRESETS else Recipe(key, _parse(recipe))
        if isinstance(recipe, Sequence):
            steps = [step for part in recipe for step in ([part] if isinstance(part, Step) else _parse(part))]
            return Recipe("+".join(step.registered for step in steps) or "rtn", tuple(steps))
        raise TypeError(f"expected a name, a step, a list of them or a Recipe, got {type(recipe).__name__}")

    def to_dict(self) -> dict[str, Any]:
        """Name and steps, ready for JSON."""
        return {"name": self.name, "steps": [step.to_dict() for step in self.steps]}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """The inverse of :meth:`to_dict`.

        >>> Recipe.from_dict({"name": "mine", "steps": [{"method": "rtn"}]})
        Recipe('mine', RTN())
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("steps"), Sequence):
            raise ValueError(f"recipe: expected a name and steps, got {data!r}")
        return Recipe(str(data.get("name", "")), tuple(Step.from_dict(step) for step in data["steps"]))

    def __repr__(self) -> str:
        return f"Recipe({self.name!r}, {', '.join(map(repr, self.steps))})"


@dataclass(frozen=True)
class Preset:
    """A recipe by its paper's name, with the scheme that the paper quantizes to."""

    recipe: Recipe
    scheme: Scheme


#: Recipes by the papers' names.
PRESETS: dict[str, Preset] = {}


def preset(name: str, steps: Any, scheme: str | Scheme) -> None:
    """Make a recipe known by a paper's name; ``steps`` as for :meth:`Recipe.of`."""
    PRESETS[name.lower()] = Preset(Recipe(name.lower(), Recipe.of(steps).steps), Scheme.parse(scheme))


def _check_order(name: str, steps: Sequence[Step]) -> None:
    solvers = [step for step in steps if isinstance(step, Method)]
    if len(solvers) > 1:
        raise ValueError(f"recipe {name}: {solvers[0].registered} and {solvers[1].registered} both turn weights into codes; "
                         "name one")
    place = steps.index(solvers[0])
    for index, step in enumerate(steps):
        if isinstance(step, Transform) and index > place:
            raise ValueError(f"recipe {name}: {step.registered} transforms the float model and comes before "
                             f"{solvers[0].registered}")
        if isinstance(step, Repair) and index < place:
            raise ValueError(f"recipe {name}: {step.registered} repairs what is quantized and comes after "
                             f"{solvers[0].registered}")
    if len(set(map(type, steps))) < len(steps):
        raise ValueError(f"recipe {name}: the same step twice")


def _parse(text: Any) -> tuple[Step, ...]:
    """Names of steps and presets joined with +. A preset's round to nearest gives way to a solver that is named."""
    if not isinstance(text, str):
        raise TypeError(f"expected the name of a step or a Step, got {type(text).__name__}")
    steps: list[Step] = []
    for name in _names(text):
        if name in STEPS:
            steps.append(STEPS[name]())
        else:
            steps += [step for step in PRESETS[name].recipe.steps if step != STEPS["rtn"]()]
    return tuple(steps)


def _names(text: str) -> list[str]:
    """Known names, the longest first; one that ends in + ("os+") needs no other between it and the next."""
    known = sorted({*STEPS, *PRESETS}, key=len, reverse=True)
    name = re.compile("|".join(map(re.escape, known)))
    rest, found = text.strip().lower(), []
    while True:
        match = name.match(rest)
        end = match.end() if match else 0
        if match is None or not (end == len(rest) or rest[end] == "+" or match[0].endswith("+")):
            raise ValueError(f"unknown method {text!r}; known: {', '.join(sorted(known))}, and several joined with +")
        found.append(match[0])
        rest = rest[end:]
        if not rest:
            return found
        rest = rest[1:] if rest[0] == "+" else rest
