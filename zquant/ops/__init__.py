"""The kernels as functions on NumPy arrays: quantizers, integer and float linear layers, Transformer operators.

Arrays in, arrays out; nothing here knows models. Every result has the same bits at every dispatch level and for any
number of threads. :mod:`zquant.reference` has each function in plain NumPy.
"""
from .linear import *  # noqa: F403
from .nn import *  # noqa: F403
from .quantize import *  # noqa: F403
