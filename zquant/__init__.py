"""zquant: post-training quantization of Transformers on a CPU, in C and NumPy.

    import zquant as zq
    enc = zq.SentenceEncoder("all-MiniLM-L6-v2")      # a Hugging Face directory
    q = zq.quantize(enc, "w8a8")                      # ZeroQuant; no calibration data needed
    q.encode(["a sentence"])                          # float32 (1, 384)
    zq.compare(enc, q, sentences)                     # per-layer error, fidelity, size, speed
    q.save("minilm-w8a8")

Importing needs NumPy alone; safetensors, tokenizers, tqdm and matplotlib are imported where they are used.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._blas import core_hint

with core_hint():
    from . import _core
from . import cpu, ops
from .threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

# Public names that live in modules imported on first use.
_LAZY: dict[str, str] = {}

if TYPE_CHECKING:
    pass

__all__ = ["__version__", "cpu", "ops", "get_num_threads", "set_num_threads", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'zquant' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
