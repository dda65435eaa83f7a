"""Kernel functions on NumPy arrays, with checks, defaults and documentation; :mod:`zquant.reference` mirrors them."""
from .quantize import *  # noqa: F403
