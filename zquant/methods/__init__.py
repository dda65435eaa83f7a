"""Quantization methods, one file per paper; each registers a frozen dataclass. Recipes combine them."""
from __future__ import annotations

from .awq import AWQClip, AWQScale
from .base import METHODS, STEPS, Method, Repair, Step, Transform, get_method, register
from .fptq import FPTQ
from .gptq import GPTAQ, GPTQ
from .lkd import LKD, BlockMethod, ZQGlobal
from .llm_int8 import LLMInt8
from .lorc import LoRC
from .outlier_suppression import OutlierSuppression
from .recipe import PRESETS, Preset, Recipe, preset
from .rtn import RTN
from .smoothquant import SmoothQuant
from .zq_local import ZQLocal

__all__ = [
    "AWQClip", "AWQScale", "BlockMethod", "FPTQ", "GPTAQ", "GPTQ", "LLMInt8", "LKD", "LoRC", "METHODS", "Method",
    "OutlierSuppression", "PRESETS", "Preset", "RTN", "Recipe", "Repair", "STEPS", "SmoothQuant", "Step", "Transform",
    "ZQGlobal", "ZQLocal", "get_method", "preset", "register",
]

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
