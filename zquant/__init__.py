"""zquant: post-training quantization of Transformers on a CPU, in C and NumPy.

    import zquant as zq
    enc = zq.SentenceEncoder("all-MiniLM-L6-v2")      # a Hugging Face directory
    q = zq.quantize(enc, "w8a8")                      # ZeroQuant; no calibration data needed
    q.encode(["a sentence"])                          # float32 (1, 384)
    zq.compare(enc, q, sentences)                     # per-layer error, fidelity, size, speed
    q.save("minilm-w8a8")

    lm = zq.load("tiny-llama-5m")                     # GPT-2, OPT, GPT-NeoX, Llama, Mistral, Qwen
    zq.quantize(lm, "w4a8").generate("Once upon a time")
    zq.perplexity(lm, text)
    zq.calibrate(lm, other_text, needs={"absmax", "gram"})    # statistics, for methods that look at data

Importing needs NumPy alone; safetensors, tokenizers, tqdm and matplotlib are imported where they are used.
"""
from __future__ import annotations

from ._blas import core_hint

with core_hint():  # zquant._core loads OpenBLAS
    from . import _core as _core
from . import cpu, evaluate, extras, ops
from .cache import KVCache
from .calibrate import calibrate
from .compare_methods import MethodResult, MethodsTable, compare_methods
from .distill import BlockResult, lkd
from .encoder import SentenceEncoder
from .errors import FormatError
from .evaluate import STSResult, cosine_fidelity, pearson, spearman, sqnr_db, sts
from .extras import Extras, LowRank, Outliers
from .generate import Generation
from .language_report import LanguageReport
from .linear import Linear
from .methods import GPTAQ, GPTQ, PRESETS, RTN, Method, Recipe, Repair, Transform
from .methods.awq import AWQClip, AWQInfo, AWQScale, awq, awq_clip
from .methods.fptq import FPTQ, FPTQPolicy, fptq
from .methods.gptq import GridTensor, SolveInfo, gptq
from .methods.lkd import LKD, ZQGlobal
from .methods.llm_int8 import LLMInt8, llm_int8_matmul
from .methods.lorc import LoRC, lorc
from .methods.outlier_suppression import OutlierSuppression, outlier_suppression
from .methods.smoothquant import SmoothQuant, smoothquant_scales
from .methods.zq_local import LocalInfo, ZQLocal, zq_local
from .models import CausalLM, Model, load
from .models.trainable import FloatBlock
from .perplexity import PerplexityResult, perplexity
from .planted import plant_outliers
from .qtensor import QTensor
from .quantize import quantize
from .report import Report, compare
from .sensitivity import Sensitivity, sensitivity
from .spec import QuantSpec, Scheme
from .statistics import InputStatistics, Statistics
from .threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "AWQClip", "AWQInfo", "AWQScale", "BlockResult", "CausalLM", "Extras", "FPTQ", "FPTQPolicy", "FloatBlock",
    "FormatError", "GPTAQ", "GPTQ", "Generation", "GridTensor", "InputStatistics", "KVCache", "LKD", "LLMInt8",
    "LanguageReport", "Linear", "LoRC", "LocalInfo", "LowRank", "Method", "MethodResult", "MethodsTable", "Model",
    "OutlierSuppression", "Outliers", "PRESETS", "PerplexityResult", "QTensor", "QuantSpec", "RTN", "Recipe",
    "Repair", "Report", "STSResult", "Scheme", "Sensitivity", "SentenceEncoder", "SmoothQuant", "SolveInfo",
    "Statistics", "Transform", "ZQGlobal", "ZQLocal", "__version__", "awq", "awq_clip", "calibrate", "compare",
    "compare_methods", "cosine_fidelity", "cpu", "evaluate", "extras", "fptq", "get_num_threads", "gptq", "lkd",
    "llm_int8_matmul", "load", "lorc", "ops", "outlier_suppression", "pearson", "perplexity", "plant_outliers",
    "quantize", "sensitivity", "set_num_threads", "smoothquant_scales", "spearman", "sqnr_db", "sts", "zq_local",
]
