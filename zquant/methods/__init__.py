"""Quantization methods, one file per paper; each registers a frozen dataclass. Recipes combine them."""
from __future__ import annotations

from .base import METHODS, STEPS, Method, Repair, Step, Transform, get_method, register
from .recipe import PRESETS, Preset, Recipe, preset

__all__ = ["GPTQ", "METHODS", "PRESETS", "Method", "Preset", "RTN", "Recipe", "Repair", "STEPS", "Step", "Transform",
           "get_method", "preset", "register"]

from .gptq import GPTQ  # noqa: E402  (needs register)
from .rtn import RTN  # noqa: E402

preset("zeroquant", "rtn", "w8a8")
