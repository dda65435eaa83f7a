"""zquant: post-training quantization of Transformers on a CPU."""
from __future__ import annotations

from . import cpu

__version__ = "0.1.0"
__all__ = ["cpu", "__version__"]
