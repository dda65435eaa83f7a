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
from . import cpu, evaluate, ops
from .cache import KVCache
from .calibrate import calibrate
from .encoder import SentenceEncoder
from .errors import FormatError
from .evaluate import STSResult, cosine_fidelity, pearson, spearman, sqnr_db, sts
from .generate import Generation
from .language_report import LanguageReport
from .linear import Linear
from .methods import GPTAQ, GPTQ, RTN, Method
from .methods.gptq import GridTensor, SolveInfo, gptq
from .models import CausalLM, Model, load
from .perplexity import PerplexityResult, perplexity
from .qtensor import QTensor
from .quantize import quantize
from .report import Report, compare
from .spec import QuantSpec, Scheme
from .statistics import InputStatistics, Statistics
from .threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "GPTAQ", "GPTQ", "RTN", "CausalLM", "FormatError", "Generation", "GridTensor", "InputStatistics", "KVCache", "LanguageReport",
    "Linear", "Method", "Model", "PerplexityResult", "QTensor", "QuantSpec", "Report", "STSResult", "Scheme", "SentenceEncoder",
    "SolveInfo", "Statistics", "__version__", "calibrate", "compare", "cosine_fidelity", "cpu", "evaluate", "get_num_threads",
    "gptq", "load", "ops", "pearson",
    "perplexity", "quantize", "set_num_threads", "spearman", "sqnr_db", "sts",
]
