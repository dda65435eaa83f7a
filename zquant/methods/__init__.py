"""Quantization methods, one file per paper; each registers a frozen dataclass. Recipes combine them."""
from __future__ import annotations

from .base import METHODS, STEPS, Method, Repair, Step, Transform, get_method, register
from .recipe import PRESETS, Preset, Recipe, preset

__all__ = [
    "AWQClip", "AWQScale", "BlockMethod", "FPTQ", "GPTAQ", "GPTQ", "LLMInt8", "LKD", "LoRC", "METHODS", "Method",
    "OutlierSuppression", "PRESETS", "Preset", "RTN", "Recipe", "Repair", "STEPS", "SmoothQuant", "Step", "Transform",
    "ZQGlobal", "ZQLocal", "get_method", "preset", "register",
]

from .awq import AWQClip, AWQScale  # noqa: E402  (needs register)
from .fptq import FPTQ  # noqa: E402
from .gptq import GPTAQ, GPTQ  # noqa: E402
from .lkd import LKD, BlockMethod, ZQGlobal  # noqa: E402
from .llm_int8 import LLMInt8  # noqa: E402
from .lorc import LoRC  # noqa: E402
from .outlier_suppression import OutlierSuppression  # noqa: E402
from .rtn import RTN  # noqa: E402
from .smoothquant import SmoothQuant  # noqa: E402
from .zq_local import ZQLocal  # noqa: E402

preset("zeroquant", "rtn", "w8a8")
preset("gptq", "gptq", "w4a16")
preset("gptaq", "gptaq", "w4a16")
preset("zeroquant-v2", "gptq+lorc", "w4a8")
preset("zeroquant-lkd", "lkd", "w4/8a8")
preset("gptq+lkd", LKD(start="gptq"), "w4/8a8")
preset("awq", "awq-scale+awq-clip", "w4a16-g128")
preset("awq+gptq", "awq-scale+gptq", "w4a16-g128")
preset("llm.int8()", "llm.int8", "w8a8-sym")
preset("smoothquant-o1", "smoothquant", "w8a8-sym-wt")
preset("smoothquant-o2", "smoothquant", "w8a8-sym-tensor-wt")
preset("smoothquant-o3", "smoothquant", "w8a8-sym-static-wt")
preset("fptq", "fptq", "w4a8-g128")
preset("os+", "outlier_suppression", "w8a8-static")
